"""Triton kernels of linear attention: one sweep that serves the forward and all three gradients, and a decode step.

A sequence is cut into spans so that the chip is full even with few heads. (1) `_local_kernel` forms the state that each span adds by
itself, reading k and v once; (2) `_combine_kernel` steps through the spans and leaves the state at each one's start, in float32;
(3) `_sweep_kernel` goes through every span in chunks with a [D, tile] piece of the state in registers and writes outputs as it goes.
With one span, (1) and (2) fall away. No state but those at span boundaries ever reaches memory.

With a the running sum of log-decays, all four results are the same sum over earlier (or later) tokens:

    y_i  = sum_{j <= i} e^{a_i - a_j} (q_i . k_j)  v_j        dq_i = sum_{j <= i} e^{a_i - a_j} (dy_i . v_j) k_j
    dv_j = sum_{i >= j} e^{a_i - a_j} (k_j . q_i) dy_i        dk_j = sum_{i >= j} e^{a_i - a_j} (v_j . dy_i) q_i

so one kernel, given (q, k, v), (dy, v, k), (k, q, dy) or (v, dy, q) as queries, keys and values, computes them all, forwards or
backwards in time, with a tile of the values' columns each: nothing is summed across programs. The normaliser is one more column of v
that is always 1, whose gradient is the slope -(dy . y) / den; dy is divided by den. The decay's gradient is
dg_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s) + <S, dS> at the end of t's span.

Bytes a token and head in bf16: the floor is 2 (2 Dk + 2 Dv), 1,024 at 128 x 128, 0.24 ns at 4.3 TB/s; (1) reads k and v again, and
the boundary states add 16 Dk Dv / span. The backward reads eleven rows and writes three, and reads two more in (1), where four and
three are the least. Operations with chunks of C = 64: 2 C Dk + (2 C + 4 Dk) tile for each of Dv / tile tiles: 115 kFLOP at 128 x 128
and tile 64, 0.15 ns at 790 TFLOP/s: bound by memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dispatch import interpreting
from ..common.launch import CompileSpec, Launch, LaunchTable, capability_of, next_power_of_2
from ..common.packing import chunk_indices
from .chunked import MIN_LOG_DECAY as LOWEST
from .reference import NORMALIZER_EPSILON

# Keyed by the padded size that the sweep's first product contracts, in units of two bytes: float32 counts double. A chunk is BT tokens,
# of which BS are scored and written at a time; a tile is BC columns of the state. The state's tile, [size, BC] in float32, must stay in
# registers, and the normaliser costs some more.
PLAIN = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 64}),
    (128, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 32}),
    (128, 90): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 64}),
    (256, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 16}),
    (256, 90): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 32}),
    (512, 80): Launch(num_warps=4, num_stages=1, blocks={"BT": 32, "BS": 32, "BC": 16}),
})  # fmt: skip
NORMALIZED = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 32}),
    (64, 90): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 64}),
    (128, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 32}),
    (256, 80): Launch(num_warps=8, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 16}),
    (512, 80): Launch(num_warps=4, num_stages=1, blocks={"BT": 32, "BS": 32, "BC": 16}),
})  # fmt: skip
NORMALIZED_BACKWARD = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 32}),
    (64, 90): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 64}),
    (128, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 32}),
    (256, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BS": 32, "BC": 16}),
    (512, 80): Launch(num_warps=4, num_stages=1, blocks={"BT": 32, "BS": 32, "BC": 16}),
})  # fmt: skip
LOCAL = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=3, blocks={"BT": 64, "BC": 64}),
    (128, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BC": 32}),
    (128, 90): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BC": 64}),
    (256, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BC": 16}),
    (256, 90): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BC": 32}),
    (512, 80): Launch(num_warps=4, num_stages=1, blocks={"BT": 32, "BC": 16}),
})  # fmt: skip
STEP = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BC": 64}),
    (128, 80): Launch(num_warps=4, num_stages=1, blocks={"BC": 32}),
    (256, 80): Launch(num_warps=4, num_stages=1, blocks={"BC": 16}),
})  # fmt: skip
ANY = 2**31
COMBINE = LaunchTable({(ANY, 80): Launch(num_warps=4, num_stages=1, blocks={"BE": 512})})
SLOPE = LaunchTable({(256, 80): Launch(num_warps=4, num_stages=1, blocks={"BT": 16})})
DECAY = LaunchTable({(ANY, 80): Launch(num_warps=4, num_stages=1, blocks={"BT": 256, "BH": 4})})

SPAN_STEP = 64  # spans are whole numbers of chunks
MIN_SPAN = 512  # shorter spans would move more bytes as boundary states than as tokens
MAX_DECAY_SPAN = 16_384  # the decay's gradient is a running sum over a span, exact again at its end
PROGRAMS_PER_MULTIPROCESSOR = 2
MIN_LOG_DECAY = tl.constexpr(LOWEST)
EPSILON = tl.constexpr(NORMALIZER_EPSILON)
# What one sweep computes; the last two go backwards in time.
Y, DQ, DK, DV = (tl.constexpr(i) for i in range(4))


@triton.jit
def _locate(cu_seqlens, spans, p, T, SPAN, VARLEN: tl.constexpr, ONE_SPAN: tl.constexpr):
    """(first row in memory of span p's sequence, first token of the span in its sequence, token after its last); none if idle."""
    if VARLEN:
        if ONE_SPAN:
            n = p
            start = p * 0
        else:
            n = tl.load(spans + p * 2)
            start = tl.load(spans + p * 2 + 1) * SPAN
        first = tl.load(cu_seqlens + tl.maximum(n, 0)).to(tl.int64)
        length = (tl.load(cu_seqlens + tl.maximum(n, 0) + 1).to(tl.int64) - first).to(tl.int32)
        length = tl.where(n < 0, 0, length)
    else:
        count = tl.cdiv(T, SPAN)
        first = (p // count).to(tl.int64) * T
        start = (p % count) * SPAN
        length = T
    return first, start, tl.minimum(start + SPAN, length)


@triton.jit
def _tile(x, origin, H: tl.constexpr, r, columns, inside, D: tl.constexpr, BD: tl.constexpr):
    """Rows r after row-and-head `origin` of x [tokens, H, D], zero outside; float16 is widened, since a long sum overflows it."""
    mask = inside[:, None]
    if D % BD:
        mask = mask & (columns < D)[None, :]
    value = tl.load(x + origin * D + (r[:, None] * (H * D) + columns[None, :]), mask=mask, other=0.0)
    if value.dtype == tl.float16:
        value = value.to(tl.float32)
    return value


@triton.jit
def _sums(log_decay, origin, H: tl.constexpr, r, inside):
    """Sums of log-decay over one chunk: from its start to each token, and in total."""
    g = tl.maximum(tl.load(log_decay + origin + r * H, mask=inside, other=0.0), MIN_LOG_DECAY)
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def _sixteen(column, like):
    """A column repeated 16 times, the least a product can have, in another tensor's type."""
    return tl.broadcast_to(column[:, None], (column.shape[0], 16)).to(like.dtype)


@triton.jit(do_not_specialize=["T", "SPAN", "tokens"])
def _sweep_kernel(
    queries, keys, values, log_decay, inverse, slope, other, out, dots, states, last_states, cu_seqlens, spans,
    T, SPAN, tokens, scale,
    ROLE: tl.constexpr, H: tl.constexpr, DA: tl.constexpr, DC: tl.constexpr, SIZE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_STATE: tl.constexpr, STORE_LAST: tl.constexpr, VARLEN: tl.constexpr, ONE_SPAN: tl.constexpr,
    PRECISION: tl.constexpr, BA: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One span of one head and one tile of the values' columns: queries, keys [tokens, H, DA], values, out, other [tokens, H, DC].

    `states` are those at the span's start, or going backwards the gradients at its end; `dots` is sum(out * other) over the tile.
    """
    REVERSE: tl.constexpr = ROLE == DK or ROLE == DV
    TILES: tl.constexpr = (DC + BC - 1) // BC
    tile = tl.program_id(0) % TILES
    h = (tl.program_id(0) // TILES) % H
    p = tl.program_id(0) // (TILES * H)
    first, start, stop = _locate(cu_seqlens, spans, p, T, SPAN, VARLEN, ONE_SPAN)
    rows = tl.arange(0, BA)
    columns = tile * BC + tl.arange(0, BC)

    # The state is [Dk, Dv] in memory, followed by z [Dk]; for dq and dk the kernel holds its transpose.
    at = (p.to(tl.int64) * H + h) * SIZE
    if ROLE == Y or ROLE == DV:
        place = rows[:, None] * DC + columns[None, :]
    else:
        place = columns[None, :] * DA + rows[:, None]
    within = (rows < DA)[:, None] & (columns < DC)[None, :]
    state = tl.zeros((BA, BC), tl.float32)
    # z is a slice of columns for dq and dk; for y it is 16 equal columns beside the state, as small as a product can be.
    if ROLE == Y:
        norm_place = DA * DC + rows[:, None] + tl.zeros((BA, 16), tl.int32)
        norm_within = (rows < DA)[:, None]
        norm = tl.zeros((BA, 16), tl.float32)
    else:
        norm_place = DA * DC + columns
        norm_within = columns < DC
        norm = tl.zeros((BC,), tl.float32)
    if HAS_STATE:
        state = tl.load(states + at + place, mask=within, other=0.0)
        if NORMALIZE and ROLE != DV:
            norm = tl.load(states + at + norm_place, mask=norm_within, other=0.0)

    count = tl.cdiv(stop - start, BT)
    for i in range(count):
        if REVERSE:
            begin = start + (count - 1 - i) * BT
        else:
            begin = start + i * BT
        # Always 0, but not to the compiler, which would otherwise hold every address of a chunk in registers throughout.
        fresh = begin >> 31
        r = tl.arange(0, BT) ^ fresh
        inside = begin + r < stop
        origin = (first + begin) * H + h
        a = _tile(queries, origin, H, r, rows, inside, DA, BA)
        if NORMALIZE and ROLE == DQ:
            inv = tl.load(inverse + origin + r * H, mask=inside, other=0.0)
            side = tl.load(slope + origin + r * H, mask=inside, other=0.0)
        if HAS_DECAY:
            since_start, total = _sums(log_decay, origin, H, r, inside)
            if BS < BT:
                early, late = tl.split(tl.trans(tl.reshape(since_start, (2, BS))))
            else:
                early = since_start

        # What the chunk's tokens read of the state, which then decays to the chunk's end.
        result = tl.dot(a, state.to(a.dtype), input_precision=PRECISION)
        if NORMALIZE:
            if ROLE == Y:
                den = tl.sum(tl.dot(a, norm.to(a.dtype), input_precision=PRECISION), 1) / 16
            elif ROLE == DQ:
                result = result * inv[:, None] + side[:, None] * norm[None, :]
            elif ROLE == DK:
                result += norm[None, :]
        if HAS_DECAY:
            reads = tl.exp(tl.minimum(total - since_start, 0.0)) if REVERSE else tl.exp(since_start)
            result *= reads[:, None]
            if NORMALIZE and ROLE == Y:
                den *= reads
            state *= tl.exp(total)
            norm *= tl.exp(total)

        # What they read of each other, and write into the state: BS of them at a time.
        for half in tl.static_range(BT // BS):
            s = (half * BS + tl.arange(0, BS)) ^ fresh
            within_half = begin + s < stop
            b = _tile(keys, origin, H, s, rows, within_half, DA, BA)
            c = _tile(values, origin, H, s, columns, within_half, DC, BC)
            score = tl.dot(a, tl.trans(b), input_precision=PRECISION)
            weight = tl.full((BS,), 1.0, tl.float32)
            if REVERSE:
                weight *= scale
            if NORMALIZE and ROLE == DQ:
                score = score * inv[:, None] + side[:, None]
            elif NORMALIZE and REVERSE:
                norm_weight = weight
                if ROLE == DK:
                    norm_weight *= tl.load(slope + origin + s * H, mask=within_half, other=0.0)
                weight *= tl.load(inverse + origin + s * H, mask=within_half, other=0.0)
                score *= weight[None, :]
                if ROLE == DK:
                    score += norm_weight[None, :]
            elif REVERSE:
                score *= scale
            visible = r[:, None] <= s[None, :] if REVERSE else r[:, None] >= s[None, :]
            if HAS_DECAY:
                if half == 0:
                    to_half = early
                else:
                    to_half = late
                between = since_start[:, None] - to_half[None, :]
                if REVERSE:
                    between = -between
                score *= tl.exp(tl.where(visible, between, -float("inf")))
                writes = tl.exp(to_half) if REVERSE else tl.exp(tl.minimum(total - to_half, 0.0))
                weight *= writes
                if NORMALIZE and ROLE == DK:
                    norm_weight *= writes
            else:
                score = tl.where(visible, score, 0.0)
            result = tl.dot(score.to(c.dtype), c, acc=result, input_precision=PRECISION)
            if NORMALIZE:
                if ROLE == Y:
                    den += tl.sum(score, 1)
                    norm = tl.dot(tl.trans(b), _sixteen(weight, b), acc=norm, input_precision=PRECISION)
                elif ROLE == DQ:
                    norm += tl.sum(c.to(tl.float32) * weight[:, None], 0)
                elif ROLE == DK:
                    norm += tl.sum(c.to(tl.float32) * norm_weight[:, None], 0)
            if REVERSE or HAS_DECAY:
                c = (c.to(tl.float32) * weight[:, None]).to(c.dtype)
            state = tl.dot(tl.trans(b), c, acc=state, input_precision=PRECISION)

        if not REVERSE:
            result *= scale
        if NORMALIZE and ROLE == Y:
            den = 1.0 / (scale * den + EPSILON)
            result *= den[:, None]
            tl.store(inverse + origin + r * H, den, mask=inside & (r + tile * BT < BT))
        mask = inside[:, None]
        if DC % BC:
            mask = mask & (columns < DC)[None, :]
        local = r[:, None] * (H * DC) + columns[None, :]
        tl.store(out + origin * DC + local, result.to(out.dtype.element_ty), mask=mask)
        if HAS_DECAY and (ROLE == DQ or ROLE == DK):
            dot = tl.sum(result * tl.load(other + origin * DC + local, mask=mask, other=0.0).to(tl.float32), 1)
            tl.store(dots + (tile * tokens.to(tl.int64) * H + origin + r * H), dot, mask=inside)

    if STORE_LAST:
        tl.store(last_states + at + place, state, mask=within)
        if NORMALIZE:
            if ROLE == Y:
                tl.store(last_states + at + DA * DC + rows, tl.sum(norm, 1) / 16, mask=rows + tile * BA < DA)
            elif ROLE == DK:
                tl.store(last_states + at + norm_place, norm, mask=norm_within)


@triton.jit(do_not_specialize=["T", "SPAN"])
def _local_kernel(
    keys, values, log_decay, inverse, slope, states, totals, cu_seqlens, spans, T, SPAN, scale,
    REVERSE: tl.constexpr, H: tl.constexpr, DA: tl.constexpr, DC: tl.constexpr, SIZE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_DECAY: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr, BA: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The state a span ends with if it starts from zero, and its total log-decay: of (k, v), or backwards of (q, dy)."""
    TILES: tl.constexpr = (DC + BC - 1) // BC
    tile = tl.program_id(0) % TILES
    h = (tl.program_id(0) // TILES) % H
    p = tl.program_id(0) // (TILES * H)
    first, start, stop = _locate(cu_seqlens, spans, p, T, SPAN, VARLEN, False)
    r = tl.arange(0, BT)
    rows = tl.arange(0, BA)
    columns = tile * BC + tl.arange(0, BC)
    state = tl.zeros((BA, BC), tl.float32)
    norm = tl.zeros((BA, 16), tl.float32)
    span_total = 0.0
    count = tl.cdiv(stop - start, BT)
    for i in range(count):
        if REVERSE:
            begin = start + (count - 1 - i) * BT
        else:
            begin = start + i * BT
        inside = begin + r < stop
        origin = (first + begin) * H + h
        b = _tile(keys, origin, H, r, rows, inside, DA, BA)
        c = _tile(values, origin, H, r, columns, inside, DC, BC)
        weight = tl.full((BT,), 1.0, tl.float32)
        if REVERSE:
            weight *= scale
        if HAS_DECAY:
            since_start, total = _sums(log_decay, origin, H, r, inside)
            if REVERSE:
                weight *= tl.exp(since_start)
            else:
                weight *= tl.exp(tl.minimum(total - since_start, 0.0))
            state *= tl.exp(total)
            norm *= tl.exp(total)
            span_total += total
        if NORMALIZE and REVERSE:
            norm_weight = weight * tl.load(slope + origin + r * H, mask=inside, other=0.0)
            weight *= tl.load(inverse + origin + r * H, mask=inside, other=0.0)
        else:
            norm_weight = weight
        if REVERSE or HAS_DECAY:
            c = (c.to(tl.float32) * weight[:, None]).to(c.dtype)
        state = tl.dot(tl.trans(b), c, acc=state, input_precision=PRECISION)
        if NORMALIZE:
            norm = tl.dot(tl.trans(b), _sixteen(norm_weight, b), acc=norm, input_precision=PRECISION)
    at = (p.to(tl.int64) * H + h) * SIZE
    within = (rows < DA)[:, None] & (columns < DC)[None, :]
    tl.store(states + at + (rows[:, None] * DC + columns[None, :]), state, mask=within)
    if NORMALIZE:
        tl.store(states + at + DA * DC + rows, tl.sum(norm, 1) / 16, mask=rows + tile * BA < DA)
    if HAS_DECAY:
        tl.store(totals + p.to(tl.int64) * H + h, span_total, mask=tile == 0)


@triton.jit(do_not_specialize=["count"])
def _combine_kernel(
    states, totals, first_states, last_states, offsets, forward_states, forward_last, inner, count, H,
    REVERSE: tl.constexpr, SIZE: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_FIRST: tl.constexpr, STORE_LAST: tl.constexpr,
    INNER: tl.constexpr, VARLEN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Turns what each span adds into the state it starts from (going backwards: the gradient it ends with), in place.

    With INNER also <state, gradient> at each span's end, one number for each block of BE elements.
    """
    BLOCKS: tl.constexpr = (SIZE + BE - 1) // BE
    block = tl.program_id(0) % BLOCKS
    h = (tl.program_id(0) // BLOCKS) % H
    n = tl.program_id(0) // (BLOCKS * H)
    if VARLEN:
        begin = tl.load(offsets + n).to(tl.int32)
        end = tl.load(offsets + n + 1).to(tl.int32)
    else:
        begin = n * count
        end = begin + count
    element = block * BE + tl.arange(0, BE)
    inside = element < SIZE
    whole = (n.to(tl.int64) * H + h) * SIZE + element
    carried = tl.zeros((BE,), tl.float32)
    if HAS_FIRST:
        carried = tl.load(first_states + whole, mask=inside, other=0.0)
    ph = (end - 1 if REVERSE else begin).to(tl.int64) * H + h
    added = tl.load(states + ph * SIZE + element, mask=element < tl.where(end > begin, SIZE, 0), other=0.0)
    for i in range(end - begin):
        following = ph - H if REVERSE else ph + H
        # Asked for before this span's store, so that one wait overlaps the other.
        limit = tl.where(i + 1 < end - begin, SIZE, 0)
        next_added = tl.load(states + following * SIZE + element, mask=element < limit, other=0.0)
        if INNER:
            # The state at this span's end is the one the next span starts from.
            partner = carried
            if i > 0:
                partner = tl.load(forward_states + (ph + H) * SIZE + element, mask=inside, other=0.0)
            elif HAS_FIRST:
                partner = tl.load(forward_last + whole, mask=inside, other=0.0)
            tl.store(inner + ph * BLOCKS + block, tl.sum(carried * partner, 0))
        tl.store(states + ph * SIZE + element, carried, mask=inside)
        if HAS_DECAY:
            carried *= tl.exp(tl.load(totals + ph))
        carried += added
        added = next_added
        ph = following
    if STORE_LAST:
        tl.store(last_states + whole, carried, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _slope_kernel(y, dy, inverse, slope, rows, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """The gradient of each token's normaliser, -(dy . y) / den."""
    at = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.arange(0, BD)
    mask = (at < rows)[:, None] & (columns < D)[None, :]
    place = at[:, None] * D + columns[None, :]
    product = tl.load(y + place, mask=mask, other=0.0).to(tl.float32) * tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
    inv = tl.load(inverse + at, mask=at < rows, other=0.0)
    tl.store(slope + at, -tl.sum(product, 1) * inv, mask=at < rows)


@triton.jit(do_not_specialize=["T", "SPAN", "tokens"])
def _decay_kernel(
    q_dots, k_dots, inner, dlog_decay, cu_seqlens, spans, T, SPAN, tokens, H,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, VARLEN: tl.constexpr, ONE_SPAN: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dg_t = sum of (q . dq - k . dk) from t to its span's end, plus <S, dS> there, for BH heads of one span."""
    groups = tl.cdiv(H, BH)
    heads = (tl.program_id(0) % groups) * BH + tl.arange(0, BH)
    p = tl.program_id(0) // groups
    first, start, stop = _locate(cu_seqlens, spans, p, T, SPAN, VARLEN, ONE_SPAN)
    r = tl.arange(0, BT)
    carried = tl.zeros((BH,), tl.float32)
    if stop > start:
        for block in range(BLOCKS):
            carried += tl.load(inner + (p.to(tl.int64) * H + heads) * BLOCKS + block, mask=heads < H, other=0.0)
    count = tl.cdiv(stop - start, BT)
    for i in range(count):
        begin = start + (count - 1 - i) * BT
        at = (first + begin) * H + (r[:, None] * H + heads[None, :])
        mask = (begin + r < stop)[:, None] & (heads < H)[None, :]
        change = tl.zeros((BT, BH), tl.float32)
        for tile in tl.static_range(TILES):
            offset = tile * tokens.to(tl.int64) * H + at
            change += tl.load(q_dots + offset, mask=mask, other=0.0) - tl.load(k_dots + offset, mask=mask, other=0.0)
        tl.store(dlog_decay + at, tl.cumsum(change, 0, reverse=True) + carried[None, :], mask=mask)
        carried += tl.sum(change, 0)


@triton.jit
def _step_kernel(
    q, k, v, log_decay, state, norm, y, new_state, new_norm, H, scale,
    DA: tl.constexpr, DC: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DECAY: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One token of one head, one tile of the values' columns: read the state once, write it once."""
    TILES: tl.constexpr = (DC + BC - 1) // BC
    tile = tl.program_id(0) % TILES
    nh = (tl.program_id(0) // TILES).to(tl.int64)
    rows = tl.arange(0, BA)
    columns = tile * BC + tl.arange(0, BC)
    place = nh * DA * DC + rows[:, None] * DC + columns[None, :]
    mask = (rows < DA)[:, None] & (columns < DC)[None, :]
    S = tl.load(state + place, mask=mask, other=0.0)
    query = tl.load(q + nh * DA + rows, mask=rows < DA, other=0.0).to(tl.float32) * scale
    key = tl.load(k + nh * DA + rows, mask=rows < DA, other=0.0).to(tl.float32)
    value = tl.load(v + nh * DC + columns, mask=columns < DC, other=0.0).to(tl.float32)
    if HAS_DECAY:
        kept = tl.exp(tl.load(log_decay + nh))
        S *= kept
    S += key[:, None] * value[None, :]
    tl.store(new_state + place, S, mask=mask)
    read = tl.sum(query[:, None] * S, 0)
    if NORMALIZE:
        z = tl.load(norm + nh * DA + rows, mask=rows < DA, other=0.0)
        if HAS_DECAY:
            z *= kept
        z += key
        tl.store(new_norm + nh * DA + rows, z, mask=rows + tile * BA < DA)
        read = read / (tl.sum(query * z, 0) + EPSILON)
    tl.store(y + nh * DC + columns, read.to(y.dtype.element_ty), mask=columns < DC)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _precision(x: Tensor) -> str:
    if interpreting():
        return "ieee"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _launch(table: LaunchTable, x: Tensor, contracted: int, columns: int) -> tuple[dict[str, object], int]:
    """Launch options for a sweep that contracts `contracted` and has `columns` of state to share out, and its number of tiles."""
    padded = max(16, next_power_of_2(contracted))
    launch = table.lookup(padded * (1 if x.dtype == torch.bfloat16 else 2), capability_of(x.device))
    options = {**launch.options(), "BA": padded, "BC": min(launch.blocks["BC"], max(16, next_power_of_2(columns)))}
    return options, triton.cdiv(columns, options["BC"])


def _span(k: Tensor, v: Tensor, has_decay: bool, packed: bool) -> int:
    """Tokens in a span, from shapes alone: as many spans as fill the chip once, none shorter than MIN_SPAN.

    Packed sequences count as one long one: those shorter than a span simply fill it less.
    """
    batch, length, heads, key_dim = k.shape
    _, tiles = _launch(PLAIN, k, key_dim, v.shape[3])
    programs = tiles * heads * (1 if packed else batch)
    spans = max(1, _multiprocessors(k.device) * PROGRAMS_PER_MULTIPROCESSOR // programs)
    span = max((length + spans - 1) // spans, MIN_SPAN)
    if has_decay:
        span = min(span, MAX_DECAY_SPAN)
    return (span + SPAN_STEP - 1) // SPAN_STEP * SPAN_STEP


def _span_count(batch: int, length: int, span: int, cu_seqlens: Tensor | None) -> int:
    """Spans over all sequences; packed, an upper bound that needs no look at the lengths unless one span holds everything."""
    if cu_seqlens is None:
        return batch * ((length + span - 1) // span)
    sequences = cu_seqlens.numel() - 1
    return sequences if length <= span else (length + span - 1) // span + sequences


class _Layout:
    """How a call is cut into spans, with the arguments every kernel takes for it."""

    def __init__(self, k: Tensor, v: Tensor, has_decay: bool, cu_seqlens: Tensor | None):
        batch, self.length = k.shape[:2]
        self.span = _span(k, v, has_decay, cu_seqlens is not None)
        self.one = self.length <= self.span
        self.count = _span_count(batch, self.length, self.span, cu_seqlens)
        self.sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.table = self.offsets = None
        if cu_seqlens is not None and not self.one:
            self.table = chunk_indices(self.cu_seqlens, self.length, self.span)
            spans = (self.cu_seqlens.diff() + self.span - 1) // self.span
            self.offsets = torch.nn.functional.pad(spans.cumsum(0), (1, 0))

    @property
    def arguments(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        return self.cu_seqlens, self.table, self.length, self.span


def _combine(
    layout: _Layout,
    states: Tensor,
    totals: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    reverse: bool,
    forward: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Steps through the spans in place; `forward` = (boundary states, last state, where to put inner products)."""
    heads, size = states.shape[1:]
    launch = COMBINE.lookup(1, capability_of(states.device))
    forward_states, forward_last, inner = forward or (None, None, None)
    _combine_kernel[(triton.cdiv(size, launch.blocks["BE"]) * heads * layout.sequences,)](
        states, totals, first, last, layout.offsets, forward_states, forward_last, inner, layout.count // layout.sequences, heads,
        REVERSE=reverse, SIZE=size, HAS_DECAY=totals is not None, HAS_FIRST=first is not None, STORE_LAST=last is not None,
        INNER=inner is not None, VARLEN=layout.cu_seqlens is not None, **launch.options(),
    )  # fmt: skip


def _local(
    layout: _Layout,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    inverse: Tensor | None,
    slope: Tensor | None,
    normalize: bool,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(what each span adds to the state [spans, H, size], each span's total log-decay [spans, H] or None)."""
    heads, key_dim, value_dim = keys.shape[2], keys.shape[3], values.shape[3]
    size = key_dim * value_dim + (key_dim if normalize else 0)
    states = keys.new_empty(layout.count, heads, size, dtype=torch.float32)
    totals = None if log_decay is None else keys.new_empty(layout.count, heads, dtype=torch.float32)
    options, tiles = _launch(LOCAL, keys, key_dim, value_dim)
    _local_kernel[(layout.count * heads * tiles,)](
        keys, values, log_decay, inverse, slope, states, totals, *layout.arguments, scale,
        REVERSE=reverse, H=heads, DA=key_dim, DC=value_dim, SIZE=size, NORMALIZE=normalize, HAS_DECAY=log_decay is not None,
        VARLEN=layout.cu_seqlens is not None, PRECISION=_precision(keys), **options,
    )  # fmt: skip
    return states, totals


def _sweep(
    role: tl.constexpr,
    table: LaunchTable,
    layout: _Layout,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    normalize: bool,
    scale: float,
    inverse: Tensor | None,
    slope: Tensor | None,
    other: Tensor | None,
    states: Tensor | None,
    last: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(the sum that `role` names, its products with `other` [tiles, B, T, H] or None)."""
    batch, length, heads, contracted = queries.shape
    columns = values.shape[3]
    size = contracted * columns + ((contracted if role in (Y, DV) else columns) if normalize else 0)
    options, tiles = _launch(table, queries, contracted, columns)
    out = torch.empty_like(values)
    dots = None if other is None else queries.new_empty(tiles, batch, length, heads, dtype=torch.float32)
    cu_seqlens, spans, length, span = layout.arguments
    _sweep_kernel[(layout.count * heads * tiles,)](
        queries, keys, values, log_decay, inverse, slope, other, out, dots, states, last, cu_seqlens, spans,
        length, span, batch * length, scale,
        ROLE=role.value, H=heads, DA=contracted, DC=columns, SIZE=size, NORMALIZE=normalize, HAS_DECAY=log_decay is not None,
        HAS_STATE=states is not None, STORE_LAST=last is not None, VARLEN=cu_seqlens is not None, ONE_SPAN=layout.one,
        PRECISION=_precision(queries), **options,
    )  # fmt: skip
    return out, dots


def _state_shape(k: Tensor, v: Tensor, normalize: bool, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """[N, H, Dk Dv], or with the normaliser [N, H, Dk Dv + Dk]: S and z end to end."""
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return sequences, k.shape[2], k.shape[3] * (v.shape[3] + (1 if normalize else 0))


@torch.library.custom_op("memzoo::linear_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    normalize: bool,
    scale: float,
    state: Tensor | None,
    want_last: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, last state, 1 / normaliser [B, T, H], state at each span's start); what there is none of is empty."""
    q, k, v, log_decay, state = (None if t is None else t.contiguous() for t in (q, k, v, log_decay, state))
    layout = _Layout(k, v, log_decay is not None, cu_seqlens)
    last = q.new_empty(_state_shape(k, v, normalize, cu_seqlens) if want_last else (0,), dtype=torch.float32)
    inverse = q.new_empty(q.shape[:3] if normalize else (0,), dtype=torch.float32)
    if layout.one:
        starts = q.new_empty(0, dtype=torch.float32)
    else:
        starts, totals = _local(layout, k, v, log_decay, None, None, normalize, scale, reverse=False)
        _combine(layout, starts, totals, state, last if want_last else None, reverse=False)
    y, _ = _sweep(
        Y, NORMALIZED if normalize else PLAIN, layout, q, k, v, log_decay, normalize, scale, inverse if normalize else None, None, None,
        state if layout.one else starts, last if want_last and layout.one else None,
    )  # fmt: skip
    return y, last, inverse, starts


@_forward.register_fake
def _(q, k, v, log_decay, normalize, scale, state, want_last, cu_seqlens):
    span = _span(k, v, log_decay is not None, cu_seqlens is not None)
    shape = _state_shape(k, v, normalize, cu_seqlens)
    count = _span_count(k.shape[0], k.shape[1], span, cu_seqlens)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        q.new_empty(shape if want_last else (0,), dtype=torch.float32),
        q.new_empty(q.shape[:3] if normalize else (0,), dtype=torch.float32),
        q.new_empty((0,) if k.shape[1] <= span else (count, *shape[1:]), dtype=torch.float32),
    )


@torch.library.custom_op("memzoo::linear_attention_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    normalize: bool,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor | None,
    last: Tensor | None,
    inverse: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dlog_decay, dstate); the last two are empty when there is no such input. `y` is needed with the normaliser only,
    `last` with `dlast` only."""
    dy, dlast, q, k, v, log_decay, state = (None if t is None else t.contiguous() for t in (dy, dlast, q, k, v, log_decay, state))
    layout = _Layout(k, v, log_decay is not None, cu_seqlens)
    slope = None
    if normalize:
        slope = torch.empty_like(inverse)
        launch = SLOPE.lookup(v.shape[3], capability_of(v.device))
        _slope_kernel[(triton.cdiv(slope.numel(), launch.blocks["BT"]),)](
            y.contiguous(), dy, inverse, slope, slope.numel(),
            D=v.shape[3], BD=next_power_of_2(v.shape[3]), **launch.options(),
        )  # fmt: skip
    else:
        inverse = None
    dstate = q.new_empty(_state_shape(k, v, normalize, cu_seqlens) if state is not None else (0,), dtype=torch.float32)
    wanted = dstate if state is not None else None
    inner = None
    if layout.one:
        starts, ends = state, dlast
        if log_decay is not None:
            shape = (layout.sequences, k.shape[2], 1)
            inner = q.new_zeros(shape, dtype=torch.float32) if dlast is None else (last * dlast).sum(-1, keepdim=True)
    else:
        ends, totals = _local(layout, q, dy, log_decay, inverse, slope, normalize, scale, reverse=True)
        if log_decay is not None:
            blocks = triton.cdiv(ends.shape[2], COMBINE.lookup(1, capability_of(q.device)).blocks["BE"])
            inner = q.new_empty(layout.count, k.shape[2], blocks, dtype=torch.float32)
        _combine(layout, ends, totals, dlast, wanted, reverse=True, forward=(starts, last, inner))
        wanted = None
    table = NORMALIZED_BACKWARD if normalize else PLAIN
    common = (log_decay, normalize, scale, inverse, slope)
    q_other, k_other = (None, None) if log_decay is None else (q, k)
    dq, q_dots = _sweep(DQ, table, layout, dy, v, k, *common, q_other, starts, None)
    # Only the sweep for dk carries the gradients of both S and z, so it writes those of the initial state.
    dk, k_dots = _sweep(DK, table, layout, v, dy, q, *common, k_other, ends, wanted)
    dv, _ = _sweep(DV, table, layout, k, q, dy, *common, None, ends, None)
    if log_decay is None:
        return dq, dk, dv, q.new_empty(0, dtype=torch.float32), dstate
    dlog_decay = torch.empty_like(log_decay)
    launch = DECAY.lookup(1, capability_of(q.device))
    heads = k.shape[2]
    cu_seqlens, spans, length, span = layout.arguments
    _decay_kernel[(layout.count * triton.cdiv(heads, launch.blocks["BH"]),)](
        q_dots, k_dots, inner, dlog_decay, cu_seqlens, spans, length, span, log_decay.numel() // heads, heads,
        TILES=q_dots.shape[0], BLOCKS=inner.shape[2], VARLEN=cu_seqlens is not None, ONE_SPAN=layout.one, **launch.options(),
    )  # fmt: skip
    return dq, dk, dv, dlog_decay, dstate


@_backward.register_fake
def _(dy, dlast, q, k, v, log_decay, normalize, scale, state, cu_seqlens, y, last, inverse, starts):
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    dlog_decay = q.new_empty((0,) if log_decay is None else log_decay.shape, dtype=torch.float32)
    shape = (0,) if state is None else _state_shape(k, v, normalize, cu_seqlens)
    return dq, dk, dv, dlog_decay, q.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    q, k, v, log_decay, normalize, scale, state, want_last, cu_seqlens = inputs
    y, last, inverse, starts = output
    kept_last = last if want_last and log_decay is not None else None
    ctx.save_for_backward(q, k, v, log_decay, state, cu_seqlens, y if normalize else None, kept_last, inverse, starts)
    ctx.options = (normalize, scale)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dlast, dinverse, dstarts):
    q, k, v, log_decay, state, cu_seqlens, y, last, inverse, starts = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(v)
    if dlast is not None and dlast.numel() == 0:
        dlast = None
    dq, dk, dv, dlog_decay, dstate = _backward(
        dy, dlast, q, k, v, log_decay, *ctx.options, state, cu_seqlens, y, last, inverse, starts
    )
    dlog_decay = None if log_decay is None else dlog_decay
    return dq, dk, dv, dlog_decay, None, None, None if state is None else dstate, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("memzoo::linear_attention_step", mutates_args=())
def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: Tensor, norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, state = q.contiguous(), k.contiguous(), v.contiguous(), state.contiguous()
    log_decay, norm = (None if t is None else t.contiguous() for t in (log_decay, norm))
    batch, _, heads, key_dim = q.shape
    value_dim = v.shape[3]
    y, new_state = torch.empty_like(v), torch.empty_like(state)
    new_norm = state.new_empty(0) if norm is None else torch.empty_like(norm)
    launch = STEP.lookup(key_dim, capability_of(q.device))
    grid = (batch * heads * triton.cdiv(value_dim, launch.blocks["BC"]),)
    _step_kernel[grid](
        q, k, v, log_decay, state, norm, y, new_state, new_norm, heads, scale,
        DA=key_dim, DC=value_dim, NORMALIZE=norm is not None, HAS_DECAY=log_decay is not None,
        BA=next_power_of_2(key_dim), **launch.options(),
    )  # fmt: skip
    return y, new_state, new_norm


@_step.register_fake
def _(q, k, v, log_decay, scale, state, norm):
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        torch.empty_like(state, memory_format=torch.contiguous_format),
        state.new_empty(0) if norm is None else torch.empty_like(norm, memory_format=torch.contiguous_format),
    )


def linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    normalize: bool,
    scale: float,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if initial_state is not None:
        initial_state = initial_state.flatten(2)
        if normalize:
            initial_state = torch.cat((initial_state, initial_norm), dim=2)
    output, last, _, _ = _forward(q, k, v, log_decay, normalize, scale, initial_state, output_final_state, cu_seqlens)
    if not output_final_state:
        return output, None, None
    key_dim, value_dim = k.shape[3], v.shape[3]
    state = last[..., : key_dim * value_dim].unflatten(-1, (key_dim, value_dim))
    return output, state, last[..., key_dim * value_dim :] if normalize else None


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    normalize: bool,
    scale: float,
    initial_state: Tensor,
    initial_norm: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The decode step: T = 1 with a state, no gradient."""
    y, state, norm = _step(q, k, v, log_decay, scale, initial_state, initial_norm)
    return y, state, norm if normalize else None


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability, with what needs the most registers: decay, normaliser, packed, states."""
    where = {"cu_seqlens": "*i64", "spans": "*i32", "T": "i32", "SPAN": "i32", "scale": "fp32"}
    tokens = {"queries": "*bf16", "keys": "*bf16", "values": "*bf16", "other": "*bf16", "out": "*bf16"}
    numbers = dict.fromkeys(("log_decay", "inverse", "slope", "dots", "states", "last_states"), "*fp32")
    flags = {"HAS_DECAY": True, "VARLEN": True, "PRECISION": "tf32"}
    nothing = {"slope": None, "other": None, "dots": None}
    sweeps = (
        ("forward", Y, PLAIN, False, {"inverse": None, **nothing}),
        ("dk", DK, PLAIN, False, {"inverse": None, "slope": None}),
        ("normalized forward", Y, NORMALIZED, True, nothing),
        ("normalized dq", DQ, NORMALIZED_BACKWARD, True, {"last_states": None}),
        ("normalized dk", DK, NORMALIZED_BACKWARD, True, {}),
    )
    for size in (64, 128, 256):
        shape = {"H": 16, "DA": size, "DC": size, "BA": size}
        for name, role, table, normalize, absent in sweeps:
            launch = table.lookup(size, capability)
            yield CompileSpec(
                f"linear_attention {name} {size}", _sweep_kernel, {**tokens, **numbers, **where, "tokens": "i64"},
                {"ROLE": role.value, "HAS_STATE": True, "STORE_LAST": "last_states" not in absent, "ONE_SPAN": False,
                 "NORMALIZE": normalize, "SIZE": size * (size + 1) if normalize else size * size, **absent, **shape, **flags,
                 **launch.blocks},
                launch.num_warps, launch.num_stages,
            )  # fmt: skip
        launch = LOCAL.lookup(size, capability)
        yield CompileSpec(
            f"linear_attention local {size}", _local_kernel, {**tokens, **numbers, **where, "totals": "*fp32"},
            {"REVERSE": True, "NORMALIZE": True, "SIZE": size * (size + 1), **shape, **flags, **launch.blocks},
            launch.num_warps, launch.num_stages,
        )  # fmt: skip
        launch = STEP.lookup(size, capability)
        yield CompileSpec(
            f"linear_attention step {size}", _step_kernel,
            {"q": "*bf16", "k": "*bf16", "v": "*bf16", "log_decay": "*fp32", "state": "*fp32", "norm": "*fp32", "y": "*bf16",
             "new_state": "*fp32", "new_norm": "*fp32", "H": "i32", "scale": "fp32"},
            {"DA": size, "DC": size, "NORMALIZE": True, "HAS_DECAY": True, "BA": size, **launch.blocks},
            launch.num_warps, launch.num_stages,
        )  # fmt: skip
    launch = COMBINE.lookup(1, capability)
    names = ("states", "totals", "first_states", "last_states", "forward_states", "forward_last", "inner")
    states = dict.fromkeys(names, "*fp32")
    yield CompileSpec(
        "linear_attention combine", _combine_kernel, {**states, "offsets": "*i64", "count": "i32", "H": "i32"},
        {"REVERSE": True, "SIZE": 128 * 129, "HAS_DECAY": True, "HAS_FIRST": True, "STORE_LAST": True, "INNER": True, "VARLEN": True,
         **launch.blocks}, launch.num_warps, launch.num_stages,
    )  # fmt: skip
    launch = SLOPE.lookup(256, capability)
    yield CompileSpec(
        "linear_attention slope", _slope_kernel,
        {"y": "*bf16", "dy": "*bf16", "inverse": "*fp32", "slope": "*fp32", "rows": "i64"},
        {"D": 256, "BD": 256, **launch.blocks}, launch.num_warps, launch.num_stages,
    )  # fmt: skip
    launch = DECAY.lookup(1, capability)
    yield CompileSpec(
        "linear_attention decay gradient", _decay_kernel,
        {"q_dots": "*fp32", "k_dots": "*fp32", "inner": "*fp32", "dlog_decay": "*fp32", **where, "tokens": "i64", "H": "i32"},
        {"TILES": 4, "BLOCKS": 33, "VARLEN": True, "ONE_SPAN": False, **launch.blocks}, launch.num_warps, launch.num_stages,
    )  # fmt: skip
