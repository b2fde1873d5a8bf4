"""Memory caching on Triton: segments run as one packed batch, and a token reads earlier segments' memories through gates made on the fly.

What writes a segment is the operator of its memory (`linear_attention`, `delta_rule`) over pieces, the tokens of one segment in this call.
Around it stand kernels of this folder: `online.py` scores a token's own segment, `read.py` mixes reads of all cached memories, `select.py`
and `grouped.py` choose a few and read each for all tokens that chose it, `step.py` is the decode step. Their files count bytes and
operations; here tokens are laid out, and small sums over segments are made with torch.

Bytes a token and head of the whole forward at 128 x 128, C = 256, bf16, beside linear attention's 1,024: the pieces' last states, 256
written and read, and u, scores and the online read once more, 0.8 K: about 2.3 x linear attention's traffic, 0.55 ns at 4.3 TB/s; the
operations, a quarter of attention's at 16k tokens (read.py), are then what binds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import MAX_HEAD_DIM
from ..common.launch import CompileSpec
from ..delta_rule import delta_rule
from ..gated_scan import gated_scan
from ..linear_attention import linear_attention
from . import grouped, online, read, select, step
from .chunked import MatrixWrites, empty_state
from .grouped import group_choices, grouped_read
from .mixing import highest, pick
from .online import online_scores
from .read import check_routing, gated_read
from .routing import block_size, blocks_of, describe
from .select import select_top_k
from .state import Caching, MemoryCachingState, Pieces, map_tensors, merge_states, row_groups
from .step import step_read, step_scores

PAD = 16  # the fewest columns of a product


class Plan(NamedTuple):
    """The pieces of a call, sequence by sequence, and the memories that each may read; lists of plain numbers.

    bounds: token boundaries of the pieces. first_piece, pieces: of each sequence. sequence: of each piece. size: tokens of the piece's
    whole segment. place: tokens of it from earlier calls. bank: for every memory of the call, in its order, where it comes from: a cached
    one as n * S + slot, a piece's as N * S + piece. start, count: of each piece, the memories in `bank` that it reads. reader_start,
    reader_end: of each memory, the tokens that read it. position, closed: of each sequence after the call, open tokens, closed pieces.
    """

    bounds: list[int]
    first_piece: list[int]
    pieces: list[int]
    sequence: list[int]
    size: list[int]
    place: list[int]
    bank: list[int]
    start: list[int]
    count: list[int]
    reader_start: list[int]
    reader_end: list[int]
    position: list[int]
    closed: list[int]


@functools.lru_cache(maxsize=64)
def make_plan(
    lengths: tuple[int, ...], positions: tuple[int, ...], counts: tuple[int, ...], slots: int, segment_length: int | str
) -> Plan:
    plan = Plan([0], *([] for _ in range(12)))
    cut = [Pieces(n, segment_length, p, c) if n else None for n, p, c in zip(lengths, positions, counts)]
    known = len(lengths) * slots
    for n, pieces in enumerate(cut):
        begin, total = len(plan.sequence), 0 if pieces is None else len(pieces)
        plan.first_piece.append(begin), plan.pieces.append(total)
        plan.position.append(positions[n] if pieces is None else pieces.position)
        plan.closed.append(0 if pieces is None else pieces.closed)
        origin, end, memories = plan.bounds[-1], plan.bounds[-1] + lengths[n], len(plan.bank)
        plan.bank.extend(n * slots + i for i in range(counts[n]))
        if pieces is None:
            plan.reader_start.extend([end] * counts[n]), plan.reader_end.extend([end] * counts[n])
            continue
        plan.bank.extend(known + begin + j for j in range(total))
        readers = [origin + t for t in pieces.readers()] + [end]  # nothing in this call reads the last piece's memory
        plan.reader_start.extend(readers), plan.reader_end.extend([end] * len(readers))
        for j, length in enumerate(pieces.sizes):
            plan.bounds.append(plan.bounds[-1] + length)
            plan.sequence.append(n), plan.size.append(pieces.segments[j]), plan.place.append(positions[n] if j == 0 else 0)
            plan.start.append(memories), plan.count.append(counts[n] + j)
    return plan


@functools.lru_cache(maxsize=256)
def _on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """A list of numbers on a device, copied there once."""
    with torch.inference_mode(False):  # what is kept must serve a training step too
        return torch.tensor(numbers, dtype=torch.int64, device=device)


def _numbers(value: int | Tensor, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value.tolist())


class _Call:
    """One call's tokens in a row [1, total, ...], its plan, and what the kernels need of it on the device."""

    def __init__(self, batch: int, length: int, cu_seqlens: Tensor | None, caching: Caching, state: MemoryCachingState | None):
        if cu_seqlens is None:
            lengths = (length,) * batch
        else:
            ends = cu_seqlens.tolist()
            lengths = tuple(b - a for a, b in zip(ends, ends[1:]))
        self.sequences = len(lengths)
        position, count = (0, 0) if state is None else (state.position, state.count)
        self.counts = _numbers(count, self.sequences)
        slots = 0 if state is None else state.cached[0].shape[1]
        self.caching, self.state = caching, state
        collapsed = caching.collapsed(True)
        held = (0,) * self.sequences if collapsed else self.counts
        self.plan = make_plan(lengths, _numbers(position, self.sequences), held, 0 if collapsed else slots, caching.segment_length)

    def on(self, like: Tensor, numbers: list[int]) -> Tensor:
        return _on(like.device, tuple(numbers))

    def spread(self, values: Tensor, tokens: list[int]) -> Tensor:
        """Each value once for every one of its tokens, [total]."""
        return values.repeat_interleave(self.on(values, tokens), output_size=sum(tokens))

    def bounds(self, like: Tensor) -> Tensor:
        return self.on(like, self.plan.bounds)

    def starting(self, held: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """[P, ...] of float32 for the pieces: what sequences held [N, ...] for their first, zeros for the others; None if all are zero."""
        if held is None:
            return None
        rows = [n for n, pieces in enumerate(self.plan.pieces) if pieces]
        first = [self.plan.first_piece[n] for n in rows]
        empty = like.new_zeros(len(self.plan.sequence), *shape, dtype=torch.float32)
        return empty.index_copy(0, self.on(like, first), held[self.on(like, rows)])

    def last(self, pieces: Tensor, held: Tensor | None, fresh: bool) -> Tensor:
        """[N, ...] of the sequences: what their last piece ends with; zeros where `fresh` and the segment has closed."""
        plan = self.plan
        at = [first + count - 1 if count else 0 for first, count in zip(plan.first_piece, plan.pieces)]
        state = pieces[self.on(pieces, at)]
        none = [not count for count in plan.pieces]
        ended = [fresh and not position and bool(count) for position, count in zip(plan.position, plan.pieces)]
        for which, other in ((ended, None), (none, held)):
            if any(which):
                mask = self.on(pieces, [int(x) for x in which]).bool().view(-1, *(1,) * (state.dim() - 1))
                state = torch.where(mask, torch.zeros_like(state) if other is None else other, state)
        return state

    def shifted(self, pieces: Tensor, held: Tensor | None) -> Tensor:
        """[P, ...]: what stood in `pieces` for the piece before; for a first piece what the sequence held [N, ...], or zeros."""
        starts = self.starting(held, pieces, pieces.shape[1:])
        moved = F.pad(pieces[:-1], (0, 0) * (pieces.dim() - 1) + (1, 0))
        firsts = set(self.plan.first_piece)
        first = [int(piece in firsts) for piece in range(len(pieces))]
        mask = self.on(pieces, first).bool().view(-1, *(1,) * (pieces.dim() - 1))
        return torch.where(mask, torch.zeros_like(moved) if starts is None else starts, moved)

    def sequences_of_pieces(self, like: Tensor) -> Tensor:
        """Boundaries of the sequences in pieces, [N + 1]."""
        return self.on(like, [*self.plan.first_piece, len(self.plan.sequence)])


def memory_caching_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None,
    keys: Tensor | None,
    log_decay: Tensor | None,
    beta: Tensor | None,
    write_gate: Tensor | None,
    shift_gate: Tensor | None,
    caching: Caching,
    state: MemoryCachingState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, MemoryCachingState | None]:
    if caching.scored:
        check_routing("memory_caching", caching.routing, u.shape[3], blocks_of(caching.routing))
    batch, length = q.shape[:2]
    tensors = [q, k, v, u, keys, log_decay, beta, write_gate, shift_gate]
    if length == 1 and cu_seqlens is None and _plain_step(tensors, caching, state, output_final_state):
        return _step(*tensors, caching, state)
    if state is not None:
        state = state._replace(cached=tuple(part.to(q.device) for part in state.cached))
    if caching.max_segments is not None:
        return _capped(tensors, caching, state, output_final_state, cu_seqlens)
    return _run(tensors, caching, state, output_final_state, cu_seqlens)


def _run(tensors, caching: Caching, state: MemoryCachingState | None, keep: bool, cu_seqlens: Tensor | None):
    batch, length = tensors[0].shape[:2]
    call = _Call(batch, length, cu_seqlens, caching, state)
    shape = tensors[2].shape
    q, k, v, u, keys, log_decay, beta, write, shift = (None if x is None else x.flatten(0, 1)[None].contiguous() for x in tensors)
    score = pools = descriptors = None
    one_sweep = _energy_in_the_sweep(tensors, caching)
    if one_sweep:
        online_read, finals, score, pools = _write_and_score(call, q, k, v)
    else:
        online_read, finals = _write(call, q, k, v, log_decay, beta, write, shift)
    if caching.collapsed(True):
        y, bank = _read_sum(call, q, online_read, finals)
    else:
        bank = _bank(call, finals, None if state is None else state.cached[0])
        score, pools, described = (score, pools, pools) if one_sweep else _score(call, u, keys)
        descriptors = _bank(call, described, None if state is None else state.descriptors)
        if caching.aggregation == "sparse":
            y = _read_chosen(call, q, u, online_read, score, bank, descriptors)
        else:
            y = gated_read(q, u, online_read, score, bank, descriptors, *_readers(call, q), caching.routing)
    y = y.reshape(shape).to(q.dtype)
    return y, _final_state(call, k, v, shift, finals, bank, pools, descriptors) if keep else None


def _readers(call: _Call, like: Tensor) -> tuple[Tensor, ...]:
    plan = call.plan
    return tuple(call.on(like, x) for x in (plan.bounds, plan.start, plan.count, plan.reader_start, plan.reader_end))


def _bank(call: _Call, pieces: Tensor, cached: Tensor | None) -> Tensor:
    """All memories of the call in the plan's order, [M, ...], from the pieces' [P, ...] and those cached before [N, S, ...]."""
    if cached is None or not any(call.counts):
        return pieces
    return torch.cat((cached.flatten(0, 1), pieces))[call.on(pieces, call.plan.bank)]


def _write(call: _Call, q, k, v, log_decay, beta, write, shift) -> tuple[Tensor, Tensor]:
    """(reads of the online memory, memories after every piece [P, H, Dk, Dv])."""
    caching, state = call.caching, call.state
    held = None if state is None else state.memory
    value = v if write is None else (write[..., None] * v).to(v.dtype)
    before = None if shift is None else _before(call, k, v, shift)
    bounds = call.bounds(q)
    options = {"output_final_state": True, "implementation": "triton"}
    shape = (q.shape[2], q.shape[3], v.shape[3])
    if caching.restart:
        starts = call.starting(held, q, shape)
        if beta is not None:
            return delta_rule(q, k, v, beta, log_decay, initial_state=starts, cu_seqlens=bounds, **options)
    elif beta is not None:
        return _delta_in_turn(call, q, k, v, beta, log_decay, held)
    else:
        # A segment adds what it would write from nothing to what it found, decayed: a scan over segments gives all starts.
        own = linear_attention(q, k, value, log_decay, cu_seqlens=bounds, **options)[1]
        if before is not None:
            own = own + linear_attention(q, *before, log_decay, cu_seqlens=bounds, **options)[1]
        kept = torch.ones_like(own)
        if log_decay is not None:
            total = F.pad(log_decay[0].double().cumsum(0), (0, 0, 1, 0))
            kept = (total[bounds[1:]] - total[bounds[:-1]]).exp().to(own.dtype)[..., None, None].expand_as(own)
        ends, _ = gated_scan(
            kept.reshape(1, len(own), -1), own.reshape(1, len(own), -1), initial_state=None if held is None else held.flatten(1),
            cu_seqlens=call.sequences_of_pieces(q), implementation="triton",
        )  # fmt: skip
        starts = call.shifted(ends.view_as(own), held)
    y, finals = linear_attention(q, k, value, log_decay, initial_state=starts, cu_seqlens=bounds, **options)
    if before is not None:
        again, added = linear_attention(q, *before, log_decay, cu_seqlens=bounds, **options)
        y, finals = y + again, finals + added
    return y, finals


def _energy_in_the_sweep(tensors, caching: Caching) -> bool:
    """Whether the matrix of keys can be one more block of the memory's columns: it is read and written as the memory is."""
    q, k, v, u, keys, *gates = tensors
    plain = caching.restart and all(gate is None for gate in gates)
    return (
        plain
        and caching.scored
        and caching.routing == "energy"
        and u is q
        and keys is k
        and v.shape[3] + k.shape[3] <= MAX_HEAD_DIM
    )


def _write_and_score(call: _Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(reads of the online memory, memories after every piece, scores, pools), keys being values too: one sweep for both matrices."""
    state, heads, size = call.state, q.shape[2], (q.shape[3], v.shape[3])
    held = None if state is None else torch.cat((state.memory, state.pooled), -1)
    starts = call.starting(held, q, (heads, size[0], size[1] + size[0]))
    y, finals = linear_attention(
        q,
        k,
        torch.cat((v, k), -1),
        initial_state=starts,
        output_final_state=True,
        cu_seqlens=call.bounds(q),
        implementation="triton",
    )
    (y, z), (finals, pools) = (x.split([size[1], size[0]], -1) for x in (y, finals))
    return y.contiguous(), finals.contiguous(), (z.float() * q.float()).sum(-1), pools.contiguous()


def _before(call: _Call, k: Tensor, v: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Key and gated value of the token before each; none before a sequence's first, and with restart before a segment's."""
    previous = None if call.state is None else call.state.previous
    key, value = (F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)) for x in (k, v))
    plan = call.plan
    rows = [n for n, pieces in enumerate(plan.pieces) if pieces]
    at = call.on(k, [plan.bounds[plan.first_piece[n]] for n in rows])
    first = [torch.zeros_like(x[0, at]) if previous is None else held[call.on(k, rows)].to(x.dtype)
             for x, held in zip((k, v), previous or (None, None))]  # fmt: skip
    key, value = (x.index_copy(1, at, new[None]) for x, new in zip((key, value), first))
    if call.caching.restart:
        others = [bound for bound in plan.bounds[:-1] if bound not in {plan.bounds[plan.first_piece[n]] for n in rows}]
        key = key.index_fill(1, call.on(k, others), 0)
    return key, (shift[..., None] * value).to(v.dtype)


def _delta_in_turn(call: _Call, q, k, v, beta, log_decay, held: Tensor | None) -> tuple[Tensor, Tensor]:
    """Delta writes that go on from segment to segment: all sequences' first pieces, then their second ones, and so on."""
    plan = call.plan
    memory = q.new_zeros(call.sequences, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32) if held is None else held
    reads, places, finals, order = [], [], [], []
    for j in range(max(plan.pieces)):
        rows = [n for n, pieces in enumerate(plan.pieces) if pieces > j]
        spans = [(plan.bounds[plan.first_piece[n] + j], plan.bounds[plan.first_piece[n] + j + 1]) for n in rows]
        at = call.on(q, [t for a, b in spans for t in range(a, b)])
        bounds = call.on(q, [0, *torch.tensor([b - a for a, b in spans]).cumsum(0).tolist()])
        tokens = (None if x is None else x[:, at] for x in (q, k, v, beta, log_decay))
        index = call.on(q, rows)
        y, last = delta_rule(
            *tokens, initial_state=memory[index], output_final_state=True, cu_seqlens=bounds, implementation="triton"
        )
        memory = memory.index_copy(0, index, last)
        reads.append(y), places.append(at), finals.append(last)
        order.extend(plan.first_piece[n] + j for n in rows)
    y = torch.cat(reads, 1)[:, torch.cat(places).argsort()]
    return y, torch.cat(finals)[call.on(q, order).argsort()]


def _score(call: _Call, u: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scores of the token's own segment [1, total, H], pools after every piece [P, H, rows, R], their descriptors)."""
    caching, plan = call.caching, call.plan
    routing = caching.routing
    held = None if call.state is None else call.state.pooled
    rows = u.shape[3] if routing == "energy" else blocks_of(routing)
    carried = call.starting(held, u, (u.shape[2], rows, u.shape[3]))
    if routing == "energy":
        z, pools = linear_attention(
            u, keys, keys, initial_state=carried, output_final_state=True, cu_seqlens=call.bounds(u), implementation="triton"
        )
        return (z.float() * u.float()).sum(-1), pools, pools
    if routing == "mean":
        sums = None if carried is None else carried[:, :, 0].contiguous()
        score, sums = online_scores(u, keys, call.bounds(u), sums, None if sums is None else call.on(u, plan.place))
        pools = sums[:, :, None]
    else:
        score, pools = _block_scores(call, u, keys, carried)
    if len(set(plan.size)) == 1:
        return score, pools, describe(routing, pools, plan.size[0])
    return score, pools, torch.stack([describe(routing, pool, size) for pool, size in zip(pools, plan.size)])


def _block_scores(call: _Call, u: Tensor, keys: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores by the largest of the sub-blocks' means so far, and the sums of the sub-blocks' keys [P, H, blocks, R]."""
    plan, blocks = call.plan, blocks_of("submax")
    bounds, places, owners, slots = [0], [], [], []
    for p, (a, b) in enumerate(zip(plan.bounds, plan.bounds[1:])):
        size, place = block_size(plan.size[p], blocks), plan.place[p]
        while a < b:
            taken = min(size - place % size, b - a)
            bounds.append(bounds[-1] + taken)
            owners.append(p), slots.append(place // size), places.append(place % size)
            a, place = a + taken, place + taken
    owner, slot = call.on(u, owners), call.on(u, slots)
    sums = None if carried is None else carried.transpose(1, 2)[owner, slot].contiguous()
    score, sums = online_scores(u, keys, call.on(u, bounds), sums, None if sums is None else call.on(u, places))
    pools = u.new_zeros(len(plan.sequence), u.shape[2], blocks, u.shape[3], dtype=torch.float32) if carried is None else carried
    pools = pools.transpose(1, 2).index_put((owner, slot), sums).transpose(1, 2)
    sizes = call.on(u, [block_size(size, blocks) for size in plan.size]).to(torch.float32)
    whole = F.pad(pools.transpose(2, 3) / sizes[:, None, None, None], (0, PAD - blocks)).contiguous()  # [P, H, R, PAD]
    tokens = [b - a for a, b in zip(bounds, bounds[1:])]
    own, block = (call.spread(x, tokens) for x in (owner, slot))
    own = own[None, :, None, None].expand(1, -1, u.shape[2], 1).contiguous()
    earlier = torch.arange(PAD, device=u.device) < block[:, None, None]
    means = grouped_read(u, own, whole)[0, :, :, 0].float().masked_fill(~earlier, -torch.inf).amax(-1)
    return torch.maximum(score, means[None]), pools


def _read_chosen(call: _Call, q, u, online_read, score, bank, descriptors) -> Tensor:
    """Sparse reads: the tokens that chose a memory read it together."""
    caching, plan = call.caching, call.plan
    bounds, start, count = _readers(call, q)[:3]
    if not any(plan.count):
        return online_read
    ids = select_top_k(u, descriptors, bounds, start, count, caching.top_k, caching.routing)
    groups = group_choices(ids, bank.shape[0])
    if caching.routing == "energy":
        chosen = (grouped_read(u, ids, descriptors, groups).float() * u[:, :, :, None].float()).sum(-1)
    else:
        rows = descriptors[:, :, None] if caching.routing == "mean" else descriptors
        columns = F.pad(rows.transpose(2, 3), (0, PAD - rows.shape[2])).contiguous()
        chosen = grouped_read(u, ids, columns, groups)[..., : rows.shape[2]].float().amax(-1)
    chosen = chosen.masked_fill(ids < 0, -torch.inf)
    gates = torch.cat((score[..., None], chosen), -1).softmax(-1)
    reads = grouped_read(q, ids, bank, groups)
    return gates[..., :1] * online_read + (gates[..., 1:, None] * reads).sum(3)


def _read_sum(call: _Call, q: Tensor, online_read: Tensor, finals: Tensor) -> tuple[Tensor, Tensor]:
    """(reads of the online memory and the sum of the cached ones, or their mean; that sum after every piece)."""
    plan = call.plan
    held = None if call.state is None else call.state.cached[0][:, 0]
    sums, _ = gated_scan(
        torch.ones_like(finals).reshape(1, len(finals), -1), finals.reshape(1, len(finals), -1),
        initial_state=None if held is None else held.flatten(1), cu_seqlens=call.sequences_of_pieces(q), implementation="triton",
    )  # fmt: skip
    before = call.shifted(sums.view_as(finals), held)
    pieces = list(range(len(finals)))
    y = gated_read(
        q, None, online_read, None, before, None, call.bounds(q), call.on(q, pieces), call.on(q, [1] * len(pieces)),
        call.on(q, plan.bounds[:-1]), call.on(q, plan.bounds[1:]), None,
    )  # fmt: skip
    if call.caching.aggregation == "average":
        memories = [1 + call.counts[n] + p - plan.first_piece[n] for p, n in enumerate(plan.sequence)]
        lengths = [b - a for a, b in zip(plan.bounds, plan.bounds[1:])]
        share = call.spread(call.on(q, memories), lengths)
        y = y / share[:, None, None].to(y.dtype)
    return y, sums.view_as(finals)


def _final_state(call: _Call, k, v, shift, finals, bank, pools, descriptors) -> MemoryCachingState:
    caching, plan, state = call.caching, call.plan, call.state
    held = (lambda name: None) if state is None else (lambda name: getattr(state, name))
    memory = call.last(finals, held("memory"), caching.restart)
    counts = [count + closed for count, closed in zip(call.counts, plan.closed)]

    def numbers(values: list[int]) -> int | Tensor:
        return values[0] if len(set(values)) == 1 else torch.tensor(values, device=finals.device)

    if caching.collapsed(True):
        at = [first + closed - 1 for first, closed in zip(plan.first_piece, plan.closed)]
        total = bank[call.on(bank, [max(x, 0) for x in at])]
        none = call.on(bank, [int(closed == 0) for closed in plan.closed]).bool().view(-1, 1, 1, 1)
        total = torch.where(none, torch.zeros_like(total) if state is None else state.cached[0][:, 0], total)
        cached, described, pool = total[:, None], None, None
    else:
        # A sequence's memories in the bank are those it had and one a piece, of which the closed ones stay; zeros fill up shorter caches.
        ends = list(itertools.accumulate((had + pieces for had, pieces in zip(call.counts, plan.pieces)), initial=0))
        most = max(counts)
        index = call.on(bank, [start + i if i < count else ends[-1] for start, count in zip(ends, counts) for i in range(most)])
        cached, described = (
            F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1))[index].unflatten(0, (call.sequences, most)) for x in (bank, descriptors)
        )
        pool = call.last(pools, held("pooled"), True)
    previous = None
    if shift is not None:
        tokens = call.on(k, [bound - 1 for bound in plan.bounds[1:]])
        was = held("previous") or (None, None)
        previous = tuple(call.last(x[0, tokens].float(), old, caching.restart) for x, old in zip((k, v), was))
    return MemoryCachingState(memory, (cached,), pool, described, numbers(plan.position), numbers(counts), previous)


def _capped(tensors, caching: Caching, state: MemoryCachingState | None, keep: bool, cu_seqlens: Tensor | None):
    """One segment after the other, since what a token may read depends on what was dropped before it."""
    batch, length = tensors[0].shape[:2]
    position, count = (0, 0) if state is None else (state.position, state.count)
    outputs, states = [], []
    for sequences, tokens, place, cached in row_groups(batch, length, cu_seqlens, position, count):
        held = None if state is None else map_tensors(state, lambda x, s=sequences: x[s])._replace(position=place, count=cached)
        if held is not None:
            held = held._replace(cached=(held.cached[0][:, :cached],), descriptors=held.descriptors[:, :cached])
        if tokens.stop == tokens.start:
            states.append(held if held is not None else empty_state(_writes(tensors), tensors[3].float(), caching, 1))
            continue
        rows = [None if x is None else x[:, tokens] if cu_seqlens is not None else x[sequences] for x in tensors]
        pieces = Pieces(tokens.stop - tokens.start, caching.segment_length, place, cached)
        parts = []
        for start, size in zip(pieces.starts, pieces.sizes):
            part = [None if x is None else x[:, start : start + size] for x in rows]
            y, held = _run(part, caching, held, True, None)
            if held.count > caching.max_segments:
                scores = step_scores(
                    part[3][:, -1].detach(), held.descriptors.detach(), _on(y.device, (held.count,) * len(y)), caching.routing
                )
                kept = highest(scores, caching.max_segments).sort(-1).values
                held = held._replace(
                    cached=(pick(held.cached[0], kept),), descriptors=pick(held.descriptors, kept), count=caching.max_segments
                )
            parts.append(y)
        outputs.append(torch.cat(parts, 1))
        states.append(held)
    output = torch.cat(outputs, 0 if cu_seqlens is None else 1)
    return output, merge_states(states) if keep else None


def _writes(tensors) -> MatrixWrites:
    q, k, v, _, _, *gates = tensors
    return MatrixWrites(q, k.float(), v.float(), *gates, None)


def _plain_step(tensors, caching: Caching, state: MemoryCachingState | None, keep: bool) -> bool:
    """Whether a call is a decode step of sequences that agree in place and count, without gradients."""
    if state is None or not keep or not caching.scored or not isinstance(state.position, int) or not isinstance(state.count, int):
        return False
    held = (state.memory, *state.cached, state.pooled, state.descriptors)
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, *held)))


def _step(q, k, v, u, keys, log_decay, beta, write, shift, caching: Caching, state: MemoryCachingState):
    """One token a sequence: write it, score every descriptor, read the chosen memories and no other."""
    routing, place = caching.routing, state.position
    options = {"initial_state": state.memory, "output_final_state": True, "implementation": "triton"}
    if beta is not None:
        own, memory = delta_rule(q, k, v, beta, log_decay, **options)
    else:
        own, memory = linear_attention(q, k, v if write is None else (write[..., None] * v).to(v.dtype), log_decay, **options)
        if shift is not None:
            key, value = (x[:, None].to(k.dtype) for x in state.previous)
            options["initial_state"] = torch.zeros_like(memory)
            again, added = linear_attention(q, key, (shift[..., None] * value).to(v.dtype), log_decay, **options)
            own, memory = own + again, memory + added
    if routing == "energy":
        options["initial_state"] = state.pooled
        z, pool = linear_attention(u, keys, keys, **options)
        score = (z[:, 0].float() * u[:, 0].float()).sum(-1)
    else:
        size = block_size(caching.segment_length, blocks_of(routing))
        block = place // size
        pool = state.pooled.clone()
        pool[:, :, block] += keys[:, 0].float()
        scores = (pool[:, :, : block + 1] * u[:, 0, :, None].float()).sum(-1)
        # Counts as plain numbers: a copy from the host could not be captured in a CUDA graph.
        score = torch.cat((scores[..., :block] / size, scores[..., block:] / (place % size + 1)), -1).amax(-1)
    y = own[:, 0]
    sequences, slots = len(q), state.count
    if slots:
        count = _on(q.device, (slots,) * sequences)
        scores = step_scores(u[:, 0].contiguous(), state.descriptors, count, routing)
        if caching.aggregation == "sparse" and slots > caching.top_k:
            ids = highest(scores, caching.top_k)
            scores = scores.gather(-1, ids)
        else:
            ids = torch.arange(slots, device=q.device).expand(sequences, q.shape[2], -1).contiguous()
        gates = torch.cat((score[..., None], scores), -1).softmax(-1)
        bank = state.cached[0]
        if bank.device != q.device:  # offloaded: the chosen memories alone come over
            bank, ids = pick(bank, ids), torch.arange(ids.shape[2], device=q.device).expand_as(ids).contiguous()
        y = step_read(q[:, 0].contiguous(), gates[..., 1:].contiguous(), ids, bank, y.contiguous(), gates[..., 0].contiguous())
    cached, descriptors, position, total = state.cached[0], state.descriptors, place + 1, slots
    previous = None if shift is None else (k[:, 0].float(), v[:, 0].float())
    if position == caching.segment_length:
        closed = describe(routing, pool, caching.segment_length)[:, None]
        cached = torch.cat((cached, memory[:, None].to(cached.device)), 1)
        descriptors, position, total = torch.cat((descriptors, closed), 1), 0, slots + 1
        if caching.max_segments is not None and total > caching.max_segments:
            scores = step_scores(u[:, 0].contiguous(), descriptors, _on(q.device, (total,) * sequences), routing)
            kept = highest(scores, caching.max_segments).sort(-1).values
            home = cached.device
            cached, descriptors, total = pick(cached, kept).to(home), pick(descriptors, kept), caching.max_segments
        pool = torch.zeros_like(pool)
        if caching.restart:
            memory = torch.zeros_like(memory)
            previous = None if previous is None else tuple(torch.zeros_like(x) for x in previous)
    return y[:, None], MemoryCachingState(memory, (cached,), pool, descriptors, position, total, previous)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry of the kernels in this folder for one compute capability."""
    for part in (read, online, grouped, select, step):
        yield from part.compile_specs(capability)
