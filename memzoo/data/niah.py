"""Needles in a haystack in the formats of RULER (Hsieh et al. 2024): one scored sample, or a grid of them.

Eight tasks. One needle: `niah_single_1` hides a number in a line of noise said again and again, `niah_single_2` hides it in prose,
`niah_single_3` hides a UUID in prose. One needle among others: `niah_multikey_1` with three more in prose, `niah_multikey_2` and
`niah_multikey_3` (UUIDs for keys and values) in a haystack that is nothing but needles. Several answers: `niah_multivalue` asks for the
four values of one key, `niah_multiquery` for the values of four keys. Header, needle, question and the start of the answer are RULER's
words, as lm-eval has them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .fit import fill
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
# The same with several answers.
HEADERS = (
    "Some special magic {plural} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {plural} afterwards."
)
QUESTIONS = "What are all the special magic {plural} for {key} mentioned in the provided text?"
PREFIXES = "The special magic {plural} for {key} mentioned in the provided text are"

MAX_DIGITS = 14


@dataclass(frozen=True)
class Format:
    """What a task hides and where.

    Attributes:
        haystack: "repeat" (a line of noise), "essay" (prose) or "needle" (other needles, one a line).
        values: "numbers" or "uuids".
        answer_tokens: tokens kept free for the answer, enough with any usual tokenizer.
        keys: keys that are hidden beside the haystack's own.
        values_per_key: values of each key.
        queries: keys that are asked for.
        key_kind: "words" or "uuids".
    """

    haystack: str
    values: str
    answer_tokens: int
    keys: int = 1
    values_per_key: int = 1
    queries: int = 1
    key_kind: str = "words"

    @property
    def answers(self) -> int:
        """Values that are asked for."""
        return self.queries * self.values_per_key


FORMATS = {
    "niah_single_1": Format("repeat", "numbers", 16),
    "niah_single_2": Format("essay", "numbers", 16),
    "niah_single_3": Format("essay", "uuids", 48),
    "niah_multikey_1": Format("essay", "numbers", 16, keys=4),
    "niah_multikey_2": Format("needle", "numbers", 16),
    "niah_multikey_3": Format("needle", "uuids", 48, key_kind="uuids"),
    "niah_multivalue": Format("essay", "numbers", 64, values_per_key=4),
    "niah_multiquery": Format("essay", "numbers", 64, keys=4, queries=4),
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
    form = find_format(task)
    values = form.values
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
        key, value = _draw(form, rng, value_digits, key_words)
        if key in keys or value in taken or value in avoid:
            continue
        keys[key] = value
        taken.add(value)
        if len(keys) == count:
            return [Needle(key, value, values) for key, value in keys.items()]
    raise ValueError(f"no {value_digits}-digit values are left that the haystack does not hold")


def _draw(form: Format, rng: np.random.Generator, value_digits: int, key_words: int) -> tuple[str, str]:
    """A random key and value."""
    if form.key_kind == "uuids":
        key = _uuid(rng)
    else:
        key = NOUNS[rng.integers(len(NOUNS))]
        if key_words == 2:
            key = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{key}"
    if form.values == "uuids":
        return key, _uuid(rng)
    return key, str(rng.integers(10 ** (value_digits - 1), 10**value_digits))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def header(task: str) -> str:
    """The lines before the haystack."""
    form = find_format(task)
    return (HEADER if form.answers == 1 else HEADERS).format(singular=form.values[:-1], plural=form.values)


def prompt(needle: Needle, context: str) -> str:
    """The input of a sample: header, haystack with the needle in it, question. The answer's prefix follows after a space."""
    return f"{HEADER.format(singular=needle.values[:-1])}\n{context}\n{needle.question}"


def prompt_several(values: str, keys: Sequence[str], context: str) -> tuple[str, str]:
    """Input and answer's prefix of a sample with several answers, for the keys that are asked for ("numbers" or "uuids" as values)."""
    key = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    names = {"plural": values, "key": key}
    return f"{HEADERS.format(**names)}\n{context}\n{QUESTIONS.format(**names)}", PREFIXES.format(**names)


def make_sample(
    task: str,
    tokenizer,
    length: int,
    depth: float | None,
    rng: np.random.Generator,
    *,
    value_digits: int = 7,
    key_words: int = 2,
    split: str = "test",
    answer_tokens: int | None = None,
) -> dict:
    """One sample of `length` tokens, or one less, with its needle at `depth`.

    Args:
        task: a name in FORMATS.
        tokenizer: a fast tokenizer.
        length: tokens of prompt, answer's prefix and answer together.
        depth: share of the haystack before the needle that is asked for, 0 to 1; in prose it goes to the nearest end of a sentence. The
            other needles of niah_multikey_1 are at random depths. Tasks with several answers hide all of them at random depths; they
            take None, or a depth that they only check.
        rng: where the randomness comes from.
        value_digits, key_words: difficulty, see `draw_needles`; the defaults are RULER's.
        split: which part of the prose.
        answer_tokens: tokens of `length` kept free for the answer; 16 for a number and 48 for a UUID, times the answers, if None.

    Returns:
        input (prompt without the answer's prefix), gen_prefix, outputs (list of the values), length (as asked), tokens (prompt and
        prefix, as counted), depth (as asked; None with several answers), key, value. What no whole unit of haystack fits in is filled with
        the start of the next one: of a word, of a line of noise, of a needle without its value.

    Raises:
        ValueError: an unknown task, a depth outside 0 to 1, a difficulty out of range, or a length too short for the template, with
            the shortest that works.
    """
    form = find_format(task)
    if depth is None:
        depth = 0.5
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}, needs 0 to 1")
    reserve = form.answer_tokens if answer_tokens is None else answer_tokens
    budget = length - reserve
    haystack, avoid = None, ""
    if form.haystack != "needle":
        haystack = Haystack.of(form.haystack, split, tokenizer)
        start = haystack.draw(rng)
        if form.haystack == "essay":
            avoid = haystack.text(start, max(haystack.units_within(start, max(budget, 0)), 1))
    elif not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"needle documents need a fast tokenizer, {type(tokenizer).__name__} is not one")
    needles = draw_needles(task, rng, form.keys * form.values_per_key, value_digits=value_digits, key_words=key_words, avoid=avoid)
    if form.values_per_key > 1:
        needles = [Needle(needles[0].key, needle.value, form.values) for needle in needles]
    depths, asked = [depth] * len(needles), needles[:1]
    if form.answers > 1:
        depths, asked = rng.random(len(needles)).tolist(), needles
        if form.queries > 1:
            asked = [needles[index] for index in rng.permutation(len(needles))[: form.queries]]
    elif len(needles) > 1:
        depths[1:] = rng.random(len(needles) - 1).tolist()
    others: list[str] = []  # the lines of a haystack of needles, drawn as they are needed

    def lines(count: int) -> list[str]:
        while len(others) < count:
            key, value = _draw(form, rng, value_digits, key_words)
            if key != needles[0].key and value != needles[0].value:
                others.append(Needle(key, value, form.values).sentence)
        return others[:count]

    def context(units: int, tail: str) -> str:
        if haystack is not None:
            places = [(haystack.place(start, units, d), needle.sentence) for d, needle in zip(depths, needles)]
            return haystack.text(start, units, places, tail)
        place, shown = round(depth * units), [*lines(units), tail] if tail else lines(units)
        place += bool(tail) and place == units
        return "\n".join([*shown[:place], needles[0].sentence, *shown[place:]])

    def following(units: int, tokens: int) -> str:
        if haystack is not None:
            return haystack.following(start, units, tokens)
        # A value is less than half of a line, so two lines without are more than one with.
        return "\n".join(line.rpartition(" ")[0] for line in lines(units + 2)[units:])

    def build(units: int, tail: str) -> tuple[str, str]:
        if form.answers == 1:
            return prompt(needles[0], context(units, tail)), needles[0].prefix
        keys = [needle.key for needle in asked] if form.queries > 1 else [needles[0].key]
        return prompt_several(form.values, keys, context(units, tail))

    guess = None if haystack is None else lambda tokens: haystack.units_within(start, tokens)
    return {
        **fill(task, build, following, tokenizer, length, reserve, guess=guess),
        "outputs": [needle.value for needle in asked],
        "depth": float(depth) if form.answers == 1 else None,
        "key": ", ".join(dict.fromkeys(needle.key for needle in asked)),
        "value": ", ".join(needle.value for needle in asked),
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
    """`samples` samples for every length and depth. A sample depends on the seed, its cell and its number only, not on the grid.

    Tasks with several answers have no depth: they get as many samples, of one kind.
    """
    if samples < 1 or not lengths or not depths:
        raise ValueError(f"no samples to make: lengths {list(lengths)}, depths {list(depths)}, samples {samples}")
    for length in lengths:
        for depth, number in needle_cells(task, depths, samples * len(depths)):
            yield needle_sample(task, tokenizer, int(length), depth, number, seed, **difficulty)


def needle_cells(task: str, depths: Sequence[float], count: int) -> list[tuple[float | None, int]]:
    """(depth, number of the sample at it) of `count` samples, shared out evenly among the depths, depth by depth."""
    if find_format(task).answers > 1:
        return [(None, number) for number in range(count)]
    fewest, more = divmod(count, len(depths))
    return [(float(depth), number) for i, depth in enumerate(depths) for number in range(fewest + (i < more))]


def needle_sample(task: str, tokenizer, length: int, depth: float | None, number: int, seed: int = 0, **difficulty) -> dict:
    """Sample `number` of a length and depth, always the same."""
    place = 1_000_001 if depth is None else round(depth * 1_000_000)
    rng = np.random.default_rng([seed, length, place, number])
    return make_sample(task, tokenizer, length, depth, rng, **difficulty)


def score(sample: dict, answer: str) -> float:
    """The share of the values that are a part of the answer (case aside), as RULER scores."""
    return sum(value.lower() in answer.lower() for value in sample["outputs"]) / len(sample["outputs"])


def answer_tokens(sample: dict, tokenizer) -> int:
    """Tokens that a model has to generate to say the value of a sample."""
    start = f"{sample['input']} {sample['gen_prefix']}"[-400:]
    return len(tokenizer(f"{start} {sample['value']}").input_ids) - len(tokenizer(start).input_ids)
