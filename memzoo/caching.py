"""Memory caching after training: a trained recurrent model keeps the memories of earlier segments without any new weight (Sec. 4.3)."""

from __future__ import annotations

from torch import nn

from .layers.caching import CacheOptions
from .layers.matrix_memory import MatrixMemory
from .layers.memory_as_context import MemoryAsContext
from .layers.neural_memory import NeuralMemory
from .layers.vector_memory import VectorMemory

WITHOUT_TRAINING = ("average", "residual")


def enable_memory_caching(
    model: nn.Module, segment_length: int | None, aggregation: str = "average", *, restart: bool = True
) -> nn.Module:
    """Let every recurrent memory of a trained model cache its state after each segment and read all of them; changes and returns `model`.

    Meant for texts longer than those a model was trained on: with `restart` no memory ever holds more than `segment_length` tokens, and
    what is read is the unweighted mean of all memories, the open one included ("average"), or their sum ("residual"). Source: arXiv
    2602.24281, Sec. 4.3. The setting belongs to the live model: it is not saved with it. A cache made before does not fit afterwards.

    Args:
        model: a `titans` (lmm, mag, mal), `linear_transformer` or `mc_rnn` (aggregation "none") model, or a module that holds MatrixMemory,
            NeuralMemory or VectorMemory layers.
        segment_length: tokens of a segment, such as the length trained on; None takes the cache away again.
        aggregation: "average" or "residual"; gates would have to be trained.
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
            f"enable_memory_caching: aggregation is {aggregation!r}, needs one of {', '.join(WITHOUT_TRAINING)}; gates are trained with "
            "a mc_rnn model"
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
    trained = [part for part in memories if part.router is not None or getattr(part, "write_rule", None) == "window"]
    if trained:
        raise ValueError(
            f"enable_memory_caching: the cache of this {type(model).__name__} was trained with it; there is nothing to enable"
        )
    caching = None if segment_length is None else CacheOptions(segment_length, aggregation, restart=restart)
    for memory in memories:
        memory.caching = caching
    return model
