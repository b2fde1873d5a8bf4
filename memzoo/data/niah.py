"""Needles in a haystack in the formats of RULER (Hsieh et al. 2024): one scored sample, or a grid of them.

Three tasks: `niah_single_1` hides a number in a line of noise said again and again, `niah_single_2` hides it in prose,
`niah_single_3` hides a UUID in prose. Header, needle, question and the start of the answer are RULER's words, as lm-eval has them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .haystack import Haystack
from .words import ADJECTIVES, NOUNS

__all__ = ["FORMATS", "Needle", "draw_needles", "make_sample", "needle_samples", "prompt", "score"]

HEADER = (
    "A special magic {singular} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {singular} afterwards."
)
NEEDLE = "One of the special magic {plural} for {key} is: {value}."
QUESTION = "What is the special magic {singular} for {key} mentioned in the provided text?"
PREFIX = "The special magic {singular} for {key} mentioned in the provided text is"

MAX_DIGITS = 14


@dataclass(frozen=True)
class Format:
    """What a task hides and where: kind of haystack, kind of value, tokens kept free for the answer with any usual tokenizer."""

    haystack: str
    values: str
    answer_tokens: int


FORMATS = {
    "niah_single_1": Format("repeat", "numbers", 16),
    "niah_single_2": Format("essay", "numbers", 16),
    "niah_single_3": Format("essay", "uuids", 48),
}


@dataclass(frozen=True)
class Needle:
    """One key and its value, and the sentences about them (`values` is "numbers" or "uuids")."""

    key: str
    value: str
    values: str

    def _fill(self, template: str) -> str:
        return template.format(plural=self.values, singular=self.values[:-1], key=self.key, value=self.value)

    @property
    def sentence(self) -> str:
        """The sentence that is hidden."""
        return self._fill(NEEDLE)

    @property
    def question(self) -> str:
        return self._fill(QUESTION)

    @property
    def prefix(self) -> str:
        """The start of the answer; the value follows after a space."""
        return self._fill(PREFIX)


def find_format(task: str) -> Format:
    """The format of a task; ValueError with the names there are for one that does not exist."""
    if task not in FORMATS:
        raise ValueError(f"unknown needle task {task!r}, needs one of {', '.join(FORMATS)}")
    return FORMATS[task]


def draw_needles(
    task: str, rng: np.random.Generator, count: int = 1, *, value_digits: int = 7, key_words: int = 2, avoid: str = ""
) -> list[Needle]:
    """Draw `count` needles with different keys and different values, none of which is a part of `avoid`.

    Args:
        task: a name in FORMATS.
        rng: where the randomness comes from.
        value_digits: digits of a number, 1 to 14 (RULER: 7). Fewer are easier to learn.
        key_words: 2 for keys like "brave-tiger" (RULER's kind), 1 for keys like "tiger".
        avoid: text that must not hold a value.

    Raises:
        ValueError: an unknown task, or difficulty out of range.
    """
    values = find_format(task).values
    if not 1 <= value_digits <= MAX_DIGITS:
        raise ValueError(f"value_digits is {value_digits}, needs 1 to {MAX_DIGITS}")
    if key_words not in (1, 2):
        raise ValueError(f"key_words is {key_words}, needs 1 or 2")
    possible = min(len(NOUNS) * (len(ADJECTIVES) if key_words == 2 else 1), 9 * 10 ** (value_digits - 1))
    if not 1 <= count <= possible // 2:
        raise ValueError(
            f"{count} needles do not fit value_digits={value_digits} and key_words={key_words}: 1 to {possible // 2} do"
        )
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for _ in range(1000 * count):
        key = NOUNS[rng.integers(len(NOUNS))]
        if key_words == 2:
            key = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{key}"
        if values == "uuids":
            value = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        else:
            value = str(rng.integers(10 ** (value_digits - 1), 10**value_digits))
        if key in keys or value in taken or value in avoid:
            continue
        keys[key] = value
        taken.add(value)
        if len(keys) == count:
            return [Needle(key, value, values) for key, value in keys.items()]
    raise ValueError(f"no {value_digits}-digit values are left that the haystack does not hold")


def header(task: str) -> str:
    """The lines before the haystack."""
    return HEADER.format(singular=find_format(task).values[:-1])


def prompt(needle: Needle, context: str) -> str:
    """The input of a sample: header, haystack with the needle in it, question. The answer's prefix follows after a space."""
    return f"{HEADER.format(singular=needle.values[:-1])}\n{context}\n{needle.question}"


def _largest_fit(measure: Callable[[int], int], guess: int, limit: int) -> int:
    """The largest n >= 1 with measure(n) <= limit, where measure grows with n and measure(1) <= limit, looked for near `guess`."""
    low, step = max(guess, 1), 1
    while low > 1 and measure(low) > limit:
        low, step = max(low - step, 1), 2 * step
    high, step = low + 1, 1
    while measure(high) <= limit:
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(middle) <= limit else (low, middle)
    return low


def make_sample(
    task: str,
    tokenizer,
    length: int,
    depth: float,
    rng: np.random.Generator,
    *,
    value_digits: int = 7,
    key_words: int = 2,
    split: str = "test",
    answer_tokens: int | None = None,
) -> dict:
    """One sample of at most `length` tokens with its needle at `depth`.

    Args:
        task: "niah_single_1", "niah_single_2" or "niah_single_3".
        tokenizer: a fast tokenizer.
        length: tokens of prompt, answer's prefix and answer together.
        depth: share of the haystack before the needle, 0 to 1; the needle goes to the nearest end of a sentence.
        rng: where the randomness comes from.
        value_digits, key_words: difficulty, see `draw_needles`; the defaults are RULER's.
        split: which part of the prose.
        answer_tokens: tokens of `length` kept free for the answer; 16 for numbers and 48 for UUIDs if None.

    Returns:
        input (prompt without the answer's prefix), gen_prefix, outputs (list with the value), length (as asked), tokens (prompt and
        prefix, as counted), depth (as asked), key, value. The real length is within one word (or one line of noise) of `length`.

    Raises:
        ValueError: an unknown task, a depth outside 0 to 1, a difficulty out of range, or a length too short for the template, with
            the shortest that works.
    """
    form = find_format(task)
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}, needs 0 to 1")
    reserve = form.answer_tokens if answer_tokens is None else answer_tokens
    haystack = Haystack.of(form.haystack, split, tokenizer)
    start = haystack.draw(rng)
    budget = length - reserve
    reach = max(haystack.units_within(start, max(budget, 0)), 1)
    needle = draw_needles(
        task,
        rng,
        value_digits=value_digits,
        key_words=key_words,
        avoid=haystack.text(start, reach) if form.haystack == "essay" else "",
    )[0]

    def build(units: int) -> str:
        return prompt(needle, haystack.text(start, units, [(haystack.place(start, units, depth), needle.sentence)]))

    @cache
    def measure(units: int) -> int:
        return len(tokenizer(f"{build(units)} {needle.prefix}").input_ids)

    shortest = measure(1)
    if shortest > budget:
        raise ValueError(f"{task}: length {length} is too short for the template, needs at least {shortest + reserve}")
    units = _largest_fit(measure, haystack.units_within(start, budget - shortest), budget)
    return {
        "input": build(units),
        "gen_prefix": needle.prefix,
        "outputs": [needle.value],
        "length": length,
        "tokens": measure(units),
        "depth": float(depth),
        "key": needle.key,
        "value": needle.value,
    }


def needle_samples(
    task: str,
    tokenizer,
    lengths: Sequence[int] = (512,),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 10,
    seed: int = 0,
    **difficulty,
) -> Iterator[dict]:
    """`samples` samples for every length and depth. A sample depends on the seed, its cell and its number only, not on the grid."""
    if samples < 1 or not lengths or not depths:
        raise ValueError(f"no samples to make: lengths {list(lengths)}, depths {list(depths)}, samples {samples}")
    for length in lengths:
        for depth in depths:
            for number in range(samples):
                rng = np.random.default_rng([seed, length, round(depth * 1_000_000), number])
                yield make_sample(task, tokenizer, int(length), float(depth), rng, **difficulty)


def score(sample: dict, answer: str) -> float:
    """1.0 if the value is a part of the answer (case aside), as RULER scores, else 0.0."""
    return float(sample["outputs"][0].lower() in answer.lower())


def answer_tokens(sample: dict, tokenizer) -> int:
    """Tokens that a model has to generate to say the value of a sample."""
    start = f"{sample['input']} {sample['gen_prefix']}"[-400:]
    return len(tokenizer(f"{start} {sample['value']}").input_ids) - len(tokenizer(start).input_ids)
