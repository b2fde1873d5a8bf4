"""The definition of memory caching: one sequence and one token at a time, for any memory that can be written, cached and read.

Write, then read: the online memory has token t, and so has the open segment's descriptor. A closed segment's memory never changes again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..delta_rule.reference import delta_rule_reference
from .state import BLOCKS, LOG, Caching, MemoryCachingState, map_tensors, merge_states

Weights = tuple[Tensor, ...]


@dataclass(frozen=True)
class Memory:
    """One kind of memory; every tensor of a state leads with a sequence axis of size 1."""

    fresh: Callable[[], Any]  # the state that a segment starts from
    write: Callable[[Any, Any, int, int], Any]  # (state, what the token before left, row, token): the state after the token
    weights: Callable[[Any], Weights]  # what is cached of a state
    read: Callable[
        [Weights, int, int], Tensor
    ]  # (weights, row, token): what a memory of these weights holds for the token, [1, H, Dv]
    carry: Callable[[Any], Any]  # the state of a segment that goes on where the one before ended
    linear: bool
    previous: Callable[[int, int], Any] = lambda row, token: None  # what the next write needs of this token
    before: Callable[[], Any] = lambda: None  # the same before a segment's first token


def block_size(segment_length: int) -> int:
    """Tokens of a sub-block of `submax`."""
    return -(-segment_length // BLOCKS)


def pooled(routing: str, pool: Tensor, k: Tensor, place: int, segment_length: int) -> Tensor:
    """The pool [1, H, rows, R] with one more key [1, H, R], the `place`-th of its segment."""
    if routing == "energy":
        return pool + k[..., :, None] * k[..., None, :]
    block = place // block_size(segment_length) if routing == "submax" else 0
    return torch.cat((pool[:, :, :block], pool[:, :, block : block + 1] + k[:, :, None], pool[:, :, block + 1 :]), 2)


def score(routing: str, u: Tensor, pool: Tensor, tokens: int, segment_length: int) -> Tensor:
    """r [1, H] of a segment with this pool and number of tokens, for u [1, H, R]."""
    if routing == "energy":
        return torch.einsum("nhr,nhrs,nhs->nh", u, pool, u)
    size = block_size(segment_length) if routing == "submax" else segment_length
    counts = [min(size, tokens - start) for start in range(0, tokens, size)]
    return torch.stack([(u * pool[:, :, s] / count).sum(-1) for s, count in enumerate(counts)]).amax(0)


def segments(length: int, segment_length: int | str, position: int) -> list[int]:
    """The length of the segment that each token is in."""
    if segment_length != LOG:
        return [segment_length] * length
    return [1 << bit for bit in reversed(range(length.bit_length())) if length >> bit & 1 for _ in range(1 << bit)]


def caching_reference(
    memory: Memory,
    u: Tensor | None,
    keys: Tensor | None,
    caching: Caching,
    shape: tuple[int, int],
    state: MemoryCachingState | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, MemoryCachingState]:
    """(outputs of all tokens in order [tokens, H, Dv], state); u and keys [B, T, H, R] or packed, `shape` is (B, T)."""
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    rows = [(b, range(shape[1])) for b in range(shape[0])] if ends is None else [(0, range(a, b)) for a, b in pairwise(ends)]
    outputs, states = [], []
    for n, (row, tokens) in enumerate(rows):
        online, cached, pools, position, count, previous = _start(memory, caching, state, n)
        pool = None
        if caching.scored:
            pool = _empty(caching.routing, u) if state is None else state.pooled[n : n + 1]
        for t, size in zip(tokens, segments(len(tokens), caching.segment_length, position)):
            online = memory.write(online, previous, row, t)
            previous = memory.previous(row, t)
            weights = memory.weights(online)
            if caching.scored:
                pool = pooled(caching.routing, pool, keys[row, t][None], position, size)
                own = score(caching.routing, u[row, t][None], pool, position + 1, size)
                others = [score(caching.routing, u[row, t][None], p, length, length) for p, length in pools]
                outputs.append(_gated(memory, caching, weights, cached, own, others, row, t))
            elif caching.aggregation == "residual":
                outputs.append(memory.read(weights, row, t) + sum(memory.read(w, row, t) for w in cached))
            else:
                mean = tuple(sum(parts) / (count + 1) for parts in zip(weights, *cached))
                outputs.append(memory.read(mean, row, t))
            position += 1
            if position == size:
                cached.append(weights)
                if caching.scored:
                    pools.append((pool, size))
                    pool = torch.zeros_like(pool)
                if caching.max_segments is not None and len(cached) > caching.max_segments:
                    cached, pools = _evict(caching, cached, pools, u[row, t][None])
                if caching.collapsed(memory.linear):
                    cached = [tuple(sum(parts) for parts in zip(*cached))]
                online = memory.fresh() if caching.restart else memory.carry(online)
                previous = memory.before() if caching.restart else previous
                position, count = 0, min(count + 1, caching.max_segments or count + 1)
        states.append(_end(memory, caching, u, online, cached, pool, pools, position, count, previous))
    return torch.cat(outputs), merge_states(states)


def _gated(memory: Memory, caching: Caching, weights: Weights, cached: list[Weights], own, others, row: int, t: int) -> Tensor:
    """Gates by softmax over the chosen segments and the open one, on what their memories give or on their weights."""
    if caching.aggregation == "sparse" and len(cached) > caching.top_k:
        order = torch.stack(others, -1).sort(dim=-1, descending=True, stable=True).indices[..., : caching.top_k]
        keep = torch.zeros_like(torch.stack(others, -1), dtype=torch.bool).scatter(-1, order, True)
        others = [r.masked_fill(~keep[..., i], -torch.inf) for i, r in enumerate(others)]
    gates = torch.stack((own, *others), -1).softmax(-1).unbind(-1)
    memories = [weights, *cached]
    if caching.aggregation == "soup":
        mixed = tuple(
            sum(g.reshape(*g.shape, *(1,) * (part.dim() - 2)) * part for g, part in zip(gates, parts)) for parts in zip(*memories)
        )
        return memory.read(mixed, row, t)
    return sum(g[..., None] * memory.read(w, row, t) for g, w in zip(gates, memories))


def _evict(caching: Caching, cached: list[Weights], pools: list[tuple[Tensor, int]], u: Tensor) -> tuple[list, list]:
    """The cache without the segment that u [1, H, R] scores lowest (the latest of equal ones), each head by itself."""
    scores = torch.stack([score(caching.routing, u, pool, size, size) for pool, size in pools], -1)
    drop = scores.shape[-1] - 1 - scores.flip(-1).argmin(-1)  # [1, H]

    def without(parts: list[Tensor]) -> list[Tensor]:
        dropped = drop.reshape(*drop.shape, *(1,) * (parts[0].dim() - 2))
        return [torch.where(dropped > i, first, second) for i, (first, second) in enumerate(pairwise(parts))]

    sizes = [size for _, size in pools[1:]]
    kept = zip(*(without(list(part)) for part in zip(*cached)))
    return list(kept), list(zip(without([pool for pool, _ in pools]), sizes))


def _empty(routing: str, u: Tensor) -> Tensor:
    rows = {"energy": u.shape[3], "submax": BLOCKS, "mean": 1}[routing]
    return u.new_zeros(1, u.shape[2], rows, u.shape[3])


def _start(memory: Memory, caching: Caching, state: MemoryCachingState | None, n: int):
    if state is None:
        return memory.fresh(), [], [], 0, 0, memory.before()
    position, count = (x if isinstance(x, int) else int(x[n]) for x in (state.position, state.count))
    slots = 1 if caching.collapsed(memory.linear) else count
    cached = [tuple(part[n : n + 1, i] for part in state.cached) for i in range(slots)]
    pools = []
    if caching.scored:
        pools = [(_pool(caching, state.descriptors[n : n + 1, i]), caching.segment_length) for i in range(count)]
    online, previous = (map_tensors(x, lambda t: t[n : n + 1]) for x in (state.memory, state.previous))
    return online, cached, pools, position, count, previous


def _pool(caching: Caching, described: Tensor) -> Tensor:
    """The pool of a closed segment from its descriptor: sums from means."""
    if caching.routing == "energy":
        return described
    if caching.routing == "mean":
        return described[:, :, None] * caching.segment_length
    size = block_size(caching.segment_length)
    counts = [max(0, min(size, caching.segment_length - s * size)) for s in range(BLOCKS)]
    return described * described.new_tensor(counts)[:, None]


def _described(caching: Caching, pool: Tensor, length: int) -> Tensor:
    if caching.routing == "energy":
        return pool
    if caching.routing == "mean":
        return pool[:, :, 0] / length
    size = block_size(length)
    counts = [max(0, min(size, length - s * size)) for s in range(BLOCKS)]
    last = max(s for s, count in enumerate(counts) if count)  # empty sub-blocks repeat the last one
    return torch.stack([pool[:, :, min(s, last)] / counts[min(s, last)] for s in range(BLOCKS)], 2)


def _end(memory, caching, u, online, cached, pool, pools, position, count, previous) -> MemoryCachingState:
    example = memory.weights(online)
    if caching.collapsed(memory.linear) and not cached:
        cached = [tuple(torch.zeros_like(w) for w in example)]
    stacked = tuple(
        torch.stack([w[i] for w in cached], 1) if cached else part.new_zeros(1, 0, *part.shape[1:])
        for i, part in enumerate(example)
    )
    descriptors = None
    if caching.scored:
        described = [_described(caching, p, length) for p, length in pools]
        empty = _described(caching, _empty(caching.routing, u), 1)
        descriptors = torch.stack(described, 1) if described else empty.new_zeros(1, 0, *empty.shape[1:])
    return MemoryCachingState(online, stacked, pool, descriptors, position, count, previous)


def matrix_memory(q, k, v, log_decay, beta, write, shift) -> Memory:
    """The matrix memory: additive writes, of the token before too with `shift`, or delta writes with `beta`."""
    heads, key_dim, value_dim = q.shape[2], q.shape[3], v.shape[3]

    def one(x: Tensor | None, row: int, t: int) -> Tensor | None:
        return None if x is None else x[row : row + 1, t : t + 1]

    def write_token(state: Tensor, previous: tuple[Tensor, Tensor] | None, row: int, t: int) -> Tensor:
        q_t, k_t, v_t, g_t = (one(x, row, t) for x in (q, k, v, log_decay))
        if beta is not None:
            return delta_rule_reference(q_t, k_t, v_t, one(beta, row, t), g_t, 1.0, state, True, None)[1]
        if g_t is not None:
            state = g_t[:, 0, :, None, None].exp() * state
        strength = 1.0 if write is None else write[row, t][:, None, None]
        state = state + strength * k_t[:, 0, :, :, None] * v_t[:, 0, :, None, :]
        if previous is not None:
            key, value = previous
            state = state + shift[row, t][:, None, None] * key[:, :, :, None] * value[:, :, None, :]
        return state

    def last(row: int, t: int) -> tuple[Tensor, Tensor] | None:
        return None if shift is None else (k[row, t][None], v[row, t][None])

    def before() -> tuple[Tensor, Tensor] | None:
        return None if shift is None else (q.new_zeros(1, heads, key_dim), q.new_zeros(1, heads, value_dim))

    return Memory(
        fresh=lambda: q.new_zeros(1, heads, key_dim, value_dim),
        write=write_token,
        weights=lambda state: (state,),
        read=lambda weights, row, t: torch.einsum("hd,nhde->nhe", q[row, t], weights[0]),
        carry=lambda state: state,
        linear=True,
        previous=last,
        before=before,
    )
