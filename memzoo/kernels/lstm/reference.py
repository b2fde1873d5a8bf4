"""The definition of the LSTM: one sequence and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.recurrent import sequences


def lstm_reference(
    x: Tensor, weight: Tensor, initial_h: Tensor, initial_c: Tensor, return_cells: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor | tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, outputs, final = weight.to(dtype), [], []
    for tokens, h, c in zip(sequences(x, cu_seqlens), initial_h, initial_c):
        for token in tokens.to(dtype):
            i, f, g, o = (token + torch.einsum("hk,hkgd->hgd", h, weight)).unbind(1)  # [H, D]
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(torch.stack((o.sigmoid(), c) if return_cells else (h,)))
        final.append(torch.stack((h, c)))
    outputs = torch.stack(outputs, 1).view(-1, *x.shape[:3], x.shape[4]).to(x.dtype).unbind(0)
    return outputs if return_cells else outputs[0], torch.stack(final, 1).unbind(0)
