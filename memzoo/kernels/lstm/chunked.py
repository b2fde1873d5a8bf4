"""The LSTM token by token over all sequences and heads at once in plain torch: what a CPU runs, forward and backward.

Autograd would keep every step's gates and add up the weight's gradient step by step. Here the forward keeps output gates and cells; the
backward gets all gates back in one product, carries only the gradients of h and c from step to step, and takes the weight's gradient in
one product after them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.recurrent import by_sequence, by_time, last_state, shifted


class _Scan(torch.autograd.Function):
    """Output gates and cells, [H, T, N, D] each, of x [H, T, N, 4 D], weight [H, D, 4 D] and states [H, N, D]."""

    @staticmethod
    def forward(ctx, x, weight, initial_h, initial_c):
        h, c, gates, cells = initial_h, initial_c, [], []
        for a in x.unbind(1):
            i, f, g, o = torch.baddbmm(a, h, weight).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            o = o.sigmoid()
            h = o * c.tanh()
            gates.append(o)
            cells.append(c)
        gates, cells = torch.stack(gates, 1), torch.stack(cells, 1)
        ctx.save_for_backward(x, weight, initial_h, initial_c, gates, cells)
        return gates, cells

    @staticmethod
    def backward(ctx, dgates, dcells):
        x, weight, initial_h, initial_c, o, cells = ctx.saved_tensors
        tanh = cells.tanh()
        h_before, c_before = shifted(o * tanh, initial_h), shifted(cells, initial_c)
        i, f, g, _ = (x + (h_before.flatten(1, 2) @ weight).view_as(x)).chunk(4, -1)
        i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
        # What a gradient of the cell does to a_i, a_f, a_g, and one of h to a_o and to the cell.
        from_cell = torch.cat((g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)), -1).unbind(1)
        slope = o * (1 - o)
        own, to_gate, to_cell = (dgates * slope).unbind(1), (tanh * slope).unbind(1), (o * (1 - tanh * tanh)).unbind(1)
        forget, dcells, back = f.unbind(1), dcells.unbind(1), weight.mT
        dh, dc, dx = torch.zeros_like(initial_h), torch.zeros_like(initial_c), []
        for t in range(x.shape[1] - 1, -1, -1):
            dc = dc + dcells[t] + dh * to_cell[t]
            dx.append(torch.cat((dc.repeat(1, 1, 3) * from_cell[t], own[t] + dh * to_gate[t]), -1))
            dh, dc = dx[-1] @ back, dc * forget[t]
        dx = torch.stack(dx[::-1], 1)
        return dx, h_before.flatten(1, 2).mT @ dx.flatten(1, 2), dh, dc


def lstm_chunked(
    x: Tensor, weight: Tensor, initial_h: Tensor, initial_c: Tensor, return_cells: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor | tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    dtype, total = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    rows = by_time(x.to(dtype), cu_seqlens)
    gates, cells = _Scan.apply(rows, weight.to(dtype).flatten(2), initial_h.transpose(0, 1), initial_c.transpose(0, 1))
    h = gates * cells.tanh()
    final = last_state(h, initial_h, cu_seqlens), last_state(cells, initial_c, cu_seqlens)
    outputs = tuple(by_sequence(y, cu_seqlens, total).to(x.dtype) for y in ((gates, cells) if return_cells else (h,)))
    return outputs if return_cells else outputs[0], final
