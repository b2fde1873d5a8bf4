"""RULER's other synthetic tasks (Hsieh et al. 2024) in the formats that lm-eval gives them: variable tracking and two word counts.

`vt` follows one value through a chain of assignments in noise, `cwe` asks for the ten most common words of a numbered list, `fwe` for the
three most frequent made-up words of a text whose word counts follow a power law. The templates are RULER's words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from string import ascii_lowercase, ascii_uppercase

import numpy as np

from .fit import fill, most_units
from .haystack import NOISE
from .text import prose

__all__ = ["cwe_prompt", "fwe_prompt", "make_cwe", "make_fwe", "make_vt", "vt_context", "vt_example", "vt_prompt"]

VT_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
VT_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the value {query}, "
    "they are:"
)
CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
    "{context}\nQuestion: What are the {count} most common words in the above list?"
)
CWE_PREFIX = "Answer: The top {count} words that appear most often in the list are:"
FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
    "{context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
    "words in the above coded text?"
)
FWE_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"

EXAMPLE_TOKENS = 500  # RULER's worked example of variable tracking has at most so many


def vt_prompt(context: str, query: str, count: int) -> tuple[str, str]:
    """Input and answer's prefix of variable tracking; `count` variables have the value `query`."""
    return VT_TEMPLATE.format(context=context, query=query), VT_PREFIX.format(query=query, count=count)


def vt_example(context: str, query: str, variables: Sequence[str]) -> str:
    """The worked example that stands before the task: another one with its answer."""
    text, prefix = vt_prompt(context, query, len(variables))
    return f"{text} {prefix}  {' '.join(variables)}\n\n"


def vt_context(noises: int, chains: Sequence[Sequence[str]], places: Sequence[Sequence[int]]) -> str:
    """`noises` lines of noise with the statements of each chain at its places, counted in sentences without the chain's own.

    A line is one place, or one for each of its sentences where there are not more lines than statements.
    """
    sentences = [f"{NOISE}\n"] * noises
    if noises <= len(chains[0]):
        sentences = [piece + "." if piece.strip() else piece for piece in f"{NOISE}\n".split(".")] * noises
    for chain, where in zip(chains, places):
        for number, (place, statement) in enumerate(zip(sorted(where), chain)):
            sentences.insert(place + number, statement)
    return " ".join(sentences).replace(". \n", ".\n")


def _chain(variables: Sequence[str], value: str) -> list[str]:
    return [f"VAR {variables[0]} = {value}"] + [f"VAR {new} = VAR {old} " for old, new in zip(variables, variables[1:])]


def _names(rng: np.random.Generator, count: int, letters: int, taken: set[str]) -> list[str]:
    """`count` distinct variable names that no other holds and that are none of `taken`, which they join."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(ascii_uppercase[i] for i in rng.integers(26, size=letters))
        if name not in taken and "VAR" not in name:
            taken.add(name)
            names.append(name)
    return names


def make_vt(
    tokenizer,
    length: int,
    rng: np.random.Generator,
    *,
    hops: int = 4,
    chains: int = 1,
    example: bool = True,
    answer_tokens: int = 30,
) -> dict:
    """One sample of variable tracking.

    Args:
        length: tokens of prompt, prefix and answer together.
        hops: assignments after the first (RULER: 4); fewer are easier.
        chains: chains in the text, of which the first is asked for (RULER in lm-eval: 1).
        example: whether a worked example of at most 500 tokens stands before the task, as in RULER.

    Raises:
        DoesNotFit: in one line, with the shortest length that works.
    """
    if hops < 1 or chains < 1:
        raise ValueError(f"vt: hops is {hops} and chains is {chains}, need at least 1")
    taken: set[str] = set()
    values = rng.choice(np.arange(10000, 99999), size=chains + 1, replace=False).astype(str).tolist()
    names = [_names(rng, hops + 1, 5, taken) for _ in range(chains)]
    example_names = _names(rng, hops + 1, 3, set())
    statements = [_chain(variables, value) for variables, value in zip(names, values)]
    order = int(rng.integers(2**31))

    def places(row: int, slots: int) -> list[int]:
        """Distinct places in `slots` sentences, always the same ones."""
        where = np.random.default_rng([order, row, slots]).choice(slots, size=hops + 1, replace=False)
        return sorted(where.tolist())

    def slots(noises: int) -> int:
        return noises if noises > hops + 1 else noises * (NOISE.count(".") + 1)

    def context(noises: int, rows: Sequence[int], chain: Sequence[Sequence[str]]) -> str:
        return vt_context(noises, chain, [places(row, slots(noises)) for row in rows])

    least = next(n for n in range(1, hops + 3) if slots(n) > hops + 1)
    shown = ""
    if example:
        made = cache(
            lambda noises: vt_example(context(noises, [chains], [_chain(example_names, values[-1])]), values[-1], example_names)
        )
        limit = min(EXAMPLE_TOKENS, length // 4)
        fit = most_units(cache(lambda noises: len(tokenizer(made(noises + least - 1)).input_ids)), limit)
        shown = made(max(fit, 1) + least - 1) + "\n\n"

    def build(units: int, tail: str) -> tuple[str, str]:
        text, prefix = vt_prompt(context(units + least - 1, range(chains), statements) + tail, values[0], hops + 1)
        return shown + text, prefix

    def following(units: int, tokens: int) -> str:
        return f" {NOISE}\n" * (tokens // NOISE.count(" ") + 1)

    return {**fill("vt", build, following, tokenizer, length, answer_tokens), "outputs": names[0]}


def cwe_prompt(words: Sequence[str], count: int = 10, tail: str = "") -> tuple[str, str]:
    """Input and answer's prefix of the common words of a list, with `tail` after its last word."""
    context = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1)) + tail
    return CWE_TEMPLATE.format(context=context, count=count), CWE_PREFIX.format(count=count)


@cache
def list_words() -> tuple[str, ...]:
    """Words of four to nine letters from the prose, in the order of the alphabet."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,9}\b", prose("train")))))


def make_cwe(
    tokenizer,
    length: int,
    rng: np.random.Generator,
    *,
    common_words: int = 10,
    repeats: int | None = None,
    rare_repeats: int | None = None,
    answer_tokens: int = 120,
) -> dict:
    """One sample of common words.

    Args:
        common_words: words that are asked for (RULER: 10).
        repeats, rare_repeats: how often each of them and each other word is said; 30 and 3 from 4,096 tokens on, 6 and 1 below, as
            lm-eval has it, if None.
    """
    repeats = (30 if length >= 4096 else 6) if repeats is None else repeats
    rare_repeats = (3 if length >= 4096 else 1) if rare_repeats is None else rare_repeats
    words = list_words()
    if not 1 <= common_words < len(words) or not 1 <= rare_repeats < repeats:
        raise ValueError(
            f"cwe: common_words is {common_words}, repeats {repeats} and rare_repeats {rare_repeats}; needs common_words of 1 to "
            f"{len(words) - 1} and repeats above rare_repeats"
        )
    drawn = [words[i] for i in rng.permutation(len(words))]
    seed = int(rng.integers(2**31))
    common, rare = drawn[:common_words], drawn[common_words:]

    def build(units: int, tail: str) -> tuple[str, str]:
        while len(rare) < units:  # the list has more words than there are: two of them make another
            rounds, index = divmod(len(rare), len(drawn) - common_words)
            rare.append(f"{rare[index]}-{rare[index + rounds]}")
        listed = common * repeats + rare[:units] * rare_repeats
        return cwe_prompt([listed[i] for i in np.random.default_rng(seed).permutation(len(listed))], common_words, tail)

    def following(units: int, tokens: int) -> str:
        """Numbers without words, as another word, or a piece of one, could be among the words that count."""
        last = common_words * repeats + units * rare_repeats
        return "".join(f" {last + number}." for number in range(1, tokens + 1))

    return {**fill("cwe", build, following, tokenizer, length, answer_tokens, delimiter="\n\n"), "outputs": common}


def fwe_prompt(words: Sequence[str]) -> tuple[str, str]:
    """Input and answer's prefix of the frequent words of a text."""
    return FWE_TEMPLATE.format(context=" ".join(words)), FWE_PREFIX


def make_fwe(
    tokenizer, length: int, rng: np.random.Generator, *, alpha: float = 2.0, word_letters: int = 6, answer_tokens: int = 50
) -> dict:
    """One sample of frequent words.

    Args:
        alpha: the k-th word is said n / (zeta(alpha) k ** alpha) times (RULER: 2). A larger one sets the three apart more.
        word_letters: letters of a made-up word (RULER: 6).
    """
    if alpha <= 1.0 or not 3 <= word_letters <= 12:
        raise ValueError(f"fwe: alpha is {alpha}, needs more than 1; word_letters is {word_letters}, needs 3 to 12")
    size = max(length // 50, 5)
    words: dict[str, None] = {}
    while len(words) < size:
        words["".join(ascii_lowercase[i] for i in rng.integers(26, size=word_letters))] = None
    vocabulary = ["...", *list(words)[1:]]  # the most frequent one is dots, to be ignored
    seed = int(rng.integers(2**31))
    ranks = np.arange(1, size + 1, dtype=np.float64)
    shares = ranks**-alpha / np.sum(np.arange(1, 1_000_000, dtype=np.float64) ** -alpha)

    def counts(units: int) -> np.ndarray:
        return (shares * (units + least)).astype(int)

    least = 0
    while len(set(counts(1)[1:5].tolist())) < 4:  # the three and the next one are told apart by their counts
        least += 1

    def build(units: int, tail: str) -> tuple[str, str]:
        said = [word for word, count in zip(vocabulary, counts(units)) for _ in range(count)]
        order = np.random.default_rng(seed).permutation(len(said))
        return fwe_prompt([*(said[i] for i in order), *([tail] if tail else [])])

    def following(units: int, tokens: int) -> str:
        """Dots, which do not count."""
        return " ".join(["..."] * tokens)

    return {**fill("fwe", build, following, tokenizer, length, answer_tokens), "outputs": vocabulary[1:4]}
