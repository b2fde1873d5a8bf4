"""Gated scan: the elementwise linear recurrence `h_t = a_t h_{t-1} + b_t`, the core of minimal GRUs, RG-LRU and other gated recurrences."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import check_cu_seqlens, check_device, check_dim, check_float, check_shape, check_tokens, sequence_count
from ..common.dispatch import resolve_implementation
from .chunked import gated_scan_chunked
from .reference import gated_scan_reference

__all__ = ["gated_scan"]

OP = "gated_scan"


def gated_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`h_t = a_t h_{t-1} + b_t`, each channel by itself, from h = 0 or `initial_state`.

    The gate a is the multiplier itself, usually from 0 to 1, but any number may stand there: nothing is divided by it and no logarithm
    is taken, so that 0 forgets everything before it and still has its gradient. Source: Martin & Cundy 2018 (arXiv 1709.04057).

    Args:
        a: gates, [B, T, D].
        b: what each token adds, [B, T, D]; a and b may differ in dtype, as a float32 gate beside a bfloat16 b usually does.
        initial_state: h before the first token, [N, D]; zeros if None. N is B, or the number of packed sequences.
        output_final_state: also return h after the last token unrounded, for the next call.
        cu_seqlens: boundaries of packed sequences, [N + 1], with B = 1; sequences may be empty.
        implementation: "triton", "chunked", "reference", or None for the one that fits the device.

    Returns:
        (h [B, T, D] in b's dtype, final state [N, D] in float32 (float64 if a or b is) or None). Products of gates over many tokens are
        held in the state's type: where they overflow it, a state of 0 may come out as NaN.

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    check_dim(OP, "a", a, 3, "[B, T, D]")
    check_tokens(OP, "a", a)
    batch, length, dim = a.shape
    check_shape(OP, "b", b, a.shape, "[B, T, D]")
    if dim == 0:
        raise ValueError(f"{OP}: a has shape {list(a.shape)}: D must be at least 1")
    check_cu_seqlens(OP, cu_seqlens, batch, length)
    if initial_state is not None:
        check_shape(OP, "initial_state", initial_state, (sequence_count(cu_seqlens, batch), dim), "[N, D]")
    check_float(OP, a=a, b=b, initial_state=initial_state)
    check_device(OP, "a", a, b=b, cu_seqlens=cu_seqlens, initial_state=initial_state)

    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    state = None if initial_state is None else initial_state.to(dtype)
    chosen = resolve_implementation(OP, implementation, a if a.dtype == torch.float64 else b)
    if chosen == "reference":
        run = gated_scan_reference
    elif chosen == "chunked":
        run = gated_scan_chunked
    else:
        from .kernel import gated_scan_step, gated_scan_triton

        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, state))
        one = length == 1 and cu_seqlens is None and state is not None and output_final_state
        run = gated_scan_step if one and not needs_grad else gated_scan_triton
    return run(a, b, state, output_final_state, cu_seqlens)
