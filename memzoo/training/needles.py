"""Needle-in-a-haystack documents as training data: generated as they are read, each seen once, the loss on the answers."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.utils.data import Dataset

from memzoo.data import NeedleDocuments

from .batches import Data
from .errors import BadInput, close_names, refusing
from .loss import IGNORED
from .settings import Settings

EVALUATION_SEED = 1_000_003  # added to the run's seed: held-out documents, of the prose's other split


class NeedleExamples(Dataset):
    """`count` documents of the generator: `input_ids`, `labels` and `loss_weights`, each of `length`.

    An answer's tokens have the weight 1, the haystack's `text_loss`, padding 0.
    """

    def __init__(self, documents: NeedleDocuments, count: int, text_loss: float):
        self.documents, self.count, self.text_loss = documents, count, text_loss

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        document = self.documents[index]
        ids, labels = torch.tensor(document["input_ids"]), torch.tensor(document["labels"])
        answers = labels != IGNORED
        weights = answers.float()
        if self.text_loss:
            end = int(answers.nonzero()[-1]) + 1  # padding follows the last answer
            weights[:end].masked_fill_(~answers[:end], self.text_loss)
        return {"input_ids": ids, "labels": ids, "loss_weights": weights}


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length. No mask is needed: padding is on the right, where a causal model's answers cannot see it."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def load_needles(settings: Settings, tokenizer) -> Data:
    """The documents that `--needles` describes; raises BadInput for an option that does not exist or does not fit."""
    known = set(inspect.signature(NeedleDocuments).parameters) - {"tokenizer", "length", "seed", "loss"}
    for name in settings.needles:
        if name not in known:
            raise BadInput(f"--needles {name}: there is no such option{close_names(name, known)}")
    with refusing("--needles"):
        train = NeedleDocuments(tokenizer, settings.length, settings.seed, loss="answers", **settings.needles)
        held_out = {**settings.needles, "split": "test"}
        test = NeedleDocuments(tokenizer, settings.length, settings.seed + EVALUATION_SEED, loss="answers", **held_out)
    return Data(
        NeedleExamples(train, 2**62, settings.text_loss),
        NeedleExamples(test, settings.eval_examples, settings.text_loss) if settings.eval_fraction else None,
        collate,
        endless=True,
        about=f"{train.task} documents of {settings.length} tokens, needles: {_range(train.needles)}, questions: {train.queries} at most",
    )


def _range(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"
