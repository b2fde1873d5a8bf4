"""Vectors as memories of a cache: all that is written is known, and a read of all of them is one product with the gates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..memory_caching.mixing import Weights
from ..memory_caching.state import Pieces, rows_of


@dataclass(frozen=True)
class VectorWrites:
    """The states h [n, T, H, D] after every token."""

    h: Tensor
    q: None = None
    linear = True

    def select(self, group, packed: bool) -> VectorWrites:
        return replace(self, h=rows_of(self.h, group, packed))

    def fresh(self, count: int) -> Tensor:
        return self.h.new_zeros(count, *self.h.shape[2:])

    def weights(self, memory: Tensor) -> Weights:
        return (memory,)

    def after(self, state) -> VectorWrites:
        return self

    def next_segment(self, memory: Tensor) -> Tensor:
        return memory

    def before(self, count: int) -> None:
        return None

    def previous(self, pieces: Pieces, restart: bool) -> None:
        return None

    def run(self, pieces: Pieces, memory: Tensor, restart: bool, mix=None) -> tuple[Tensor, Weights, Tensor]:
        ends = [start + size - 1 for start, size in zip(pieces.starts, pieces.sizes)]
        return self.h, (self.h[:, ends],), self.h[:, -1]

    def read_cached(self, gate: Tensor, bank: Weights, readers: list[int]) -> Tensor:
        return (gate.transpose(1, 2) @ bank[0].transpose(1, 2)).transpose(1, 2)
