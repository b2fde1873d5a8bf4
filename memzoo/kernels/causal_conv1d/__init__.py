"""Depthwise causal convolution over time, the short filter that follows the q, k, v projections of many recurrent memories."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import (
    check_cu_seqlens,
    check_device,
    check_dim,
    check_float,
    check_same,
    check_shape,
    check_tokens,
    sequence_count,
)
from ..common.dispatch import resolve_implementation
from .chunked import causal_conv1d_chunked, final_window
from .reference import causal_conv1d_reference

__all__ = ["causal_conv1d"]

OP = "causal_conv1d"
MAX_WIDTH = 16


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`y[t, c] = activation(bias[c] + sum_w weight[c, w] x[t - W + 1 + w, c])`, zeros (or the state) before the first token.

    Args:
        x: input, [B, T, C].
        weight: one filter a channel, [C, W], W from 1 to 16; the last tap sees the token itself.
        bias: [C] or None.
        activation: None or "silu".
        initial_state: the W - 1 inputs before the first token, [N, W - 1, C]; zeros if None. N is B, or the number of packed sequences.
        output_final_state: also return the last W - 1 inputs, for the next call.
        cu_seqlens: boundaries of packed sequences, [N + 1], with B = 1; sequences may be empty.
        implementation: "triton", "chunked", "reference", or None for the one that fits the device.

    Returns:
        (output [B, T, C] in x's dtype, final state [N, W - 1, C] in x's dtype or None).

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    check_dim(OP, "x", x, 3, "[B, T, C]")
    check_tokens(OP, "x", x)
    batch, length, channels = x.shape
    check_dim(OP, "weight", weight, 2, "[C, W]")
    width = weight.shape[1]
    check_shape(OP, "weight", weight, (channels, width), "[C, W]")
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{OP}: weight has width {width}, needs 1 to {MAX_WIDTH}")
    check_cu_seqlens(OP, cu_seqlens, batch, length)
    count = sequence_count(cu_seqlens, batch)
    if bias is not None:
        check_shape(OP, "bias", bias, (channels,), "[C]")
    if initial_state is not None:
        check_shape(OP, "initial_state", initial_state, (count, width - 1, channels), "[N, W - 1, C]")
    check_float(OP, x=x, weight=weight, bias=bias, initial_state=initial_state)
    check_same(OP, "x", x, weight=weight, bias=bias)
    check_device(OP, "x", x, cu_seqlens=cu_seqlens, initial_state=initial_state)
    if activation not in (None, "silu"):
        raise ValueError(f"{OP}: activation is {activation!r}, needs None or 'silu'")
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)

    chosen = resolve_implementation(OP, implementation, x)
    if chosen == "reference":
        return causal_conv1d_reference(x, weight, bias, activation, initial_state, output_final_state, cu_seqlens)
    if chosen == "triton":
        from .kernel import causal_conv1d_step, causal_conv1d_triton

        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, initial_state))
        if length == 1 and cu_seqlens is None and initial_state is not None and output_final_state and width > 1 and not needs_grad:
            return causal_conv1d_step(x, weight, bias, activation, initial_state)
        output = causal_conv1d_triton(x, weight, bias, activation, initial_state, cu_seqlens)
    else:
        output = causal_conv1d_chunked(x, weight, bias, activation, initial_state, cu_seqlens)
    return output, final_window(x, width, initial_state, cu_seqlens) if output_final_state else None
