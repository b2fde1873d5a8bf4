"""The training and evaluation examples that a run's settings name, whatever they come from."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset, Subset

from .batches import Data
from .errors import BadInput
from .needles import load_needles
from .settings import Settings

__all__ = ["Data", "load_data"]


def load_data(settings: Settings, tokenizer: Any) -> Data:
    """The data that `--dataset` names; raises BadInput if it is missing, empty, or too short for one sequence."""
    if settings.dataset == "needles":
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
