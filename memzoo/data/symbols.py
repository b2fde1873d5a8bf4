"""Tasks on symbols as text that any tokenizer with whole words can write: copy, selective copy, denoise and transfer.

A symbol is a word that is one token of the model's tokenizer, so that a document has as many tokens as words and an unmodified lm-eval can
score it. The words are the same in every document of a tokenizer, as a model that is trained on the task needs.

- `copy` (Kerg et al. 2020, after Hochreiter and Schmidhuber 1997): 10 symbols of 8, then blanks, then a marker; say the symbols.
- `denoise` (Kerg et al. 2020): 10 symbols of 8 scattered among blanks, then the marker; say the symbols in order.
- `selective_copy` (Gu and Dao 2023): 16 symbols of 16 scattered among blanks, then the marker.
- `transfer` (Kerg et al. 2020): `copy`, asked for at delays far longer than a model was trained with.
"""

from __future__ import annotations

import re
import weakref

import numpy as np

from .fit import DoesNotFit

__all__ = ["make_copy", "make_denoise", "make_selective_copy", "make_transfer", "single_token_words"]

WORD = re.compile(r"[a-z]{3,12}")
_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def single_token_words(tokenizer, count: int | None = None, task: str = "this task") -> tuple[str, ...]:
    """Lower-case words of 3 to 12 letters that are one token each after a space, in the tokenizer's order: the first `count`, or all.

    Raises:
        DoesNotFit: the tokenizer has fewer than `count`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{task} needs a fast tokenizer, {type(tokenizer).__name__} is not one")
    if tokenizer not in _KEPT:
        pieces = (piece.strip() for piece in tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))
        words = [word for word in dict.fromkeys(pieces) if WORD.fullmatch(word)]
        encode = tokenizer.backend_tokenizer.encode_batch
        alone, *after = (len(e.ids) for e in encode(["the", *(f"the {w}" for w in words)], add_special_tokens=False))
        _KEPT[tokenizer] = tuple(word for word, tokens in zip(words, after) if tokens == alone + 1)
    words = _KEPT[tokenizer]
    if count is not None and len(words) < count:
        raise DoesNotFit(f"{task} needs {count} words that are one token each, this tokenizer has {len(words)}")
    return words if count is None else words[:count]


def written(tokenizer, words: list[str]) -> tuple[str, int]:
    """Words as text, and its tokens: one each, and what the tokenizer adds, such as a beginning of text.

    The text starts with a space, as the first word would otherwise be cut in another way than the rest.
    """
    text = "".join(f" {word}" for word in words)
    return text, len(tokenizer(text).input_ids)


def make_copy(tokenizer, length: int, rng: np.random.Generator, *, symbols: int = 10, alphabet: int = 8) -> dict:
    """`symbols` symbols out of `alphabet`, length - 2 * symbols - 1 blanks, the marker; the answer is the symbols.

    Args:
        length: tokens of prompt and answer together.
        symbols, alphabet: 10 and 8 in the paper; fewer are easier.
    """
    return _recall("copy", tokenizer, length, rng, symbols, alphabet, scattered=False)


def make_transfer(tokenizer, length: int, rng: np.random.Generator, *, symbols: int = 10, alphabet: int = 8) -> dict:
    """As `make_copy`."""
    return _recall("transfer", tokenizer, length, rng, symbols, alphabet, scattered=False)


def make_denoise(tokenizer, length: int, rng: np.random.Generator, *, symbols: int = 10, alphabet: int = 8) -> dict:
    """`symbols` symbols out of `alphabet` at random places among blanks, the marker; the answer is the symbols in order."""
    return _recall("denoise", tokenizer, length, rng, symbols, alphabet, scattered=True)


def make_selective_copy(tokenizer, length: int, rng: np.random.Generator, *, symbols: int = 16, alphabet: int = 16) -> dict:
    """As `make_denoise`, with 16 symbols out of 16."""
    return _recall("selective_copy", tokenizer, length, rng, symbols, alphabet, scattered=True)


def _recall(task: str, tokenizer, length: int, rng, symbols: int, alphabet: int, *, scattered: bool) -> dict:
    if symbols < 1 or alphabet < 2:
        raise ValueError(f"{task}: symbols is {symbols} and alphabet {alphabet}, need at least 1 and 2")
    blank, marker, *names = single_token_words(tokenizer, alphabet + 2, task)
    shown = [names[i] for i in rng.integers(alphabet, size=symbols)]
    extra = written(tokenizer, [*shown, marker])[1] - symbols - 1
    blanks = length - 2 * symbols - 1 - extra
    if blanks < 1:
        raise DoesNotFit(f"{task}: length {length} is too short for {symbols} symbols, needs at least {2 * symbols + 2 + extra}")
    words = [*shown, *[blank] * blanks]
    if scattered:
        words = [blank] * (symbols + blanks)
        for place, symbol in zip(sorted(rng.choice(len(words), size=symbols, replace=False).tolist()), shown):
            words[place] = symbol
    text, tokens = written(tokenizer, [*words, marker])
    return {"input": text, "gen_prefix": "", "outputs": shown, "length": length, "tokens": tokens, "chance": 1.0 / alphabet}
