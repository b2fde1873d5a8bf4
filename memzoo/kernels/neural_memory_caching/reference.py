"""The neural memory as the definition of memory caching takes one: written by one token's inner gradient, read as an MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory_caching.reference import Memory, Weights
from ..memory_caching.state import map_tensors
from ..neural_memory import NeuralMemoryState, read_memory
from ..neural_memory.reference import neural_memory_reference


def cached_neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    initial: Weights,
    start: NeuralMemoryState | None,
    options: tuple[int, bool, str, float | None],
) -> Memory:
    def fresh() -> NeuralMemoryState:
        if start is not None:
            return start
        weights = tuple(w[None] for w in initial)
        position = torch.zeros(1, dtype=torch.int64, device=q.device)
        return NeuralMemoryState(weights, tuple(torch.zeros_like(w) for w in weights), weights, position)

    def write(state: NeuralMemoryState, previous: None, row: int, t: int) -> NeuralMemoryState:
        token = (x[row : row + 1, t : t + 1] for x in (q, k, v, lr, momentum, decay))
        return neural_memory_reference(*token, initial, *options, state, True, None)[1]

    return Memory(
        fresh=fresh,
        write=write,
        weights=lambda state: state.weights,
        read=lambda weights, row, t: read_memory(weights, q[row, t][None, :, None], options[1])[:, :, 0],
        carry=lambda state: NeuralMemoryState(
            state.weights, state.momentum, state.weights, map_tensors(state.position, torch.zeros_like)
        ),
        linear=False,
    )
