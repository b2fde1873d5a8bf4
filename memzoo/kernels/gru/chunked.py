"""The GRU token by token over all sequences and heads at once in plain torch: what a CPU runs, forward and backward.

Autograd would keep every step's gates and add up the weight's gradient step by step. Here the forward keeps states; the backward gets all
gates back in one product, carries only the gradient of h from step to step, and takes the weight's gradient in one product after them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.recurrent import by_sequence, by_time, last_state, shifted


class _Scan(torch.autograd.Function):
    """States [H, T, N, D] of x [H, T, N, 3 D], weight [H, D, 3 D], bias [H, D] and initial states [H, N, D]."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial):
        h, states, dim = initial, [], initial.shape[-1]
        for a in x.unbind(1):
            recurrent = h @ weight
            r, z = (a[..., : 2 * dim] + recurrent[..., : 2 * dim]).sigmoid().chunk(2, -1)
            n = (a[..., 2 * dim :] + r * (recurrent[..., 2 * dim :] + bias[:, None])).tanh()
            h = n + z * (h - n)
            states.append(h)
        states = torch.stack(states, 1)
        ctx.save_for_backward(x, weight, bias, initial, states)
        return states

    @staticmethod
    def backward(ctx, dstates):
        x, weight, bias, initial, states = ctx.saved_tensors
        before = shifted(states, initial)
        a_r, a_z, a_n = (before.flatten(1, 2) @ weight).view_as(x).chunk(3, -1)
        x_r, x_z, x_n = x.chunk(3, -1)
        a_n = a_n + bias[:, None, None]
        r, z = (x_r + a_r).sigmoid(), (x_z + a_z).sigmoid()
        n = (x_n + r * a_n).tanh()
        # What a gradient of h does to x_n, to the gates' recurrent parts, and (directly) to the state before.
        to_new = (1 - z) * (1 - n * n)
        factors = torch.cat((to_new * a_n * r * (1 - r), (before - n) * z * (1 - z), to_new * r), -1).unbind(1)
        keep, dstates, back, dh, recurrent, total = z.unbind(1), dstates.unbind(1), weight.mT, torch.zeros_like(initial), [], []
        for t in range(x.shape[1] - 1, -1, -1):
            dh = dh + dstates[t]
            total.append(dh)
            recurrent.append(dh.repeat(1, 1, 3) * factors[t])
            dh = torch.baddbmm(dh * keep[t], recurrent[-1], back)
        recurrent, total = torch.stack(recurrent[::-1], 1), torch.stack(total[::-1], 1)
        dim = initial.shape[-1]
        dx = torch.cat((recurrent[..., : 2 * dim], total * to_new), -1)
        dweight = before.flatten(1, 2).mT @ recurrent.flatten(1, 2)
        return dx, dweight, recurrent[..., 2 * dim :].sum((1, 2)), dh


def gru_chunked(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = by_time(x.to(dtype), cu_seqlens)
    h = _Scan.apply(rows, weight.to(dtype).flatten(2), bias.to(dtype), initial.transpose(0, 1))
    return by_sequence(h, cu_seqlens, x.shape[1]).to(x.dtype), last_state(h, initial, cu_seqlens)
