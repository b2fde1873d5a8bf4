"""The examples of a run, and how they become the batches of each process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .order import BatchSampler, Order
from .settings import Settings


@dataclasses.dataclass
class Data:
    """Examples and how to batch them. `endless` examples are generated: each is seen once, in order."""

    train: Dataset
    evaluation: Dataset | None
    collate: Callable[[list[Any]], dict[str, Any]]
    endless: bool
    about: str

    def train_loader(self, settings: Settings, start: int, rank: int, processes: int) -> DataLoader:
        """This process's batches from optimizer step `start` on, `gradient_accumulation` of them a step."""
        order = Order(len(self.train), settings.seed, shuffle=not self.endless)
        sampler = BatchSampler(order, start, settings.steps, settings.batch_size, settings.gradient_accumulation, rank, processes)
        return self._loader(self.train, sampler, settings.workers)

    def evaluation_loader(self, settings: Settings, rank: int, processes: int) -> tuple[DataLoader, int]:
        """Batches of held-out examples, as many in every process, and how many of them count: each example in one process only."""
        count = min(len(self.evaluation), settings.eval_examples)

        def share(rank: int) -> list[list[int]]:
            mine = range(rank, count, processes)
            return [list(mine[i : i + settings.batch_size]) for i in range(0, len(mine), settings.batch_size)]

        mine = share(rank)
        return self._loader(self.evaluation, mine + [[0]] * (len(share(0)) - len(mine)), 0), len(mine)

    def _loader(self, examples: Dataset, batches: Any, workers: int) -> DataLoader:
        return DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: the global generator's state stays that of the model
        )
