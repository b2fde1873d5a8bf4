"""How documents get to the length asked for: as many whole units of haystack as fit, then the start of the next one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

__all__ = ["DoesNotFit", "cut", "fill", "most_units"]

FILLER = " a"  # one token after any text, or two where a tokenizer has no words


class DoesNotFit(ValueError):
    """A length, or a tokenizer, that a task cannot be made with; the message says what it needs."""


def most_units(measure: Callable[[int], int], limit: int, guess: int | None = None) -> int:
    """The largest n from 1 on with measure(n) <= limit, where measure grows with n, looked for near `guess`; 0 if there is none."""
    if measure(1) > limit:
        return 0
    if guess is None:
        # The first ten units say what one costs, in tens so that rounding does not matter.
        guess = (limit - measure(1)) * 10 // max(measure(11) - measure(1), 1)
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


def cut(tokenizer, text: str, room: int, left: Callable[[str], int]) -> str:
    """The start of `text` with which a document has no token left, or one.

    Args:
        text: at least `room` tokens.
        room: tokens that the document has left without it.
        left: left(piece) is what the whole document has left with that piece, below 0 if it is too long.

    A cut at the end of a token mostly costs as many tokens as come before it; the whole document says whether it did, and the next cut
    makes up for it. Where no cut does (the next character has several tokens, say), words are put after the best one.
    """
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ends = [0, *sorted({end for _, end in encoding.offsets})]
    tried, place = {0: room}, min(room, len(ends) - 1)
    while place not in tried:
        tried[place] = left(text[: ends[place]])
        if tried[place] in (0, 1):
            return text[: ends[place]]
        place = min(max(place + tried[place], 0), len(ends) - 1)
    spare, place = min((spare, place) for place, spare in tried.items() if spare > 1)
    for count in (spare, spare // 2):
        piece = text[: ends[place]] + FILLER * count
        if left(piece) in (0, 1):
            return piece
    return text[: ends[place]]


def fill(
    task: str,
    build: Callable[[int, str], tuple[str, str]],
    following: Callable[[int, int], str],
    tokenizer,
    length: int,
    reserve: int,
    *,
    guess: Callable[[int], int] | None = None,
    delimiter: str = " ",
    frame: str = "template",
) -> dict:
    """The longest sample of `build` that leaves `reserve` tokens free, or one more.

    Args:
        build: build(units, tail) gives input and prefix with so many whole units of haystack, and with `tail` after them.
        following: following(units, tokens) is what may come after so many units, so many tokens of it at least: tails are cut from it.
        length: tokens of prompt, prefix and answer together.
        reserve: tokens of the answer.
        guess: guess(tokens) is about how many units take so many tokens; the first ten say so if None.
        delimiter: what stands between input and prefix.
        frame: what a document needs whatever its haystack, for the message.

    Returns:
        input, gen_prefix, length and tokens (of prompt and prefix).

    Raises:
        DoesNotFit: in one line, with the shortest length that works.
    """

    @cache
    def measure(units: int, tail: str = "") -> int:
        return len(tokenizer(delimiter.join(build(units, tail))).input_ids)

    budget, shortest = length - reserve, measure(1)
    if shortest > budget:
        raise DoesNotFit(f"{task}: length {length} is too short for the {frame}, needs at least {shortest + reserve}")
    units, tail = most_units(measure, budget, guess and guess(budget - shortest)), ""
    room = budget - measure(units)
    if room > 1:
        tail = cut(tokenizer, following(units, room), room, lambda piece: budget - measure(units, piece))
    text, prefix = build(units, tail)
    return {"input": text, "gen_prefix": prefix, "length": length, "tokens": measure(units, tail)}
