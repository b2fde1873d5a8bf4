"""Multi-query associative recall (Zoology, arXiv 2312.04927): key-value pairs, then queries for each key at power-law distances."""

from __future__ import annotations

import torch
from torch import Tensor


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
