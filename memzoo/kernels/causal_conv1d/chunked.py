"""The causal convolution over all tokens at once in plain torch: W shifted copies, each times its tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import sequence_ids, token_positions


def causal_conv1d_chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    width = weight.shape[1]
    y = x * weight[:, -1]
    for lag in range(1, width):
        y = y + _shift(x, lag, initial_state, cu_seqlens) * weight[:, width - 1 - lag]
    if bias is not None:
        y = y + bias
    return F.silu(y) if activation == "silu" else y


def _shift(x: Tensor, lag: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x[t - lag] within each sequence, [B, T, C]; before its start the state's rows, or zeros."""
    length = x.shape[1]
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], lag, x.shape[2]) if initial_state is None else initial_state[:, -lag:]
        return torch.cat((before, x), dim=1)[:, :length]
    positions = token_positions(cu_seqlens, length)
    inside = (positions >= lag)[:, None]
    shifted = x[0, (torch.arange(length, device=x.device) - lag).clamp(min=0)]
    if initial_state is None:
        return torch.where(inside, shifted, torch.zeros((), dtype=x.dtype, device=x.device))[None]
    # With p tokens since the start, the input `lag` back is row W - 1 + p - lag of the state.
    rows = (initial_state.shape[1] + positions - lag).clamp(max=initial_state.shape[1] - 1)
    return torch.where(inside, shifted, initial_state[sequence_ids(cu_seqlens, length), rows])[None]


def final_window(x: Tensor, width: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last W - 1 inputs of each sequence, reaching back into the initial state where it is shorter, [N, W - 1, C]."""
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if initial_state is None else initial_state
        return (
            torch.cat((before, x[:, -(width - 1) :] if width > 1 else x[:, :0]), dim=1)[:, -(width - 1) :] if width > 1 else before
        )
    count = cu_seqlens.numel() - 1
    if initial_state is None:
        initial_state = x.new_zeros(count, width - 1, x.shape[2])
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    # Row r of the window is input number p = length - (W - 1) + r of its sequence; p < 0 lies in the state, at row W - 1 + p.
    p = lengths[:, None] - (width - 1) + torch.arange(width - 1, device=x.device)
    tokens = x[0, (cu_seqlens[:-1].long()[:, None] + p).clamp(min=0, max=x.shape[1] - 1)]
    rows = (width - 1 + p).clamp(min=0, max=max(width - 2, 0))
    kept = initial_state.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
    return torch.where((p >= 0)[..., None], tokens, kept)
