"""The definition of the causal convolution: one sequence and one token at a time, a window of W inputs against the filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    width = weight.shape[1]
    if cu_seqlens is None:
        rows = list(x)
    else:
        rows = [x[0, a:b] for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
    outputs, states = [], []
    for n, row in enumerate(rows):
        window = x.new_zeros(width - 1, x.shape[2]) if initial_state is None else initial_state[n]
        for token in row:
            window = torch.cat((window, token[None]))
            y = (weight.T * window).sum(0)
            if bias is not None:
                y = y + bias
            outputs.append(F.silu(y) if activation == "silu" else y)
            window = window[1:]
        states.append(window)
    return torch.stack(outputs).view_as(x), torch.stack(states) if output_final_state else None
