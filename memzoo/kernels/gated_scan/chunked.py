"""The gated scan in plain torch: pairs of tokens become one token of a scan half as long, which makes about 2 log2 T steps of T."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import token_positions


def gated_scan_chunked(
    a: Tensor, b: Tensor, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Packed sequences are one long scan in which each one's first gate is 0, so uneven lengths cost nothing."""
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    output_dtype, a, b = b.dtype, a.to(dtype), b.to(dtype)
    if cu_seqlens is None:
        h = _scan(a, b, initial_state)
        return h.to(output_dtype), h[:, -1] if output_final_state else None

    total = b.shape[1]
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    empty = (lengths == 0)[:, None]
    if initial_state is not None:
        firsts = starts.clamp(max=total - 1)
        b = b.index_add(1, firsts, (a[0, firsts] * initial_state).masked_fill(empty, 0.0)[None])
    h = _scan(a.masked_fill((token_positions(cu_seqlens, total) == 0)[:, None], 0.0), b, None)
    if not output_final_state:
        return h.to(output_dtype), None
    unwritten = torch.zeros((), dtype=dtype, device=h.device) if initial_state is None else initial_state
    return h.to(output_dtype), torch.where(empty, unwritten, h[0, (starts + lengths - 1).clamp(min=0)])


def _scan(a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """h [B, T, D]. Of each pair the second h comes from the scan of pairs, the first from the h before it."""
    length = a.shape[1]
    if length == 1:
        return b if state is None else torch.addcmul(b, a, state[:, None])
    if length % 2:
        a, b = F.pad(a, (0, 0, 0, 1)), F.pad(b, (0, 0, 0, 1))
    (a_first, a_second), (b_first, b_second) = (x.unflatten(1, (-1, 2)).unbind(2) for x in (a, b))
    second = _scan(a_second * a_first, torch.addcmul(b_second, a_second, b_first), state)
    before = F.pad(second[:, :-1], (0, 0, 1, 0)) if state is None else torch.cat((state[:, None], second[:, :-1]), dim=1)
    first = torch.addcmul(b_first, a_first, before)
    return torch.stack((first, second), dim=2).flatten(1, 2)[:, :length]
