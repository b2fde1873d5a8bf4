"""What needles are hidden in: prose word by word, or a line of noise repeated, with what every unit costs in tokens."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence

import numpy as np

from .text import prose

__all__ = ["NOISE", "Haystack"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ABBREVIATIONS = frozenset(("Mr.", "Mrs.", "Ms.", "Dr.", "St.", "Esq.", "Messrs.", "No.", "Vol.", "etc.", "viz.", "i.e.", "e.g."))
SENTENCE_END = re.compile(r"[.!?][\"')]*$")
SENTENCE_START = re.compile(r"[\"'(]*[A-Z]")


_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Haystack:
    """A cycle of units (words of prose, or lines of noise) that contexts are cut from; `of` keeps one per tokenizer.

    Attributes:
        units: the words or lines.
        separator: what stands between two units: a space or a newline.
        sentences: sorted indices of the units that start a sentence.
    """

    def __init__(self, kind: str, split: str, tokenizer) -> None:
        if kind == "repeat":
            self.units, self.separator, starts = [NOISE], "\n", [0]
            one, two = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in (NOISE, f"{NOISE}\n{NOISE}"))
            costs = np.array([two - one])
        else:
            paragraphs = [p.split() for p in prose(split).splitlines()]
            self.units, self.separator = [word for p in paragraphs for word in p], " "
            starts = sentence_starts(paragraphs)
            costs = word_costs(paragraphs, tokenizer)
        self.sentences = np.array(starts)
        self._cost = np.concatenate([[0.0], np.cumsum(costs)])

    @classmethod
    def of(cls, kind: str, split: str, tokenizer) -> Haystack:
        """The haystack for this tokenizer, made at the first call (about a second for prose) and kept as long as the tokenizer is."""
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"needle documents need a fast tokenizer, {type(tokenizer).__name__} is not one")
        kept = _KEPT.setdefault(tokenizer, {})
        if (kind, split) not in kept:
            kept[kind, split] = cls(kind, split, tokenizer)
        return kept[kind, split]

    def draw(self, rng: np.random.Generator) -> int:
        """A random unit that starts a sentence."""
        return int(self.sentences[rng.integers(len(self.sentences))])

    def cost(self, start: int, units: int) -> float:
        """About how many tokens `units` units from `start` on take."""
        rounds, last = divmod(start + units, len(self.units))
        return rounds * self._cost[-1] + self._cost[last] - self._cost[start]

    def units_within(self, start: int, tokens: float) -> int:
        """About how many units from `start` on fit in `tokens` tokens."""
        rounds, rest = divmod(tokens + self._cost[start], self._cost[-1])
        return int(rounds) * len(self.units) + int(np.searchsorted(self._cost, rest, side="right")) - 1 - start

    def following(self, start: int, units: int, tokens: int) -> str:
        """What comes after `units` units from `start` on, at least `tokens` tokens of it."""
        return self.text((start + units) % len(self.units), tokens)

    def place(self, start: int, units: int, depth: float) -> int:
        """How many of `units` units from `start` on come before a needle at `depth`: the end of a sentence nearest to depth * units."""
        if len(self.units) == 1:
            return round(depth * units)
        target = start + depth * units
        rounds, rest = divmod(target, len(self.units))
        near = int(np.searchsorted(self.sentences, rest))
        ends = {0, units}
        for index in (near - 1, near):
            turn, index = divmod(index, len(self.sentences))
            ends.add(int((rounds + turn) * len(self.units) + self.sentences[index] - start))
        return min((end for end in sorted(ends) if 0 <= end <= units), key=lambda end: abs(end - depth * units))

    def text(self, start: int, units: int, inserts: Sequence[tuple[int, str]] = (), tail: str = "") -> str:
        """`units` units from `start` on and `tail` as text, with each (position, sentence) inserted before the unit at that position.

        What is inserted at the end comes after the tail.
        """
        count = len(self.units)
        chosen = self.units[start : start + units]
        if len(chosen) < units:
            rounds, rest = divmod(units - len(chosen), count)
            chosen = chosen + self.units * rounds + self.units[:rest]
        if tail:
            chosen = [*chosen, tail]
            inserts = [(position + (position == units), sentence) for position, sentence in inserts]
        parts, last = [], 0
        for position, sentence in sorted(inserts, key=lambda insert: insert[0]):
            parts += chosen[last:position]
            parts.append(sentence)
            last = position
        return self.separator.join(parts + chosen[last:])


def sentence_starts(paragraphs: list[list[str]]) -> list[int]:
    """Indices, counted through all paragraphs, of the words that start a sentence."""
    starts, index = [], 0
    for words in paragraphs:
        for position, word in enumerate(words):
            before = words[position - 1] if position else None
            if before is None or (
                SENTENCE_END.search(before) and before.lstrip("\"'(") not in ABBREVIATIONS and SENTENCE_START.match(word)
            ):
                starts.append(index + position)
        index += len(words)
    return starts


def word_costs(paragraphs: list[list[str]], tokenizer) -> np.ndarray:
    """Tokens that end within each word (or the space before it), as the tokenizer cuts each paragraph."""
    costs = []
    encodings = tokenizer.backend_tokenizer.encode_batch([" " + " ".join(words) for words in paragraphs], add_special_tokens=False)
    for words, encoding in zip(paragraphs, encodings):
        ends = np.cumsum([len(word) + 1 for word in words])  # one past each word's last character
        last = np.array([end for _, end in encoding.offsets], dtype=np.int64) - 1
        costs.append(np.bincount(np.searchsorted(ends, last, side="right").clip(0, len(words) - 1), minlength=len(words)))
    return np.concatenate(costs).astype(np.float64)
