"""Packed sequences: rows of different lengths laid end to end as [1, total, ...], with their boundaries in cu_seqlens [N + 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """The sequence that each of `total` packed tokens belongs to, [total] of int64; needs no copy to the host."""
    positions = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True) - 1


def token_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """The place of each packed token in its own sequence, counted from 0, [total] of int64."""
    positions = torch.arange(total, device=cu_seqlens.device)
    return positions - cu_seqlens.long()[sequence_ids(cu_seqlens, total)]


def max_length(cu_seqlens: Tensor) -> int:
    """The longest sequence's length; waits for the device."""
    return int((cu_seqlens[1:] - cu_seqlens[:-1]).max())


def unpack(x: Tensor, cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """[1, total, ...] to [N, length, ...]: one row a sequence, zeros after its end; `length` defaults to the longest."""
    length = max_length(cu_seqlens) if length is None else length
    out = x.new_zeros(cu_seqlens.numel() - 1, length, *x.shape[2:])
    ids, positions = sequence_ids(cu_seqlens, x.shape[1]), token_positions(cu_seqlens, x.shape[1])
    return out.index_put((ids, positions), x[0])


def pack(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """[N, length, ...] to [1, total, ...]: the inverse of `unpack`."""
    return x[sequence_ids(cu_seqlens, total), token_positions(cu_seqlens, total)].unsqueeze(0)


def chunk_indices(cu_seqlens: Tensor, total: int, chunk: int) -> Tensor:
    """Which chunk of which sequence each program handles, [programs, 2] of int32: (sequence, chunk in it).

    No chunk crosses a sequence's end. There are `ceil(total / chunk) + N` programs, an upper bound that needs no copy to the host;
    those beyond the last real chunk have sequence -1 and must do nothing.
    """
    count = cu_seqlens.numel() - 1
    chunks = (cu_seqlens[1:] - cu_seqlens[:-1] + chunk - 1) // chunk
    ends = chunks.cumsum(0)
    programs = torch.arange((total + chunk - 1) // chunk + count, device=cu_seqlens.device, dtype=ends.dtype)
    sequence = torch.searchsorted(ends, programs, right=True)
    inside = sequence < count
    clipped = sequence.clamp(max=count - 1)
    local = programs - (ends - chunks)[clipped]
    return torch.stack((torch.where(inside, sequence, -1), torch.where(inside, local, 0)), dim=1).to(torch.int32)
