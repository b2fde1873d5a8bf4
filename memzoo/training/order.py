"""The order of training examples as a function of (seed, step, process), so that a resumed run reads on exactly where it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class Order:
    """An endless stream of example indices: every epoch is its own permutation of all examples, drawn from (seed, epoch)."""

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._epoch, self._permutation = -1, None

    def __getitem__(self, position: int) -> int:
        """The example at a position of the stream, counted from the run's start."""
        epoch, offset = divmod(position, self.size)
        if not self.shuffle:
            return offset
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.size, generator=generator)
            self._epoch = epoch
        return int(self._permutation[offset])


class BatchSampler:
    """The index lists that one process reads: step by step, and in a step one list for each of its forwards.

    The examples of a step are the same whatever the number of processes, as long as processes x forwards x batch is.
    """

    def __init__(self, order: Order, start: int, stop: int, batch: int, forwards: int = 1, rank: int = 0, processes: int = 1):
        self.order, self.start, self.stop = order, start, stop
        self.batch, self.forwards, self.rank, self.processes = batch, forwards, rank, processes

    def __len__(self) -> int:
        return (self.stop - self.start) * self.forwards

    def __iter__(self) -> Iterator[list[int]]:
        for forward in range(self.start * self.forwards, self.stop * self.forwards):
            first = (forward * self.processes + self.rank) * self.batch
            yield [self.order[first + i] for i in range(self.batch)]
