"""The delta rule: a matrix memory that writes the difference between a value and what it already holds for the key, with optional decay."""

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
from .chunked import delta_rule_chunked
from .reference import delta_rule_reference

__all__ = ["delta_rule"]

OP = "delta_rule"


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`S' = exp(g_t) S_{t-1}`, `S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`, `y_t = scale S_t^T q_t`: decay, write, read.

    The write is one gradient step of size beta_t on `1/2 ||S^T k_t - v_t||^2`. Source: Yang et al. 2024, "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length"; with decay their "Gated Delta Networks".

    Args:
        q: queries, [B, T, H, Dk]; Dk a multiple of 8 from 16 to 256.
        k: keys, [B, T, H, Dk]. The caller normalises them: the state stays bounded for `beta_t ||k_t||^2` from 0 to 2.
        v: values, [B, T, H, Dv]; Dv a multiple of 8 from 16 to 256.
        beta: write strengths, [B, T, H].
        log_decay: natural logarithm g of the factor that the state keeps, at most 0, [B, T, H]; None keeps all of it.
        scale: factor of the output.
        initial_state: [N, H, Dk, Dv], zeros if None. N is B, or the number of packed sequences.
        output_final_state: also return the state after the last token.
        cu_seqlens: boundaries of packed sequences, [N + 1], with B = 1; sequences may be empty.
        implementation: "triton", "chunked", "reference", or None for the one that fits the device.

    Returns:
        (output [B, T, H, Dv] in q's dtype, final state [N, H, Dk, Dv] in float32, float64 for float64 input, or None).

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    check_dim(OP, "q", q, 4, "[B, T, H, Dk]")
    check_tokens(OP, "q", q)
    batch, length, heads, key_dim = q.shape
    check_shape(OP, "k", k, (batch, length, heads, key_dim), "[B, T, H, Dk]")
    check_dim(OP, "v", v, 4, "[B, T, H, Dv]")
    value_dim = v.shape[3]
    check_shape(OP, "v", v, (batch, length, heads, value_dim), "[B, T, H, Dv]")
    check_head_dim(OP, "q", key_dim)
    check_head_dim(OP, "v", value_dim)
    check_shape(OP, "beta", beta, (batch, length, heads), "[B, T, H]")
    if log_decay is not None:
        check_shape(OP, "log_decay", log_decay, (batch, length, heads), "[B, T, H]")
    check_cu_seqlens(OP, cu_seqlens, batch, length)
    if initial_state is not None:
        count = sequence_count(cu_seqlens, batch)
        check_shape(OP, "initial_state", initial_state, (count, heads, key_dim, value_dim), "[N, H, Dk, Dv]")
    check_float(OP, q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state)
    check_same(OP, "q", q, k=k, v=v)
    check_device(OP, "q", q, beta=beta, log_decay=log_decay, initial_state=initial_state, cu_seqlens=cu_seqlens)
    if initial_state is not None:
        initial_state = initial_state.to(torch.promote_types(q.dtype, torch.float32))

    chosen = resolve_implementation(OP, implementation, q)
    arguments = (q, k, v, beta, log_decay, float(scale), initial_state, output_final_state, cu_seqlens)
    if chosen == "reference":
        return delta_rule_reference(*arguments)
    if chosen == "chunked":
        return delta_rule_chunked(*arguments)
    from .kernel import delta_rule_step, delta_rule_triton

    if length == 1 and cu_seqlens is None and initial_state is not None and output_final_state:
        inputs = (q, k, v, beta, log_decay, initial_state)
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
            return delta_rule_step(q, k, v, beta, log_decay, float(scale), initial_state)
    return delta_rule_triton(*arguments)
