"""Held-out prose cut into pieces by position, for the loss of a model at each distance from the start of a document."""

from __future__ import annotations

from itertools import chain

import numpy as np

from .fit import DoesNotFit, cut
from .haystack import Haystack

__all__ = ["bucket_edges", "make_held_out"]


def bucket_edges(length: int, first: int = 128) -> list[int]:
    """0, 128, 256, 512, ... and `length`: where the buckets of positions start and end."""
    edges = [0]
    edge = first
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def make_held_out(tokenizer, length: int, rng: np.random.Generator, *, first_bucket: int = 128, split: str = "test") -> dict:
    """`length` tokens of running prose from a random sentence on, or one less; buckets are cut at the start of the next word.

    Args:
        length: tokens of the document.
        first_bucket: tokens of the first bucket; each of the others ends at twice the position of the one before.
        split: which part of the prose.

    Returns:
        input (the whole text), buckets (tokens where the buckets should start and end), edges (where they do), cuts (the same in
        characters), bytes (UTF-8 bytes of each bucket), length, tokens.

    Raises:
        DoesNotFit: the prose has fewer tokens than that.
    """
    if length < 2 or first_bucket < 1:
        raise DoesNotFit(f"ppl_by_length: length is {length} and first_bucket {first_bucket}, needs at least 2 and 1")
    haystack = Haystack.of("essay", split, tokenizer)
    total, need = haystack.cost(0, len(haystack.units)), length * 1.01 + 64  # words' costs are estimates
    if total < need:
        raise DoesNotFit(
            f"ppl_by_length: length {length} is more than the held-out prose has with this tokenizer, at most {int((total - 64) / 1.01)}"
        )
    # Nothing is read twice, as repeated text is easy: the document ends before the prose does.
    starts = haystack.sentences[haystack.sentences <= haystack.units_within(0, total - need)]
    start = int(starts[rng.integers(len(starts))])
    units = min(haystack.units_within(start, need) + 1, len(haystack.units) - start)
    text = haystack.text(start, units)
    tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
    if tokens < length:
        raise DoesNotFit(f"ppl_by_length: only {tokens} of {length} tokens of prose were found from word {start} on")
    text = cut(tokenizer, text, length, lambda piece: length - len(tokenizer(piece, add_special_tokens=False).input_ids))
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    begins = np.array([begin for begin, _ in encoding["offset_mapping"]])
    cuts, edges = [0], [0]
    for edge in bucket_edges(length, first_bucket)[1:-1]:
        # A word's first token starts at its space, or after it, as the tokenizer has it. The text's last word may start before the edge.
        near = chain(range(edge, len(begins)), range(min(edge, len(begins)) - 1, 0, -1))
        at = next((i for i in near if text[begins[i]] == " " or text[begins[i] - 1] == " "), len(begins))
        end = int(begins[at]) if at < len(begins) else len(text)
        cuts.append(end - 1 if text[end - 1 : end] == " " else end)
        edges.append(at)
    cuts.append(len(text))
    edges.append(len(begins))
    return {
        "input": text,
        "gen_prefix": "",
        "cuts": cuts,
        "buckets": bucket_edges(length, first_bucket),
        "edges": edges,
        "bytes": [len(text[a:b].encode()) for a, b in zip(cuts, cuts[1:])],
        "outputs": [],
        "length": length,
        "tokens": edges[-1],
    }
