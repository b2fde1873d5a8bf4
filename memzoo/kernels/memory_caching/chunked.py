"""Memory caching in plain torch, segments in parallel: what a CPU runs, forward and backward, for every kind of memory.

A memory is an object that writes the pieces of a call (`run`) and reads cached weights (`read_cached`); what is cached, how segments are
scored and how reads are mixed is here, once. `MatrixWrites` is the matrix memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..delta_rule import delta_rule
from ..linear_attention import linear_attention
from .mixing import Weights, gates, highest, pick, read_matrices
from .routing import cached_scores, describe, empty_pool, online_scores
from .state import Caching, MemoryCachingState, Pieces, map_tensors, merge_states, row_groups, rows_of


class Writes(Protocol):
    """The writes of one call to one kind of memory, and the queries that read it; all tensors of tokens are [n, T, H, ...]."""

    linear: bool  # reads are linear in the weights, so mixing reads is mixing weights
    q: Tensor | None

    def select(self, group, packed: bool) -> Writes:
        """The tokens of a group of rows."""

    def fresh(self, count: int) -> Any:
        """The state that `count` sequences' segments start from."""

    def weights(self, memory: Any) -> Weights:
        """What is cached of a state, [n, H, ...] each."""

    def run(self, pieces: Pieces, memory: Any, restart: bool, mix=None) -> tuple[Tensor, Weights, Any]:
        """(reads of the online memory [n, T, H, Dv], weights after every piece [n, P, H, ...], state after the last token)."""

    def read_cached(self, gate: Tensor, bank: Weights, readers: list[int]) -> Tensor:
        """`sum_i gate_i M_i(q)` [n, T, H, Dv] over cached memories [n, S, H, ...], for gates [n, T, H, S]."""

    def after(self, state: MemoryCachingState) -> Writes:
        """The same writes for tokens that follow those of `state`."""

    def next_segment(self, memory: Any) -> Any:
        """The state that the next segment starts from when it goes on where this one ended."""

    def before(self, count: int) -> tuple[Tensor, Tensor] | None:
        """What the first token of `count` sequences needs of a token before it."""

    def previous(self, pieces: Pieces, restart: bool) -> tuple[Tensor, Tensor] | None:
        """What the next token needs of the last one."""


def caching_chunked(
    writes: Writes,
    u: Tensor | None,
    keys: Tensor | None,
    caching: Caching,
    shape: tuple[int, int],
    state: MemoryCachingState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, MemoryCachingState | None]:
    """Run `writes` through a cache; u and keys [B, T, H, R] in the type to compute in, `shape` is (B, T)."""
    packed = cu_seqlens is not None
    position, count = (0, 0) if state is None else (state.position, state.count)
    outputs, states = [], []
    for group in row_groups(*shape, cu_seqlens, position, count):
        sequences, tokens, position, count = group
        part = writes.select(group, packed)
        if state is None:
            held = empty_state(part, u, caching, sequences.stop - sequences.start)
        else:
            held = _select(state, sequences, position, count, caching.collapsed(writes.linear))
        if tokens.stop == tokens.start:
            states.append(held)
            continue
        y, held = _rows(part, rows_of(u, group, packed), rows_of(keys, group, packed), caching, held, tokens.stop - tokens.start)
        outputs.append(y)
        states.append(held)
    output = torch.cat(outputs, 1 if packed else 0) if len(outputs) > 1 else outputs[0]
    return output, merge_states(states) if output_final_state else None


def _select(state: MemoryCachingState, sequences: slice, position: int, count: int, collapsed: bool) -> MemoryCachingState:
    """The state of sequences that have `count` cached memories each."""
    part = map_tensors(state, lambda x: x[sequences])._replace(position=position, count=count)
    if collapsed:
        return part
    descriptors = None if part.descriptors is None else part.descriptors[:, :count]
    return part._replace(cached=tuple(x[:, :count] for x in part.cached), descriptors=descriptors)


def empty_state(writes: Writes, u: Tensor | None, caching: Caching, rows: int) -> MemoryCachingState:
    """The state of sequences before their first token."""
    memory = writes.fresh(rows)
    slots = 1 if caching.collapsed(writes.linear) else 0
    cached = tuple(w.new_zeros(w.shape[0], slots, *w.shape[1:]) for w in writes.weights(memory))
    pool = descriptors = None
    if caching.scored:
        pool = empty_pool(caching.routing, rows, u.shape[2], u.shape[3], u)
        example = describe(caching.routing, pool, 1)
        descriptors = example.new_zeros(rows, 0, *example.shape[1:])
    return MemoryCachingState(memory, cached, pool, descriptors, 0, 0, writes.before(rows))


def _rows(
    writes: Writes, u: Tensor | None, keys: Tensor | None, caching: Caching, state: MemoryCachingState, length: int
) -> tuple[Tensor, MemoryCachingState]:
    """Rows that agree in everything but their tokens."""
    pieces = Pieces(length, caching.segment_length, state.position, state.count)
    if caching.max_segments is None or len(pieces) == 1:
        return _pass(writes, u, keys, caching, state, pieces)
    outputs = []  # what a token may read depends on what was evicted before it: one segment after the other
    for start, size in zip(pieces.starts, pieces.sizes):
        span = (slice(None), slice(start, start + size))
        part = writes.select((slice(None), span[1], 0, 0), True)
        piece = Pieces(size, caching.segment_length, state.position, state.count)
        y, state = _pass(part, u[span], keys[span], caching, state, piece)
        writes = writes.after(state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _pass(
    writes: Writes, u: Tensor | None, keys: Tensor | None, caching: Caching, state: MemoryCachingState, pieces: Pieces
) -> tuple[Tensor, MemoryCachingState]:
    if caching.collapsed(writes.linear):
        y, finals, memory, cached = _read_sum(writes, pieces, state.memory, caching, state)
        pool, descriptors = None, None
    else:
        y, finals, memory, pool, descriptors = _read_each(writes, pieces, state.memory, u, keys, caching, state)
        cached = state.cached
        if pieces.closed:
            closed = (new[:, : pieces.closed] for new in finals)
            cached = tuple(torch.cat((had, new.to(had.device)), 1) for had, new in zip(cached, closed))
    if pieces.position == 0:
        memory = writes.fresh(_rows_in(state)) if caching.restart else writes.next_segment(memory)
    count = state.count + pieces.closed
    if caching.max_segments is not None and count > caching.max_segments:
        kept = _kept(caching, u[:, -1], descriptors)
        cached, descriptors, count = tuple(pick(part, kept) for part in cached), pick(descriptors, kept), caching.max_segments
    previous = writes.previous(pieces, caching.restart)
    return y, MemoryCachingState(memory, cached, pool, descriptors, pieces.position, count, previous)


def _kept(caching: Caching, u: Tensor, descriptors: Tensor) -> Tensor:
    """The slots [n, H, S] that stay, in order, when the cache is full: a head drops the segments that the last token u [n, H, R] scores
    lowest."""
    scores = cached_scores(caching.routing, u[:, None], descriptors, [0] * descriptors.shape[1])[:, 0]
    return highest(scores, caching.max_segments).sort(-1).values


def _rows_in(state: MemoryCachingState) -> int:
    return state.cached[0].shape[0]


def _read_sum(writes: Writes, pieces: Pieces, memory: Any, caching: Caching, state: MemoryCachingState):
    """Residual reads of linear memories, and the moving average: only the sum of the cached memories counts."""
    mean = caching.aggregation == "average"
    mix = SumMix(state.cached, pieces, mean)
    if writes.linear:
        y, finals, memory = writes.run(pieces, memory, caching.restart)
        rows = pieces.split(y).transpose(2, 3)
        queries = None if writes.q is None else pieces.split(writes.q).transpose(2, 3)
        y = pieces.join(mix(0, queries, rows, finals, slice(0, len(pieces))).transpose(2, 3))
    else:
        y, finals, memory = writes.run(pieces, memory, caching.restart, mix)
    cached = tuple(had + new[:, : pieces.closed].sum(1, keepdim=True) for had, new in zip(state.cached, finals))
    return y, finals, memory, cached


def _read_each(writes: Writes, pieces: Pieces, memory: Any, u, keys, caching: Caching, state: MemoryCachingState):
    readers = pieces.readers()
    pool = descriptors = online = chosen = None
    if caching.scored:
        online, pools = online_scores(caching.routing, u, keys, state.pooled, pieces)
        closing = [describe(caching.routing, pools[:, j], size)[:, None] for j, size in enumerate(pieces.segments)]
        known = torch.cat((state.descriptors, *closing), 1)
        scores = cached_scores(caching.routing, u, known[:, : len(readers)], readers)
        if caching.aggregation == "sparse" and pieces.length == 1 and len(readers) > caching.top_k:
            chosen = highest(scores[:, 0], caching.top_k)  # a single token: nothing but the chosen memories is touched
            scores, readers = scores.gather(-1, chosen[:, None]), [0] * caching.top_k
        online, gate = gates(online, scores, caching.top_k)
        descriptors = known[:, : state.count + pieces.closed]
        pool = pools[:, -1] if pieces.position else torch.zeros_like(state.pooled)
    else:  # residual reads of memories that are not linear
        first = torch.tensor(readers, device=state.cached[0].device)
        gate = (torch.arange(pieces.length, device=first.device)[:, None] >= first)[None, :, None]
        gate = gate.to(state.cached[0].dtype).expand(_rows_in(state), -1, state.cached[0].shape[2], -1)
    if caching.aggregation == "soup" and not writes.linear:
        y, finals, memory = writes.run(pieces, memory, caching.restart, SlotMix(state.cached, pieces, online, gate))
    else:
        y, finals, memory = writes.run(pieces, memory, caching.restart)
        if online is not None:
            y = online[..., None] * y
        if readers:
            if chosen is not None:
                bank = tuple(pick(had, chosen) for had in state.cached)
            else:
                cached = (had.to(y.device) for had in state.cached)
                bank = tuple(torch.cat((had, new[:, :-1]), 1) for had, new in zip(cached, finals))
            y = y + writes.read_cached(gate, bank, readers)
    return y, finals, memory, pool, descriptors


class SumMix:
    """Adds to what a layer of the online memory gives what the sum of the cached ones gives, or takes the mean of all."""

    def __init__(self, cached: Weights, pieces: Pieces, mean: bool):
        self.cached, self.had, self.mean = cached, pieces.had, mean

    def __call__(self, layer: int, rows: Tensor | None, read: Tensor, finals: Weights | None, which: slice, tokens=None) -> Tensor:
        """rows [n, P, H, L, Din] and read [n, P, H, L, Dout] of the pieces `which`; `finals` are the memories after the pieces before them
        and, where known, after themselves, [n, P', H, ...]."""
        bank = self.cached[layer] if finals is None else torch.cat((self.cached[layer], finals[layer]), 1)
        before = bank.cumsum(1)[:, which]  # what each piece finds cached, summed
        read = read + (before[:, :, :, None] if rows is None else rows @ before)  # a vector is read as it is
        if not self.mean:
            return read
        counts = torch.arange(which.start, which.stop, device=read.device) + self.had + 1
        return read / counts.to(read.dtype)[:, None, None, None]


class SlotMix:
    """Mixes what a layer of the online memory gives with what every cached memory's layer gives, by gates a token (Eq. 14, 15)."""

    def __init__(self, cached: Weights, pieces: Pieces, online: Tensor, gate: Tensor):
        self.cached, self.had, self.online, self.gate = cached, pieces.had, online, gate

    def __call__(self, layer: int, rows: Tensor, read: Tensor, finals: Weights | None, which: slice, tokens: Tensor) -> Tensor:
        """As SumMix; `tokens` [n, P, L] says which token a row belongs to."""
        bank = self.cached[layer] if finals is None else torch.cat((self.cached[layer], finals[layer]), 1)
        at = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        online, gate = (x[at, tokens].transpose(2, 3) for x in (self.online, self.gate))  # [n, P, H, L(, S)]
        total = online[..., None] * read
        for i in range(gate.shape[-1]):
            first = max(0, i - self.had + 1 - which.start)  # the piece after the one that wrote the memory in this slot
            if first < rows.shape[1]:
                y = (gate[:, first:, ..., i, None] * rows[:, first:]) @ bank[:, i, None]
                total = total + F.pad(y, (0, 0, 0, 0, 0, 0, first, 0))
        return total


@dataclass(frozen=True)
class MatrixWrites:
    """Additive or, with beta, delta writes to a matrix; with `shift`, an additive write also repeats the token before (SWLA)."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    write: Tensor | None
    shift: Tensor | None
    last: tuple[Tensor, Tensor] | None  # key and value of the token before the first, [n, H, D]
    linear = True

    def select(self, group, packed: bool) -> MatrixWrites:
        names = ("q", "k", "v", "log_decay", "beta", "write", "shift")
        last = None if self.last is None else tuple(x[group[0]] for x in self.last)
        return replace(self, **{name: rows_of(getattr(self, name), group, packed) for name in names}, last=last)

    def fresh(self, count: int) -> Tensor:
        return self.k.new_zeros(count, self.k.shape[2], self.k.shape[3], self.v.shape[3])

    def weights(self, memory: Tensor) -> Weights:
        return (memory,)

    def after(self, state: MemoryCachingState) -> MatrixWrites:
        return replace(self, last=state.previous)

    def next_segment(self, memory: Tensor) -> Tensor:
        return memory

    def before(self, count: int) -> tuple[Tensor, Tensor] | None:
        if self.shift is None:
            return None
        return self.k.new_zeros(count, *self.k.shape[2:]), self.v.new_zeros(count, *self.v.shape[2:])

    def previous(self, pieces: Pieces, restart: bool) -> tuple[Tensor, Tensor] | None:
        if self.shift is None:
            return None
        key, value = self.k[:, -1], self.v[:, -1]
        kept = 0.0 if restart and pieces.position == 0 else 1.0  # a segment that starts anew has no token before it
        return kept * key, kept * value

    def run(self, pieces: Pieces, memory: Tensor, restart: bool, mix=None) -> tuple[Tensor, Weights, Tensor]:
        tokens = {name: getattr(self, name) for name in ("q", "k", "v", "log_decay", "beta")}
        if self.write is not None:
            tokens["v"] = self.write[..., None] * self.v
        before = None
        if self.shift is not None:
            before = self._before(pieces, restart)
            before = [pieces.split(x) for x in before]
        tokens = {name: None if x is None else pieces.split(x) for name, x in tokens.items()}
        if restart:  # all at once: pieces are a batch
            others = memory.new_zeros(1, 1, *memory.shape[1:]).expand(len(memory), len(pieces) - 1, -1, -1, -1)
            starts = torch.cat((memory[:, None], others), 1)
            flat = {name: None if x is None else x.flatten(0, 1) for name, x in tokens.items()}
            y, finals = _write(flat, None if before is None else [x.flatten(0, 1) for x in before], starts.flatten(0, 1))
            y, finals = (x.unflatten(0, (len(memory), len(pieces))) for x in (y, finals))
        else:
            reads, ends = [], []
            for j in range(len(pieces)):
                piece = {name: None if x is None else x[:, j] for name, x in tokens.items()}
                y, memory = _write(piece, None if before is None else [x[:, j] for x in before], memory)
                reads.append(y)
                ends.append(memory)
            y, finals = torch.stack(reads, 1), torch.stack(ends, 1)
        return pieces.join(y), (finals,), finals[:, -1]

    def _before(self, pieces: Pieces, restart: bool) -> tuple[Tensor, Tensor]:
        """Key and gated value of the token before each, [n, T, H, D]."""
        last = self.before(len(self.k)) if self.last is None else self.last
        key, value = (torch.cat((was[:, None], x[:, :-1]), 1) for was, x in zip(last, (self.k, self.v)))
        if restart:
            first = torch.ones(pieces.length, dtype=self.k.dtype, device=self.k.device)
            first[pieces.starts[1:]] = 0
            key = first[:, None, None] * key
        return key, self.shift[..., None] * value

    def read_cached(self, gate: Tensor, bank: Weights, readers: list[int]) -> Tensor:
        return read_matrices(self.q.transpose(1, 2), gate, bank[0], readers).transpose(1, 2)


def _write(tokens: dict[str, Tensor | None], before: list[Tensor] | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One piece a row: (reads, state)."""
    q, k, v, log_decay, beta = tokens.values()
    options = {"output_final_state": True, "implementation": "chunked"}
    if beta is not None:
        return delta_rule(q, k, v, beta, log_decay, initial_state=memory, **options)
    y, last = linear_attention(q, k, v, log_decay, initial_state=memory, **options)
    if before is not None:
        again, added = linear_attention(q, *before, log_decay, **options)
        y, last = y + again, last + added
    return y, last
