"""Memory Caching: a matrix memory a segment, all of them read by every later token (arXiv 2602.24281)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import (
    check_cu_seqlens,
    check_device,
    check_dim,
    check_float,
    check_head_dim,
    check_same,
    check_shape,
    check_tokens,
    sequence_count,
)
from ..common.dispatch import resolve_implementation
from .checks import check_caching, check_state
from .chunked import MatrixWrites, caching_chunked
from .reference import caching_reference, matrix_memory
from .state import MemoryCachingState

__all__ = ["MemoryCachingState", "memory_caching"]

OP = "memory_caching"


def memory_caching(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None,
    log_decay: Tensor | None = None,
    *,
    segment_length: int | str,
    aggregation: str = "gated",
    top_k: int | None = None,
    restart: bool = True,
    routing: str = "mean",
    routing_keys: Tensor | None = None,
    beta: Tensor | None = None,
    write_gate: Tensor | None = None,
    shift_gate: Tensor | None = None,
    max_segments: int | None = None,
    initial_state: MemoryCachingState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, MemoryCachingState | None]:
    """Linear attention in segments, `M_t = exp(g_t) M_{t-1} + k_t v_t^T`, whose final memories M^(i) stay readable.

        residual  y = M_t^T q + sum_i M^(i)^T q                                                  (Eq. 6, 7)
        gated     y = g^t M_t^T q + sum_i g^i M^(i)^T q,  g = softmax over i and t of r          (Eq. 8 to 10)
        soup      the same for a matrix: one memory whose weights are mixed                      (Eq. 14, 15)
        sparse    gated, over the online memory and the `top_k` cached ones of highest score     (Eq. 16, 17)
        average   y = (M_t + sum_i M^(i))^T q / (1 + segments closed): no training needed        (Sec. 4.3)

    The score of a segment is r = u . mean of its keys ("mean", the paper's), the largest u . mean of a sub-block's keys, eight to a segment
    ("submax"), or u^T (sum_j k_j k_j^T) u ("energy"); of the open segment over its tokens so far, the reading one included. Gradients flow
    through cached memories.

    Args:
        q: queries, [B, T, H, Dk].
        k: keys, [B, T, H, Dk]; as given they are what descriptors pool (a layer l2-normalises them).
        v: values, [B, T, H, Dv]. Dk and Dv are multiples of 8 from 16 to 256.
        u: connectors that score the descriptors, [B, T, H, R]; None with "residual" and "average", which score nothing.
        log_decay: g <= 0 for each token and head, [B, T, H]; None for no decay. Descriptors do not decay.
        segment_length: tokens of a segment, counted in each sequence from its start; or "log" for segments of the powers of two in the
            binary expansion of each sequence's length, largest first, which knows no state.
        aggregation: "residual", "gated", "soup", "sparse" or "average".
        top_k: cached memories that a token reads, with "sparse" only.
        restart: every segment starts from an empty memory; else from where the one before ended.
        routing: "mean", "energy" or "submax".
        routing_keys: what descriptors pool instead of k, [B, T, H, R]: fewer dimensions make a low-rank descriptor.
        beta: write with the delta rule instead, `M += beta k (v - M^T k)^T`, [B, T, H].
        write_gate, shift_gate: `M_t = exp(g_t) M_{t-1} + write k_t v_t^T + shift k_{t-1} v_{t-1}^T` (SWLA, Eq. 26 to 29), [B, T, H]; both
            or none. A segment that starts anew has no token before its first.
        max_segments: most memories that a sequence keeps cached; where one closes too many, each head drops the one that the connector of
            the segment's last token scores lowest. Segments then run one after the other. None for no limit.
        initial_state: a MemoryCachingState, as a call returned it. Where gates mix the reads, `cached` may lie on another device, such as
            the host's memory: with "sparse" a single token then moves the chosen memories only.
        output_final_state: also return the state after the last token.
        cu_seqlens: boundaries of packed sequences, [N + 1], with B = 1; sequences may be empty.
        implementation: "triton", "chunked", "reference", or None for the one that fits the device.

    Returns:
        (output [B, T, H, Dv] in q's dtype, MemoryCachingState in float32, float64 for float64 input, or None).

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    check_dim(OP, "q", q, 4, "[B, T, H, Dk]")
    check_tokens(OP, "q", q)
    batch, length, heads, key_dim = q.shape
    check_shape(OP, "k", k, q.shape, "[B, T, H, Dk]")
    check_dim(OP, "v", v, 4, "[B, T, H, Dv]")
    value_dim = v.shape[3]
    check_shape(OP, "v", v, (batch, length, heads, value_dim), "[B, T, H, Dv]")
    check_head_dim(OP, "q", key_dim)
    check_head_dim(OP, "v", value_dim)
    gates = {"log_decay": log_decay, "beta": beta, "write_gate": write_gate, "shift_gate": shift_gate}
    for name, gate in gates.items():
        if gate is not None:
            check_shape(OP, name, gate, (batch, length, heads), "[B, T, H]")
    if (write_gate is None) != (shift_gate is None):
        raise ValueError(f"{OP}: write_gate and shift_gate must be given together")
    if beta is not None and shift_gate is not None:
        raise ValueError(f"{OP}: beta (delta writes) and shift_gate (additive writes of two tokens) exclude each other")
    check_cu_seqlens(OP, cu_seqlens, batch, length)
    caching, routing_keys = check_caching(
        OP, segment_length, aggregation, top_k, restart, routing, q, u, k if routing_keys is None else routing_keys,
        initial_state, output_final_state, max_segments,
    )  # fmt: skip
    check_float(OP, q=q, k=k, v=v, u=u, routing_keys=routing_keys, **gates)
    check_same(OP, "q", q, k=k, v=v, u=u, routing_keys=routing_keys)
    check_device(OP, "q", q, cu_seqlens=cu_seqlens, **gates)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if initial_state is not None:
        memory = [(heads, key_dim, value_dim)]
        last = None if shift_gate is None else ((heads, key_dim), (heads, value_dim))
        initial_state = check_state(OP, initial_state, caching, True, sequence_count(cu_seqlens, batch), memory, u, q, last)
    chosen = resolve_implementation(OP, implementation, q)
    if chosen == "triton":
        from .kernel import memory_caching_triton

        return memory_caching_triton(
            q,
            k,
            v,
            u,
            routing_keys,
            log_decay,
            beta,
            write_gate,
            shift_gate,
            caching,
            initial_state,
            output_final_state,
            cu_seqlens,
        )
    tokens = [None if x is None else x.to(dtype) for x in (q, k, v, log_decay, beta, write_gate, shift_gate)]
    u, routing_keys = (None if x is None else x.to(dtype) for x in (u, routing_keys))
    if chosen == "reference":
        memory = matrix_memory(*tokens)
        output, state = caching_reference(memory, u, routing_keys, caching, (batch, length), initial_state, cu_seqlens)
        output, state = output.view(v.shape), state if output_final_state else None
    else:
        writes = MatrixWrites(*tokens, None if initial_state is None else initial_state.previous)
        output, state = caching_chunked(
            writes, u, routing_keys, caching, (batch, length), initial_state, output_final_state, cu_seqlens
        )
    return output.to(q.dtype), state
