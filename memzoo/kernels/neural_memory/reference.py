"""The definition of the neural memory: one sequence and one token at a time, the inner gradient taken by torch.func.grad."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class NeuralMemoryState(NamedTuple):
    """What a neural memory remembers between calls; every tensor leads with N, the number of sequences.

    weights: the running weights of each layer, [N, H, Din, Dout]. momentum: their momentum, same shapes. start: the weights at the start of
    the open chunk, same shapes. position: tokens already written in the open chunk, [N] of int64, from 0 to chunk_size - 1; where it is 0
    no chunk is open, the next starts from `weights`, and `start` is not read.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    position: Tensor


def read_memory(weights: tuple[Tensor, ...], x: Tensor, residual: bool) -> Tensor:
    """M(x), an MLP with GELU between its layers, for rows x [..., H, T, Din] and weights [..., H, Din, Dout]."""
    y = x @ weights[0]
    for weight in weights[1:]:
        y = F.gelu(y) @ weight
    return x + y if residual else y


def inner_loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor, residual: bool, loss: str) -> Tensor:
    """What one write descends, summed over heads: `1/2 ||M(k) - v||^2` ("l2") or `-<M(k), v>` ("dot"), for k [H, D] and v [H, Dv]."""
    read = read_memory(weights, k[:, None], residual)[:, 0]
    return -(read * v).sum() if loss == "dot" else 0.5 * (read - v).square().sum()


def neural_memory_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    weights: tuple[Tensor, ...],
    chunk_size: int,
    residual: bool,
    loss: str,
    max_grad_norm: float | None,
    initial_state: NeuralMemoryState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, NeuralMemoryState | None]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens is None:
        rows = [(n, slice(None)) for n in range(q.shape[0])]
    else:
        rows = [(0, slice(a, b)) for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
    outputs, states = [], []
    for n, (row, tokens) in enumerate(rows):
        running = tuple(w.to(dtype) for w in weights)  # M_0
        surprise = tuple(torch.zeros_like(w) for w in running)  # S_0
        start, position = running, 0
        if initial_state is not None:
            running, surprise, start = (tuple(w[n] for w in part) for part in initial_state[:3])
            position = int(initial_state.position[n])
        for t in range(q.shape[1])[tokens]:
            query, key, value = (x[row, t].to(dtype) for x in (q, k, v))  # [H, D]
            theta, eta, alpha = (x[row, t].to(dtype)[:, None, None] for x in (lr, momentum, decay))
            if position == 0:
                start = running
            grads = torch.func.grad(inner_loss)(start, key, value, residual, loss)
            if max_grad_norm is not None:
                squares = sum(g.square().sum((-2, -1), keepdim=True) for g in grads)
                theta = theta * max_grad_norm * squares.clamp(min=max_grad_norm**2).rsqrt()  # theta min(1, max / norm)
            surprise = tuple(eta * s - theta * g for s, g in zip(surprise, grads))
            running = tuple((1 - alpha) * w + s for w, s in zip(running, surprise))
            outputs.append(read_memory(running, query[:, None], residual)[:, 0])
            position = (position + 1) % chunk_size
        states.append((running, surprise, start if position else running, position))
    final = None
    if output_final_state:
        parts = [tuple(torch.stack(layer) for layer in zip(*(state[i] for state in states))) for i in range(3)]
        final = NeuralMemoryState(*parts, torch.tensor([state[3] for state in states], device=q.device))
    return torch.stack(outputs).view_as(v).to(q.dtype), final
