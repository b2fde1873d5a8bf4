"""The definition of the GRU: one sequence and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.recurrent import sequences


def gru_reference(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias, outputs, final = weight.to(dtype), bias.to(dtype), [], []
    for tokens, h in zip(sequences(x, cu_seqlens), initial):
        for x_r, x_z, x_n in (token.unbind(1) for token in tokens.to(dtype)):  # [H, D] each
            a_r, a_z, a_n = torch.einsum("hk,hkgd->hgd", h, weight).unbind(1)
            r, z = (x_r + a_r).sigmoid(), (x_z + a_z).sigmoid()
            n = (x_n + r * (a_n + bias)).tanh()
            h = (1 - z) * n + z * h
            outputs.append(h)
        final.append(h)
    return torch.stack(outputs).view(*x.shape[:3], x.shape[4]).to(x.dtype), torch.stack(final)
