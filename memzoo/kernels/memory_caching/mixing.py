"""Mixing what the online memory and the cached ones give: gates from scores, and reads of many memories one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Weights = tuple[Tensor, ...]
Read = Callable[[Weights, Tensor], Tensor]


def gates(online: Tensor, cached: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """(gate of the online memory [n, T, H], gates of the cached ones [n, T, H, S]): one softmax over both (Eq. 8 to 10, 16, 17).

    Args:
        online: scores of the open segment, [n, T, H].
        cached: scores of the cached memories, [n, T, H, S]; -inf where unread.
        top_k: cached memories that a token reads, those of the highest scores; None for all.
    """
    if top_k is not None and cached.shape[-1] > top_k:
        chosen = torch.zeros_like(cached, dtype=torch.bool).scatter_(-1, highest(cached, top_k), True)
        cached = cached.masked_fill(~chosen, -torch.inf)
    both = torch.cat((online[..., None], cached), -1).softmax(-1)
    return both[..., 0], both[..., 1:]


def highest(scores: Tensor, top_k: int) -> Tensor:
    """Places of the `top_k` highest scores, [..., top_k]; of equal ones the earlier comes first."""
    return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def pick(bank: Tensor, slots: Tensor) -> Tensor:
    """The memories in `slots` [n, H, K] of a cache [n, S, H, ...], [n, K, H, ...]; the cache may lie on another device than the slots."""
    at = slots.transpose(1, 2).to(bank.device)
    rows = torch.arange(bank.shape[0], device=bank.device)[:, None, None]
    return bank[rows, at, torch.arange(bank.shape[2], device=bank.device)].to(slots.device)


def read_each(read: Read, q: Tensor, gate: Tensor, cached: Weights, readers: list[int]) -> Tensor | float:
    """`sum_i gate_i read(cached_i, q)` [n, H, T, Dv] for queries q [n, H, T, D], gates [n, T, H, S] and memories [n, S, H, ...].

    One memory at a time, and only for the tokens that may read it; the reads are made again in the backward, never held for all memories.
    """

    def gated(rows: Tensor, share: Tensor, *weights: Tensor) -> Tensor:
        return share * read(weights, rows)

    gate, total = gate.transpose(1, 2), 0.0
    for i, start in enumerate(readers):
        if start < q.shape[2]:
            arguments = (q[:, :, start:], gate[:, :, start:, i, None], *(part[:, i] for part in cached))
            y = checkpoint(gated, *arguments, use_reentrant=False) if torch.is_grad_enabled() else gated(*arguments)
            total = total + torch.nn.functional.pad(y, (0, 0, start, 0))
    return total


def read_matrices(q: Tensor, gate: Tensor, bank: Tensor, readers: list[int]) -> Tensor:
    """The same for matrices [n, S, H, D, Dv], whose gates may go to the queries instead: sum_i (gate_i q) M_i."""
    if q.shape[2] == 1:
        reads = (q[:, None] @ bank)[..., 0, :]  # [n, S, H, Dv]
        return (reads * gate[:, 0].transpose(1, 2)[..., None]).sum(1)[:, :, None]
    return _LinearReads.apply(q, gate.transpose(1, 2), bank, tuple(readers))


class _LinearReads(torch.autograd.Function):
    """sum_i (gate_i q) M_i for q [n, H, T, D], gates [n, H, T, S], M [n, S, H, D, Dv]; holds no product."""

    @staticmethod
    def forward(ctx, q: Tensor, gate: Tensor, bank: Tensor, readers: tuple[int, ...]) -> Tensor:
        y = q.new_zeros(*q.shape[:3], bank.shape[-1])
        for i, start in enumerate(readers):
            if start < q.shape[2]:
                y[:, :, start:] += (gate[:, :, start:, i, None] * q[:, :, start:]) @ bank[:, i]
        ctx.save_for_backward(q, gate, bank)
        ctx.readers = readers
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, gate, bank = ctx.saved_tensors
        dq, dgate, dbank = torch.zeros_like(q), torch.zeros_like(gate), torch.zeros_like(bank)
        for i, start in enumerate(ctx.readers):
            if start >= q.shape[2]:
                continue
            rows, share, dy = q[:, :, start:], gate[:, :, start:, i, None], grad[:, :, start:]
            back = dy @ bank[:, i].mT
            dq[:, :, start:] += share * back
            dgate[:, :, start:, i] = (back * rows).sum(-1)
            dbank[:, i] = (share * rows).mT @ dy
        return dq, dgate, dbank, None
