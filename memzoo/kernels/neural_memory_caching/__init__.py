"""Memory Caching of neural memories: a matrix or an MLP that learns while it reads, one a segment, all read by every later token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import check_cu_seqlens, check_device, check_float, check_same, sequence_count
from ..common.dispatch import resolve_implementation
from ..memory_caching.checks import check_caching, check_state
from ..memory_caching.chunked import caching_chunked
from ..memory_caching.reference import caching_reference
from ..memory_caching.state import MemoryCachingState, map_tensors
from ..neural_memory import NeuralMemoryState, check_neural_memory, check_neural_memory_state
from .chunked import NeuralWrites
from .reference import cached_neural_memory

__all__ = ["neural_memory_caching"]

OP = "neural_memory_caching"


def neural_memory_caching(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    weights: Sequence[Tensor],
    *,
    chunk_size: int,
    segment_length: int | str,
    residual: bool | None = None,
    loss: str = "l2",
    max_grad_norm: float | None = None,
    aggregation: str = "gated",
    top_k: int | None = None,
    restart: bool = True,
    routing: str = "mean",
    routing_keys: Tensor | None = None,
    start: NeuralMemoryState | None = None,
    max_segments: int | None = None,
    initial_state: MemoryCachingState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, MemoryCachingState | None]:
    """`neural_memory` in segments whose final memories stay readable; see `memory_caching` for the aggregations and the routing.

    A segment begins a chunk. With "soup" the weights of the cached memories and of the online one are mixed layer by layer, as they are
    with "average"; else what they read is mixed. Source: arXiv 2602.24281, Sec. 3 with the memories of Eq. 30 to 36.

    Args:
        q, k, v, lr, momentum, decay, weights, chunk_size, residual, loss, max_grad_norm: as `neural_memory` takes them.
        u, segment_length, aggregation, top_k, restart, routing, routing_keys: as `memory_caching` takes them.
        start: the state of one sequence that segments start from instead of `weights` (after persistent vectors were written, say).
        initial_state: a MemoryCachingState whose `memory` is a NeuralMemoryState, as a call returned it.
        output_final_state: also return the state after the last token.
        cu_seqlens: boundaries of packed sequences, [N + 1], with B = 1; sequences may be empty.
        implementation: "triton" (the online memory and sparse reads by Triton's kernels, other reads by products of torch), "chunked",
            "reference", or None for the one that fits. "soup" and "average" need every layer of the online memory, which the kernels keep
            to themselves: there "triton" is refused, and None is "chunked" on every device.

    Returns:
        (output [B, T, H, Dv] in q's dtype, MemoryCachingState in float32, float64 for float64 input, or None).

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    weights, momentum, decay, residual = check_neural_memory(
        OP, q, k, v, lr, momentum, decay, weights, chunk_size, residual, loss, max_grad_norm
    )
    batch, length = q.shape[:2]
    check_cu_seqlens(OP, cu_seqlens, batch, length)
    caching, routing_keys = check_caching(
        OP, segment_length, aggregation, top_k, restart, routing, q, u, k if routing_keys is None else routing_keys,
        initial_state, output_final_state, max_segments,
    )  # fmt: skip
    check_float(OP, q=q, k=k, v=v, u=u, routing_keys=routing_keys)
    check_same(OP, "q", q, k=k, v=v, u=u, routing_keys=routing_keys)
    check_device(OP, "q", q, cu_seqlens=cu_seqlens)
    count = sequence_count(cu_seqlens, batch)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if start is not None:
        start = map_tensors(check_neural_memory_state(OP, start, weights, 1, chunk_size, "start", q), lambda x: _wide(x, dtype))
    if initial_state is not None:
        shapes = [tuple(w.shape) for w in weights]
        initial_state = check_state(OP, initial_state, caching, False, count, shapes, u, q, online=False)
        check_neural_memory_state(OP, initial_state.memory, weights, count, chunk_size, "initial_state.memory", q)
    chosen = resolve_implementation(OP, implementation, q)
    by_layer = caching.aggregation in ("soup", "average")
    if chosen == "triton" and by_layer:
        if implementation is not None:
            raise ValueError(
                f"{OP}: implementation 'triton' has no aggregation {aggregation!r}; use 'chunked', which runs on any device"
            )
        chosen = "chunked"
    # The online memory's kernels take half types as they are; everything else is worked out in float32.
    tokens = [x.to(dtype) for x in (q, k, v, lr, momentum, decay)]
    initial = tuple(w.to(dtype) for w in weights)
    options = (chunk_size, residual, loss, None if max_grad_norm is None else float(max_grad_norm))
    u, routing_keys = (None if x is None else x.to(dtype) for x in (u, routing_keys))
    arguments = (u, routing_keys, caching, (batch, length), initial_state)
    if chosen == "reference":
        output, state = caching_reference(cached_neural_memory(*tokens, initial, start, options), *arguments, cu_seqlens)
        output, state = output.view(v.shape), state if output_final_state else None
    else:
        writes = NeuralWrites(*tokens, initial, start, options, chosen, caching.top_k)
        output, state = caching_chunked(writes, *arguments, output_final_state, cu_seqlens)
    return output.to(q.dtype), state


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
