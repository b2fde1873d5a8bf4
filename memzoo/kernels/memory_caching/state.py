"""What a memory with a cache remembers between calls, and how the tokens of a call fall into segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AGGREGATIONS = ("residual", "gated", "soup", "sparse", "average")
GATED = ("gated", "soup", "sparse")  # mixed by gates that come from scores
ROUTINGS = ("mean", "energy", "submax")
BLOCKS = 8  # sub-blocks of a segment that `submax` describes one by one
LOG = "log"


class MemoryCachingState(NamedTuple):
    """A cache of memories; every tensor leads with N, the number of sequences, and S is the most segments that one of them has closed.

    memory: the online memory: [N, H, Dk, Dv], a NeuralMemoryState, or None where the recurrence keeps its own. cached: the memories of
    closed segments, one [N, S, H, ...] a weight tensor, those of sequence n in its first count[n] places; where an aggregation needs no
    more than their sum, S is 1. pooled: what the open segment's descriptor is made of so far, [N, H, ...]; descriptors: those of closed
    segments, [N, S, H, ...]; both None where nothing is scored. position: tokens in the open segment, count: segments closed; a number
    while all sequences agree, else [N] of int64. previous: the last token's key and value, [N, H, Dk] and [N, H, Dv], where they are
    written twice, else None.
    """

    memory: Any
    cached: tuple[Tensor, ...]
    pooled: Tensor | None
    descriptors: Tensor | None
    position: int | Tensor
    count: int | Tensor
    previous: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Caching:
    """The options of a cache, as the operators take them."""

    segment_length: int | str
    aggregation: str
    top_k: int | None
    restart: bool
    routing: str
    max_segments: int | None = None

    @property
    def scored(self) -> bool:
        return self.aggregation in GATED

    def collapsed(self, linear: bool) -> bool:
        """Whether the sum of the cached memories is all that a read needs (Eq. 12, 13)."""
        return self.aggregation == "average" or (self.aggregation == "residual" and linear)


class Pieces:
    """The tokens of one call, the same number in each of some rows, cut where segments end; a piece lies in one segment.

    Args:
        length: tokens of a row.
        segment_length: tokens of a segment, or "log": the powers of two in the binary expansion of `length`, largest first.
        position: tokens that the rows' open segment has already.
        count: segments that the rows have closed.
    """

    def __init__(self, length: int, segment_length: int | str, position: int, count: int):
        if segment_length == LOG:
            self.sizes = [1 << bit for bit in reversed(range(length.bit_length())) if length >> bit & 1]
            self.places = self.sizes[0]
            self.segments = self.sizes
            self.position = 0
            self.closed = len(self.sizes)
        else:
            pieces = -(-(position + length) // segment_length)
            ends = [min((j + 1) * segment_length - position, length) for j in range(pieces)]
            self.sizes = [b - a for a, b in zip([0, *ends], ends)]
            self.places = segment_length
            self.segments = [segment_length] * pieces
            self.position = (position + length) % segment_length
            self.closed = (position + length) // segment_length
        self.log, self.length, self.first, self.had = segment_length == LOG, length, position, count

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def starts(self) -> list[int]:
        """The first token of each piece."""
        starts, at = [], 0
        for size in self.sizes:
            starts.append(at)
            at += size
        return starts

    def runs(self) -> list[slice]:
        """The pieces in runs of equal sizes, which a batch holds without a pad."""
        cuts = [0, *(j for j in range(1, len(self)) if self.sizes[j] != self.sizes[j - 1]), len(self)]
        return [slice(a, b) for a, b in zip(cuts, cuts[1:])]

    def readers(self) -> list[int]:
        """For every memory that some token may read, the cached ones first, the first token that reads it."""
        starts = self.starts
        return [0] * self.had + [starts[j + 1] for j in range(len(self) - 1)]

    def _index(self, device: torch.device) -> Tensor:
        """The token at each place of each piece, [P * places]; `length` where there is none."""
        rows = torch.full((len(self), self.places), self.length, dtype=torch.int64, device=device)
        for j, (start, size) in enumerate(zip(self.starts, self.sizes)):
            rows[j, :size] = torch.arange(start, start + size, device=device)
        return rows.flatten()

    def split(self, x: Tensor) -> Tensor:
        """[n, T, ...] to [n, P, L, ...]: one piece a row of the second axis, zeros where a piece has no token. Two pieces and more lie at
        their tokens' places in the segment; one piece is taken as it is."""
        return x[:, None] if len(self) == 1 else self.align(x)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x[:, 0] if len(self) == 1 else self.unalign(x)

    def align(self, x: Tensor) -> Tensor:
        """[n, T, ...] to [n, P, places, ...]: a token stands at its place in its segment; zeros where there is none."""
        rest = (0, 0) * (x.dim() - 2)
        if self.log:
            return F.pad(x, (*rest, 0, 1))[:, self._index(x.device)].unflatten(1, (len(self), self.places))
        after = len(self) * self.places - self.first - self.length
        if self.first or after:
            x = F.pad(x, (*rest, self.first, after))
        return x.unflatten(1, (len(self), self.places))

    def unalign(self, x: Tensor) -> Tensor:
        """[n, P, places, ...] to [n, T, ...]: the inverse of `align`."""
        x = x.flatten(1, 2)
        if self.log:
            index = self._index(x.device)
            return x[:, (index < self.length).nonzero()[:, 0]]
        return x[:, self.first : self.first + self.length]


def row_groups(
    batch: int, length: int, cu_seqlens: Tensor | None, position: int | Tensor, count: int | Tensor
) -> list[tuple[slice, slice, int, int]]:
    """Groups of sequences that agree in tokens, place in their segment and number of cached memories, as (sequences, tokens, position,
    count); a packed batch, or one whose rows differ, falls into single rows."""
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    positions, counts = ([x] * sequences if isinstance(x, int) else x.tolist() for x in (position, count))
    alike = len(set(positions)) == 1 and len(set(counts)) == 1
    if cu_seqlens is None and alike:
        return [(slice(0, batch), slice(0, length), positions[0], counts[0])]
    if cu_seqlens is None:
        return [(slice(n, n + 1), slice(0, length), positions[n], counts[n]) for n in range(batch)]
    ends = cu_seqlens.tolist()
    return [(slice(n, n + 1), slice(a, b), positions[n], counts[n]) for n, (a, b) in enumerate(zip(ends, ends[1:]))]


def rows_of(x: Tensor | None, group: tuple[slice, slice, int, int], packed: bool) -> Tensor | None:
    """The tokens of a group, [n, T, ...], of a tensor [B, T, ...] or packed [1, total, ...]."""
    if x is None:
        return None
    sequences, tokens, _, _ = group
    return x[:, tokens] if packed else x[sequences]


class PieceTable(NamedTuple):
    """The pieces of a call as packed sequences, for a recurrence that starts anew with every segment.

    cu_pieces: token boundaries of the pieces, [P + 1]. first, last: each sequence's first and last piece, -1 where it has no token in this
    call. position: its tokens in the open segment after the call.
    """

    cu_pieces: list[int]
    first: list[int]
    last: list[int]
    position: list[int]


def piece_table(
    batch: int, length: int, cu_seqlens: Tensor | None, segment_length: int | str, position: int | Tensor
) -> PieceTable:
    """How the tokens of a call [B, T], or packed, fall into pieces; waits for the device where boundaries or positions are on it."""
    bounds, first, last, after = [0], [], [], []
    for sequences, tokens, begin, _ in row_groups(batch, length, cu_seqlens, position, 0):
        count = tokens.stop - tokens.start
        for _ in range(sequences.stop - sequences.start):
            if count == 0:
                first.append(-1), last.append(-1), after.append(begin)
                continue
            pieces = Pieces(count, segment_length, begin, 0)
            first.append(len(bounds) - 1)
            for size in pieces.sizes:
                bounds.append(bounds[-1] + size)
            last.append(len(bounds) - 2)
            after.append(pieces.position)
    return PieceTable(bounds, first, last, after)


def merge_states(states: Sequence[MemoryCachingState]) -> MemoryCachingState:
    """One state of several groups' sequences; caches of different sizes are filled with zeros."""
    if len(states) == 1:
        return states[0]
    size = max(part.shape[1] for state in states for part in state.cached) if states[0].cached else 0

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, size - x.shape[1]))

    def numbers(values: list[int], like: Tensor) -> int | Tensor:
        return values[0] if len(set(values)) == 1 else torch.tensor(values, device=like.device)

    merged = [_joined([getattr(state, name) for state in states]) for name in ("memory", "pooled", "previous")]
    cached = tuple(torch.cat([filled(part) for part in parts]) for parts in zip(*(state.cached for state in states)))
    descriptors = None if states[0].descriptors is None else torch.cat([filled(state.descriptors) for state in states])
    like = cached[0]
    position, count = (numbers([getattr(state, name) for state in states], like) for name in ("position", "count"))
    return MemoryCachingState(merged[0], cached, merged[1], descriptors, position, count, merged[2])


def _joined(parts: list[Any]) -> Any:
    if parts[0] is None:
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    joined = (_joined(list(part)) for part in zip(*parts))
    return type(parts[0])(*joined) if hasattr(parts[0], "_fields") else tuple(joined)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to every tensor of a nested tuple."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        changed = (map_tensors(part, change) for part in value)
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    return value
