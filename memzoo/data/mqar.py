"""Multi-query associative recall (Zoology, arXiv 2312.04927): key-value pairs, then queries for each key at power-law distances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .fit import DoesNotFit
from .symbols import single_token_words, written

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["associative_recall", "make_mqar"]


def associative_recall(
    batch: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator, power: float = 0.01
) -> tuple[Tensor, Tensor]:
    """(input_ids [batch, length], labels [batch, length] as a causal language model takes them: shifted inside it).

    The first 2 * pairs tokens are key, value, key, value, ...; keys come from the lower half of the vocabulary and values from the upper,
    each without repetition in a sequence. Each key is asked for once, at a place drawn without replacement with weight
    `power * x ** (power - 1)` over the even places x after the context; the label of the following place is its value. Every other place
    holds a random token, its label is -100.

    Raises:
        ValueError: `length` below 4 * pairs, or a vocabulary with fewer keys than pairs.
    """
    import torch  # here, as the suites' names should cost no more than numpy

    if length < 4 * pairs:
        raise ValueError(f"associative_recall: length is {length}, needs at least 4 * pairs = {4 * pairs}")
    if pairs < 1 or vocab_size // 2 - 1 < pairs:
        raise ValueError(
            f"associative_recall: pairs is {pairs}, needs 1 to {vocab_size // 2 - 1} with a vocabulary of {vocab_size}"
        )
    half = vocab_size // 2
    # Ranks of random numbers: distinct draws for the whole batch at once. Token 0 is left for padding.
    keys = torch.rand(batch, half - 1, generator=generator).argsort(1)[:, :pairs] + 1
    values = torch.rand(batch, vocab_size - half, generator=generator).argsort(1)[:, :pairs] + half
    context = 2 * pairs
    places = (length - context) // 2
    weights = power * torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    chosen = torch.multinomial(weights.expand(batch, -1), pairs, replacement=False, generator=generator)
    ids = torch.randint(1, vocab_size, (batch, length), generator=generator)
    ids[:, 0:context:2], ids[:, 1:context:2] = keys, values
    asked = context + 2 * chosen
    ids.scatter_(1, asked, keys)
    labels = torch.full((batch, length), -100)
    labels.scatter_(1, asked + 1, values)
    return ids, labels


def make_mqar(
    tokenizer, length: int, rng: np.random.Generator, *, pairs: int | None = None, words: int | None = None, power: float = 0.01
) -> dict:
    """One sequence of `associative_recall` as text: every token is a word that is one token of the tokenizer.

    Args:
        length: tokens of the sequence.
        pairs: key-value pairs, each asked for once; a sixteenth of the length, at most 256 and at most the keys there are, if None.
        words: words used, half of them keys and half values: at most 8,192, as in the paper, if None. Fewer are easier.
        power: of the law that queries follow.

    Returns:
        input (the whole sequence), queries (for each key that is asked for: characters of `input` up to it), outputs (their values),
        length, tokens, pairs.

    Raises:
        ValueError: too few words for the pairs, or a length below four times the pairs.
    """
    import torch

    vocabulary = single_token_words(tokenizer, words or 16, "mqar")
    if words is None:
        vocabulary = single_token_words(tokenizer)[:8192]
    if len(vocabulary) < 4:
        raise ValueError(f"mqar: words is {words}, needs at least 4")
    keys = len(vocabulary) // 2 - 1
    pairs = max(1, min(length // 16, 256, keys)) if pairs is None else pairs
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    extra = written(tokenizer, [vocabulary[-1]])[1] - 1  # a beginning of text, say
    if length - extra < 4 * pairs:
        raise DoesNotFit(f"mqar: length {length} is too short for {pairs} pairs, needs at least {4 * pairs + extra}")
    ids, labels = associative_recall(1, length - extra, pairs, len(vocabulary), generator, power)
    said = [vocabulary[i] for i in ids[0].tolist()]
    text, tokens = written(tokenizer, said)
    ends = np.cumsum([len(word) + 1 for word in said])
    asked = (labels[0] != -100).nonzero()[:, 0].tolist()
    return {
        "input": text,
        "gen_prefix": "",
        "queries": [int(ends[place - 1]) for place in asked],
        "outputs": [vocabulary[labels[0, place]] for place in asked],
        "length": length,
        "tokens": tokens,
        "pairs": pairs,
        "chance": 1.0 / (len(vocabulary) - len(vocabulary) // 2),
    }
