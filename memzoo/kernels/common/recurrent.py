"""What the recurrences whose gates read the last state (lstm, gru) share in plain torch: checks, and states laid out by time."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    check_cu_seqlens,
    check_device,
    check_dim,
    check_float,
    check_head_dim,
    check_shape,
    check_tokens,
    sequence_count,
)
from .packing import pack, sequence_ids, unpack


def check_recurrence(op: str, gates: int, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, **states: Tensor | None) -> None:
    """Raise unless x is [B, T, H, gates, D], weight [H, D, gates, D] and every given state [N, H, D]."""
    layout = f"[B, T, H, {gates}, D]"
    check_dim(op, "x", x, 5, layout)
    check_tokens(op, "x", x)
    batch, length, heads, _, dim = x.shape
    check_shape(op, "x", x, (batch, length, heads, gates, dim), layout)
    check_head_dim(op, "x", dim)
    check_shape(op, "weight", weight, (heads, dim, gates, dim), f"[H, D, {gates}, D]")
    check_cu_seqlens(op, cu_seqlens, batch, length)
    for name, state in states.items():
        if state is not None:
            check_shape(op, name, state, (sequence_count(cu_seqlens, batch), heads, dim), "[N, H, D]")
    check_float(op, x=x, weight=weight, **states)
    check_device(op, "x", x, weight=weight, cu_seqlens=cu_seqlens, **states)


def starting_state(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The given state in float32 (float64 for float64 input), or zeros, [N, H, D]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        return x.new_zeros(sequence_count(cu_seqlens, x.shape[0]), x.shape[2], x.shape[4], dtype=dtype)
    return state.to(dtype)


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The tokens of each sequence, [T_n, H, ...], for one sequence at a time."""
    return list(x) if cu_seqlens is None else list(x[0].split(cu_seqlens.diff().tolist()))


def before(states: Tensor, initial: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state before each token, [B, T, H, D] in its dtype, of states [B, T, H, D] after each and initial states [N, H, D]."""
    initial = initial.to(states.dtype)
    if cu_seqlens is None:
        return torch.cat((initial[:, None], states[:, :-1]), 1)
    ids = sequence_ids(cu_seqlens, states.shape[1])
    first = torch.arange(states.shape[1], device=states.device) == cu_seqlens[ids]
    return torch.where(first[:, None, None], initial[ids], states.roll(1, 1))


def by_time(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B, T, H, ...] to [H, T, N, features]: what every head and sequence needs at one time lies together; zeros after an end."""
    return (x if cu_seqlens is None else unpack(x, cu_seqlens)).flatten(3).permute(2, 1, 0, 3)


def by_sequence(y: Tensor, cu_seqlens: Tensor | None, total: int) -> Tensor:
    """[H, T, N, D] to [B, T, H, D]: the inverse of `by_time`."""
    y = y.permute(2, 1, 0, 3)
    return y if cu_seqlens is None else pack(y, cu_seqlens, total)


def last_state(states: Tensor, initial: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state after each sequence's last token, [N, H, D], of states [H, T, N, D]; an empty sequence keeps its initial one."""
    if cu_seqlens is None:
        return states[:, -1].transpose(0, 1)
    lengths = cu_seqlens.diff().long()
    found = states[:, (lengths - 1).clamp(min=0), torch.arange(lengths.numel(), device=lengths.device)]
    return torch.where((lengths > 0)[:, None, None], found.transpose(0, 1), initial)


def shifted(states: Tensor, initial: Tensor) -> Tensor:
    """The state before each time, [H, T, N, D], of states [H, T, N, D] after each and initial ones [H, N, D]."""
    return torch.cat((initial[:, None], states[:, :-1]), 1)
