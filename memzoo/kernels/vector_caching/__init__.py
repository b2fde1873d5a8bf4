"""Memory Caching of vectors: the states of an elementwise or a recurrent network, one a segment, mixed by every later token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import check_cu_seqlens, check_device, check_dim, check_float, check_same, check_tokens, sequence_count
from ..common.dispatch import resolve_implementation
from ..memory_caching.checks import check_caching, check_state
from ..memory_caching.chunked import caching_chunked
from ..memory_caching.reference import caching_reference
from ..memory_caching.state import MemoryCachingState
from .chunked import VectorWrites
from .reference import cached_vectors

__all__ = ["vector_caching"]

OP = "vector_caching"


def vector_caching(
    h: Tensor,
    keys: Tensor | None,
    u: Tensor | None,
    *,
    segment_length: int | str,
    aggregation: str = "gated",
    top_k: int | None = None,
    routing: str = "mean",
    max_segments: int | None = None,
    initial_state: MemoryCachingState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, MemoryCachingState | None]:
    """`y_t = g^t h_t + sum_i g^i h^(i)` with h^(i) the last state of segment i: memory caching where a memory is a vector.

    The recurrence that makes h is the caller's, and so is starting it anew with every segment (`segment_boundaries` says where they are).
    Aggregations and routing are those of `memory_caching`; "soup" and "gated" are the same for a vector. Source: arXiv 2602.24281, Sec. 3
    and 4.1; its output gate, y_t = o_t * (...), is the caller's too.

    Args:
        h: states after every token, [B, T, H, D].
        keys: what descriptors pool, [B, T, H, R]; None with "residual" and "average".
        u: connectors that score the descriptors, [B, T, H, R]; None likewise.
        segment_length, aggregation, top_k, routing, initial_state, output_final_state, cu_seqlens, implementation: as `memory_caching`
            takes them; "triton" is refused: products of torch on any device are all there is to do.

    Returns:
        (output [B, T, H, D] in h's dtype, MemoryCachingState, whose `memory` is the last state [N, H, D], or None).

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    check_dim(OP, "h", h, 4, "[B, T, H, D]")
    check_tokens(OP, "h", h)
    batch, length = h.shape[:2]
    check_cu_seqlens(OP, cu_seqlens, batch, length)
    caching, keys = check_caching(
        OP, segment_length, aggregation, top_k, True, routing, h, u, keys, initial_state, output_final_state, max_segments, "keys"
    )
    check_float(OP, h=h, keys=keys, u=u)
    check_same(OP, "h", h, keys=keys, u=u)
    check_device(OP, "h", h, cu_seqlens=cu_seqlens)
    if initial_state is not None:
        count = sequence_count(cu_seqlens, batch)
        initial_state = check_state(OP, initial_state, caching, True, count, [tuple(h.shape[2:])], u, h)
    if implementation == "triton":
        raise ValueError(
            f"{OP}: implementation 'triton' does not exist, a vector's reads are products; use 'chunked' on any device"
        )
    dtype = torch.promote_types(h.dtype, torch.float32)
    states, u, keys = (None if x is None else x.to(dtype) for x in (h, u, keys))
    arguments = (u, keys, caching, (batch, length), initial_state)
    if resolve_implementation(OP, implementation, h) == "reference":
        output, state = caching_reference(cached_vectors(states), *arguments, cu_seqlens)
        output, state = output.view(h.shape), state if output_final_state else None
    else:
        output, state = caching_chunked(VectorWrites(states), *arguments, output_final_state, cu_seqlens)
    return output.to(h.dtype), state
