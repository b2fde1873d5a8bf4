"""The definition of the gated scan: one sequence and one token at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def gated_scan_reference(
    a: Tensor, b: Tensor, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    if cu_seqlens is None:
        rows = [(row, range(a.shape[1])) for row in range(a.shape[0])]
    else:
        rows = [(0, range(start, end)) for start, end in pairwise(cu_seqlens.tolist())]
    outputs, states = [], []
    for n, (row, tokens) in enumerate(rows):
        h = b.new_zeros(b.shape[2], dtype=dtype) if initial_state is None else initial_state[n]
        for t in tokens:
            h = a[row, t].to(dtype) * h + b[row, t].to(dtype)
            outputs.append(h)
        states.append(h)
    return torch.stack(outputs).view(b.shape).to(b.dtype), torch.stack(states) if output_final_state else None
