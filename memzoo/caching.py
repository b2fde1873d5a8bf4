"""Memory caching after training: a trained recurrent model keeps the memories of earlier segments without any new weight (Sec. 4.3)."""

from __future__ import annotations

from torch import nn

from .layers.caching import CacheOptions, Router
from .layers.matrix_memory import MatrixMemory
from .layers.memory_as_context import MemoryAsContext
from .layers.neural_memory import NeuralMemory
from .layers.vector_memory import VectorMemory

WITHOUT_TRAINING = ("average", "residual", "gated", "sparse")


def enable_memory_caching(
    model: nn.Module,
    segment_length: int | None,
    aggregation: str = "average",
    *,
    top_k: int | None = None,
    tau: float = 8.0,
    restart: bool = True,
) -> nn.Module:
    """Let every recurrent memory of a trained model cache its state after each segment and read all of them; changes and returns `model`.

    Meant for texts longer than those a model was trained on: with `restart` no memory ever holds more than `segment_length` tokens. The
    paper's way is the unweighted mean of all memories, the open one included ("average"; arXiv 2602.24281, Sec. 4.3); "residual" is their
    sum. "gated" and "sparse" are ours: softmax gates by key energy, tau q^T (sum_j k_j k_j^T) q, which needs no weight and no training
    where queries and keys are l2-normalised. The setting belongs to the live model and is not saved; a cache made before does not fit.

    Args:
        model: a `titans` (lmm, mag, mal), `linear_transformer` or `mc_rnn` (aggregation "none") model, or a module that holds MatrixMemory,
            NeuralMemory or VectorMemory layers.
        segment_length: tokens of a segment, such as the length trained on; None takes the cache away again.
        aggregation: "average", "residual", "gated" or "sparse".
        top_k: memories that a token reads with "sparse"; None for 4.
        tau: how sharply gates follow the energies.
        restart: every segment starts from the first state; else from where the one before ended.

    Raises:
        ValueError: a model without such a memory, one whose cache was trained with it, or an argument that does not fit.
    """
    if segment_length is not None and (
        isinstance(segment_length, bool) or not isinstance(segment_length, int) or segment_length < 1
    ):
        raise ValueError(f"enable_memory_caching: segment_length is {segment_length!r}, needs an integer of at least 1, or None")
    if aggregation not in WITHOUT_TRAINING:
        raise ValueError(
            f"enable_memory_caching: aggregation is {aggregation!r}, needs one of {', '.join(WITHOUT_TRAINING)}; others are trained with a "
            "mc_rnn model"
        )
    if any(isinstance(part, MemoryAsContext) for part in model.modules()):
        raise ValueError(
            f"enable_memory_caching: {type(model).__name__} reads its memory as context, segment by segment, which leaves nothing to "
            "cache; variants lmm, mag and mal work"
        )
    memories = [part for part in model.modules() if isinstance(part, (MatrixMemory, NeuralMemory, VectorMemory))]
    if not memories:
        raise ValueError(
            f"enable_memory_caching: {type(model).__name__} has no recurrent memory; titans, linear_transformer and mc_rnn models have"
        )
    if any(
        (part.router is not None and not part.router.fixed) or getattr(part, "write_rule", None) == "window" for part in memories
    ):
        raise ValueError(
            f"enable_memory_caching: the cache of this {type(model).__name__} was trained with it; there is nothing to enable"
        )
    gated = aggregation in ("gated", "sparse")
    if gated and not all(isinstance(part, NeuralMemory) or getattr(part, "qk_norm", False) for part in memories):
        raise ValueError(
            f"enable_memory_caching: aggregation is {aggregation!r}, needs l2-normalised queries and keys, which this "
            f"{type(model).__name__} lacks; use average or residual"
        )
    if aggregation == "sparse":
        top_k = 4 if top_k is None else top_k
    if (top_k is None) == (aggregation == "sparse") or (top_k is not None and not 1 <= top_k <= 16):
        raise ValueError(f"enable_memory_caching: top_k is {top_k!r}, needs 1 to 16 with aggregation sparse, else None")
    if not tau > 0:
        raise ValueError(f"enable_memory_caching: tau is {tau!r}, needs a number above 0")
    caching = None
    if segment_length is not None:
        caching = CacheOptions(segment_length, aggregation, top_k, restart, "energy" if gated else "mean")
    for memory in memories:
        memory.caching, memory.router = caching, None
        if caching is not None and gated:
            weight = memory.q_proj.weight
            memory.router = Router(weight.shape[1], memory.num_heads, memory.head_dim, "energy", tau=tau).to(weight.device)
    return model
