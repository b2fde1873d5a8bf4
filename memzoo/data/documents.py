"""Needle documents to train on: prose with several needles, and questions with their answers at the end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .haystack import Haystack
from .niah import draw_needles, find_format, header

__all__ = ["NeedleDocuments", "needle_documents"]

IGNORED = -100


class NeedleDocuments:
    """An endless list of training documents of exactly `length` tokens; document i depends on the settings, the seed and i only.

    A document is the header, a piece of prose with `needles` needles at random depths, `restated` of them word for word once more, the
    answers to `queries - 1` others as sentences, one a line, and then one question and its answer in exactly the form that is scored;
    then the end-of-text token, and padding for what one more word would have overrun. The ids are what the tokenizer makes of the
    whole text.

    Args:
        tokenizer: a fast tokenizer with an end-of-text token.
        length: tokens a document.
        seed: another seed, other documents.
        task: "niah_single_1", "niah_single_2" or "niah_single_3".
        needles: needles in a document, each with a key of its own. Scored documents have one; several teach more a token.
        queries: how many of them are asked for, at least 1; all that are not restated if None.
        restated: how many of the others are stated again. In a needle the value is three tokens after the key, in an answer eight: it is
            the easier form of recall, which small models learn first and then carry over.
        loss: "answers" trains on the answers (value, full stop, end of text), "all" on every token but padding.
        split: part of the prose the haystack is cut from.
        value_digits, key_words: difficulty, see `draw_needles`; the defaults are RULER's.

    Raises:
        ValueError: an argument out of range, or a length too short for the template, with the shortest that works.
    """

    def __init__(
        self,
        tokenizer,
        length: int,
        seed: int = 0,
        *,
        task: str = "niah_single_2",
        needles: int = 4,
        queries: int | None = None,
        restated: int = 0,
        loss: str = "answers",
        split: str = "train",
        value_digits: int = 7,
        key_words: int = 2,
    ) -> None:
        if loss not in ("answers", "all"):
            raise ValueError(f"loss is {loss!r}, needs 'answers' or 'all'")
        queries = needles - restated if queries is None else queries
        if restated < 0 or queries < 1 or queries + restated > needles:
            raise ValueError(
                f"queries is {queries} and restated {restated}, needs queries >= 1 and both together <= needles ({needles})"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token, which needle documents end with")
        self.tokenizer, self.length, self.seed, self.task, self.loss = tokenizer, length, seed, task, loss
        self.needles, self.queries, self.restated = needles, queries, restated
        self.difficulty = {"value_digits": value_digits, "key_words": key_words}
        self.haystack = Haystack.of(find_format(task).haystack, split, tokenizer)
        self._pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._grain = max(8.0, self.haystack.cost(0, 1))  # tokens that padding may make up for without a second look
        # What a document costs without its haystack. Others may cost a little more or less; `__getitem__` settles that.
        self._frame = len(self._encode(*self._compose(0, 0.0))[0])
        if self._frame >= length:
            shortest = self._frame + int(np.ceil(self.haystack.cost(0, 1)))
            raise ValueError(
                f"{task}: length {length} is too short for {needles} needles and {queries + restated} answers, needs {shortest}"
            )

    def _compose(self, index: int, room: float) -> tuple[str, list[tuple[int, int]]]:
        """The text of document `index` with about `room` tokens of haystack, and where its answers are, in characters."""
        rng = np.random.default_rng([self.seed, index])
        needles = draw_needles(self.task, rng, self.needles, **self.difficulty)
        start, depths, order = self.haystack.draw(rng), rng.random(self.needles), rng.permutation(self.needles)
        units = self.haystack.units_within(start, room)
        inserts = [(self.haystack.place(start, units, depth), needle.sentence) for depth, needle in zip(depths, needles)]
        text = f"{header(self.task)}\n{self.haystack.text(start, units, inserts)}\n"
        asked = self.restated + self.queries
        answers = []
        for number, needle in enumerate(needles[i] for i in order[:asked]):
            if number < self.restated:
                text += needle.sentence.removesuffix(f" {needle.value}.")
            elif number < asked - 1:
                text += needle.prefix
            else:
                text += f"{needle.question} {needle.prefix}"
            answers.append((len(text), len(text) + len(needle.value) + 2))
            text += f" {needle.value}." + ("\n" if number < asked - 1 else "")
        return text, answers

    def _encode(self, text: str, answers: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Ids and labels of a text and the end-of-text token."""
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        ids = [*encoding.ids, self.tokenizer.eos_token_id]
        if self.loss == "all":
            return ids, list(ids)
        ends = np.array([end for _, end in encoding.offsets])
        labels = np.full(len(ids), IGNORED)
        labels[-1] = ids[-1]
        for first, last in answers:
            low, high = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="left")
            labels[low : high + 1] = ids[low : high + 1]
        return ids, labels.tolist()

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Document `index` (0 or more): input_ids and labels, both of `length`; labels are -100 where nothing is learned."""
        if index < 0:
            raise IndexError(f"document {index}: needs 0 or more")
        room, tried = float(self.length - self._frame), False
        while True:
            ids, labels = self._encode(*self._compose(index, room))
            spare = self.length - len(ids)
            if spare >= 0 and (tried or spare <= self._grain):
                break
            if spare < 0 and room <= 0:
                raise ValueError(f"{self.task}: length {self.length} is too short for document {index}, needs {len(ids)}")
            room, tried = max(room + spare, 0.0), True
        return {"input_ids": ids + [self._pad] * spare, "labels": labels + [IGNORED] * spare}

    def stream(self, start: int = 0) -> Iterator[dict[str, list[int]]]:
        """Documents from `start` on, without end: resume with the number of documents already seen."""
        while True:
            yield self[start]
            start += 1

    __iter__ = stream


def needle_documents(tokenizer, length: int, count: int, seed: int = 0, task: str = "niah_single_2", **settings):
    """The first `count` documents of `NeedleDocuments` as a `datasets.Dataset` with columns input_ids and labels, `length` tokens each.

    Arguments are those of `NeedleDocuments`. For an endless stream use `NeedleDocuments(...).stream(start)`.
    """
    from datasets import Dataset

    if count < 1:
        raise ValueError(f"count is {count}, needs 1 or more")
    documents = NeedleDocuments(tokenizer, length, seed, task=task, **settings)
    rows = [documents[index] for index in range(count)]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in ("input_ids", "labels")})
