"""The writes of neural memories to a cache, segments in parallel, in plain torch or with the online memory on Triton's kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory_caching.mixing import Weights, read_each
from ..memory_caching.state import Pieces, map_tensors, rows_of
from ..neural_memory import NeuralMemoryState, neural_memory, read_memory
from ..neural_memory.chunked import neural_memory_chunked


@dataclass(frozen=True)
class NeuralWrites:
    """Gradient steps on a matrix or an MLP (Eq. 30 to 36); see `neural_memory` for the tensors and options."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor
    decay: Tensor
    initial: Weights
    start: NeuralMemoryState | None  # of one sequence, what a segment starts from instead of `initial`
    options: tuple[int, bool, str, float | None]  # chunk size, residual, loss, clamp
    implementation: str
    top_k: int | None  # with sparse reads
    linear = False

    def select(self, group, packed: bool) -> NeuralWrites:
        names = ("q", "k", "v", "lr", "momentum", "decay")
        return replace(self, **{name: rows_of(getattr(self, name), group, packed) for name in names})

    def fresh(self, count: int) -> NeuralMemoryState:
        if self.start is not None:
            return map_tensors(self.start, lambda x: x.expand(count, *x.shape[1:]))
        weights = tuple(w.expand(count, *w.shape) for w in self.initial)
        zeros = tuple(torch.zeros_like(w) for w in weights)
        return NeuralMemoryState(weights, zeros, weights, torch.zeros(count, dtype=torch.int64, device=self.q.device))

    def weights(self, memory: NeuralMemoryState) -> Weights:
        return memory.weights

    def after(self, state) -> NeuralWrites:
        return self

    def next_segment(self, memory: NeuralMemoryState) -> NeuralMemoryState:
        """Weights and momentum go on; a segment begins a chunk."""
        return NeuralMemoryState(memory.weights, memory.momentum, memory.weights, torch.zeros_like(memory.position))

    def before(self, count: int) -> None:
        return None

    def previous(self, pieces: Pieces, restart: bool) -> None:
        return None

    def run(self, pieces: Pieces, memory: NeuralMemoryState, restart: bool, mix=None) -> tuple[Tensor, Weights, NeuralMemoryState]:
        outputs, finals = [], None
        for which in pieces.runs() if restart else [slice(j, j + 1) for j in range(len(pieces))]:
            held = memory if which.start == 0 and (pieces.first or not restart) else None
            if which.start and not restart:
                held = self.next_segment(memory)
            y, ends, memory = self._pieces(pieces, which, held, mix, finals)
            outputs.append(y)
            finals = ends if finals is None else tuple(torch.cat(parts, 1) for parts in zip(finals, ends))
        return torch.cat(outputs, 1), finals, memory

    def _pieces(self, pieces: Pieces, which: slice, held: NeuralMemoryState | None, mix, finals: Weights | None):
        """Pieces of one size, all at once as a batch; the first goes on from `held`, without it all start anew."""
        rows, count = self.q.shape[0], which.stop - which.start
        start, size = pieces.starts[which.start], pieces.sizes[which.start]
        span = slice(start, start + count * size)
        tokens = [
            x[:, span].unflatten(1, (count, size)).flatten(0, 1)
            for x in (self.q, self.k, self.v, self.lr, self.momentum, self.decay)
        ]
        initial = held
        if held is None and self.start is not None:
            initial = self.fresh(rows * count)
        elif held is not None and count > 1:
            initial = _interleave(held, self.fresh(rows * (count - 1)), count)
        if mix is None:
            chunk_size, residual, loss, clamp = self.options
            y, last = neural_memory(
                *tokens, self.initial, chunk_size=chunk_size, residual=residual, loss=loss, max_grad_norm=clamp, initial_state=initial,
                output_final_state=True, implementation=self.implementation,
            )  # fmt: skip
        else:
            offset = start + size * torch.arange(count, device=self.q.device)[:, None]

            def mixed(layer: int, rows_in: Tensor, read: Tensor, after: Weights, at: Tensor) -> Tensor:
                rows_in, read, at = (x.unflatten(0, (rows, count)) for x in (rows_in, read, at))
                known = finals
                if count > 1:
                    known = tuple(w.unflatten(0, (rows, count)) for w in after)
                    known = known if finals is None else tuple(torch.cat(parts, 1) for parts in zip(finals, known))
                return mix(layer, rows_in, read, known, which, at + offset).flatten(0, 1)

            y, last = neural_memory_chunked(*tokens, self.initial, *self.options, initial, True, None, mixed)
        y = y.reshape(rows, count * size, *y.shape[2:])
        last = map_tensors(last, lambda x: x.unflatten(0, (rows, count)))
        return y, last.weights, map_tensors(last, lambda x: x[:, -1])

    def read_cached(self, gate: Tensor, bank: Weights, readers: list[int]) -> Tensor:
        if self.implementation == "triton" and self.top_k is not None and gate.shape[-1] > self.top_k:
            return self._read_chosen(gate, bank)

        def read(weights: Weights, rows: Tensor) -> Tensor:
            return read_memory(weights, rows, self.options[1])

        return read_each(read, self.q.transpose(1, 2), gate, bank, readers).transpose(1, 2)

    def _read_chosen(self, gate: Tensor, bank: Weights) -> Tensor:
        """Sparse reads on Triton: all tokens that chose a memory read each of its layers together."""
        from ..memory_caching.grouped import group_choices, grouped_read  # only here: no Triton where it is not used

        rows, slots = gate.shape[0], gate.shape[-1]
        share, slot = gate.topk(self.top_k, -1)
        ids = slot + slots * torch.arange(rows, device=slot.device)[:, None, None, None]
        ids = torch.where(share > 0, ids, -1).flatten(0, 1)[None].contiguous()
        groups = group_choices(ids, rows * slots)
        q = self.q.flatten(0, 1)[None].contiguous()
        y = grouped_read(q, ids, bank[0].flatten(0, 1).contiguous(), groups)
        for weight in bank[1:]:
            y = grouped_read(F.gelu(y), ids, weight.flatten(0, 1).contiguous(), groups)
        if self.options[1]:
            y = y + q[:, :, :, None]
        return (y[0].unflatten(0, (rows, -1)) * share[..., None]).sum(3)


def _interleave(first: Any, others: Any, count: int) -> Any:
    """States of `count` pieces a row, from those of the first pieces [n, ...] and of the others [n (count - 1), ...]."""
    if isinstance(first, Tensor):
        return torch.cat((first[:, None], others.unflatten(0, (len(first), count - 1))), 1).flatten(0, 1)
    parts = (_interleave(a, b, count) for a, b in zip(first, others))
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
