"""The training and evaluation examples of a run, whatever they come from, and how examples become a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from .errors import BadInput
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


def load_data(settings: Settings, tokenizer: Any) -> Data:
    """The data that `--dataset` names; raises BadInput if it is missing, empty, or too short for one sequence."""
    if settings.dataset == "needles":
        from .needles import load_needles

        return load_needles(settings, tokenizer)
    if settings.needles or settings.text_loss:
        raise BadInput("--needles and --text_loss are for --dataset needles")
    return _load_text(settings, tokenizer)


def _load_text(settings: Settings, tokenizer: Any) -> Data:
    from .text import MANY_DOCUMENTS, Blocks, collate_apart, collate_concat, load_documents, tokenize

    def blocks(documents: Any, name: str) -> Blocks:
        out = Blocks(tokenize(documents, tokenizer, settings.length, settings.workers), settings.length)
        if not len(out):
            raise BadInput(f"--dataset {name}: has {out.tokens} tokens, needs at least one sequence of {settings.length}")
        return out

    documents = load_documents(settings.dataset, config=settings.dataset_config, split=settings.split, column=settings.text_column)
    count = len(documents)
    evaluation = None
    if settings.eval_dataset:
        held_out = load_documents(settings.eval_dataset, split=settings.split, column=settings.text_column)
        evaluation = blocks(held_out, settings.eval_dataset)
    elif settings.eval_fraction and count >= MANY_DOCUMENTS:
        parts = documents.train_test_split(test_size=settings.eval_fraction, seed=settings.seed)
        documents, evaluation = parts["train"], blocks(parts["test"], settings.dataset + " (the part held out)")
    train: Dataset = blocks(documents, settings.dataset)
    tokens = train.tokens
    if evaluation is None and settings.eval_fraction:
        kept = len(train) - max(1, round(len(train) * settings.eval_fraction))
        if not kept:
            raise BadInput(
                f"--dataset {settings.dataset}: has {tokens} tokens, one sequence of {settings.length}; "
                "nothing is left to hold out: --eval_fraction 0"
            )
        train, evaluation = Subset(train, range(kept)), Subset(train, range(kept, len(train)))
    return Data(
        train,
        evaluation,
        collate_apart if settings.packing == "apart" else collate_concat,
        endless=False,
        about=f"{settings.dataset}: {count:,} documents, {tokens:,} tokens, {len(train):,} sequences of {settings.length}",
    )
