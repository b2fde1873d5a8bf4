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

    A document is the header, a piece of prose with needles at random depths, the answers to all questions but one as sentences, one a
    line, and then one question and its answer in exactly the form that is scored; then the end-of-text token, and padding for what one
    more word would have overrun. The ids are what the tokenizer makes of the whole text.

    Args:
        tokenizer: a fast tokenizer with an end-of-text token.
        length: tokens a document.
        seed: another seed, other documents.
        task: "niah_single_1", "niah_single_2" or "niah_single_3".
        needles: needles in a document, each with a key of its own, or a pair (fewest, most) of which every document draws its number.
            Scored documents have one. Documents with one are learned far sooner, as any number in them is the answer; documents with
            several teach to match keys and hold more answers a token.
        queries: how many of a document's needles are asked for at most; all if None.
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
        needles: int | tuple[int, int] = (1, 4),
        queries: int | None = None,
        loss: str = "answers",
        split: str = "train",
        value_digits: int = 7,
        key_words: int = 2,
    ) -> None:
        if loss not in ("answers", "all"):
            raise ValueError(f"loss is {loss!r}, needs 'answers' or 'all'")
        fewest, most = (needles, needles) if isinstance(needles, int) else needles
        if not 1 <= fewest <= most:
            raise ValueError(f"needles is {needles}, needs a number from 1 on, or a pair of them with the smaller first")
        if queries is not None and not 1 <= queries <= most:
            raise ValueError(f"queries is {queries}, needs 1 to the number of needles ({most})")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token, which needle documents end with")
        form = find_format(task)
        if form.keys * form.answers > 1 or form.haystack == "needle":
            raise ValueError(f"{task} has no training documents, needs niah_single_1, niah_single_2 or niah_single_3")
        self.tokenizer, self.length, self.seed, self.task, self.loss = tokenizer, length, seed, task, loss
        self.needles, self.queries = (fewest, most), most if queries is None else queries
        self.difficulty = {"value_digits": value_digits, "key_words": key_words}
        self.haystack = Haystack.of(form.haystack, split, tokenizer)
        self._pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._grain = max(8.0, self.haystack.cost(0, 1))  # tokens that padding may make up for without a second look
        # What a document with so many needles costs without its haystack; one may cost a little more or less, `__getitem__` settles that.
        self._frames = {count: len(self._encode(*self._compose(0, 0.0, count))[0]) for count in range(fewest, most + 1)}
        if self._frames[most] >= length:
            shortest = self._frames[most] + int(np.ceil(self.haystack.cost(0, 1)))
            raise ValueError(
                f"{task}: length {length} is too short for {most} needles and {self.queries} queries, needs {shortest}"
            )

    def _compose(self, index: int, spare: float, count: int | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The text of document `index` with haystack for its length and `spare` tokens more, and where its answers are, in characters.

        With `count` it has that many needles and `spare` tokens of haystack in all.
        """
        rng = np.random.default_rng([self.seed, index])
        drawn = int(rng.integers(self.needles[0], self.needles[1] + 1))
        room = spare if count else spare + self.length - self._frames[drawn]
        count = count or drawn
        needles = draw_needles(self.task, rng, count, **self.difficulty)
        start, depths, order = self.haystack.draw(rng), rng.random(count), rng.permutation(count)
        units = self.haystack.units_within(start, max(room, 0.0))
        inserts = [(self.haystack.place(start, units, depth), needle.sentence) for depth, needle in zip(depths, needles)]
        text = f"{header(self.task)}\n{self.haystack.text(start, units, inserts)}\n"
        asked = [needles[i] for i in order[: self.queries]]
        answers = []
        for needle in asked:
            text += f"{needle.question} {needle.prefix}" if needle is asked[-1] else needle.prefix
            answers.append((len(text), len(text) + len(needle.value) + 2))
            text += f" {needle.value}." + ("" if needle is asked[-1] else "\n")
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
        more, tried = 0.0, False
        while True:
            ids, labels = self._encode(*self._compose(index, more))
            spare = self.length - len(ids)
            if spare >= 0 and (tried or spare <= self._grain):
                break
            if more < -self.length:
                raise ValueError(f"{self.task}: length {self.length} is too short for document {index}, needs {len(ids)}")
            more, tried = more + spare, True
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
