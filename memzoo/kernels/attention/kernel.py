"""Triton kernels of attention, with and without temporal links: forward, backward, and decoding split over the keys.

Operations, a head and a pair of a query and a key it sees: forward 2 (Dk + Dv), backward 2 (4 Dk + 3 Dv) of which 2 (3 Dk + 2 Dv) are
the gradient's own and the rest is scores and value products computed in both backward kernels, so that no gradient is summed by atomics.
Causal, that is T / 2 pairs a query: at D = 128, T = 8,192 and 790 TFLOP/s in bf16 the forward's floor is 2.7 ns a token and head, the
backward's 6.6 ns by its own operations, 9.3 ns as written here. Links read each value row in three places: 2 (Dk + 3 Dv) forward.
Bytes: q, k, v and y once, 2 (2 Dk + 2 Dv) = 1 KB a token and head, 0.24 ns at 4.3 TB/s: bound by operations beyond some 700 tokens.
Decoding reads the visible keys and values once, 2 (Dk + Dv) B a position and key head, and is bound by that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dispatch import interpreting
from ..common.launch import CompileSpec, Launch, LaunchTable, capability_of, next_power_of_2
from ..common.packing import chunk_indices
from .chunked import retention_bias, retention_gradient


def _table(entries: dict[tuple[int, int], tuple[int, int, int, int]]) -> LaunchTable:
    """Entries (BM queries, BN keys, warps, stages) by (padded head dimension, capability).

    float32 takes the entry of four times its dimension, 512 at most: exact products take twice the memory and more registers.
    """
    return LaunchTable({key: Launch(w, s, {"BM": bm, "BN": bn}) for key, (bm, bn, w, s) in entries.items()})


# "plain" is attention without options, packed or not; "options" adds any of window, strength and retention; "linked" has the links.
PLAIN, OPTIONS, LINKED = "plain", "options", "linked"
FORWARD = {
    OPTIONS: _table({
        (64, 80): (128, 64, 8, 3), (128, 80): (64, 64, 8, 2), (256, 80): (64, 32, 8, 2), (512, 80): (32, 16, 8, 2),
        (128, 90): (128, 64, 8, 2), (256, 90): (128, 16, 8, 2), (128, 100): (128, 32, 8, 2), (256, 100): (64, 32, 8, 2),
    }),
    LINKED: _table({
        (64, 80): (64, 64, 4, 2), (128, 80): (64, 32, 8, 2), (256, 80): (32, 32, 8, 2), (512, 80): (32, 16, 8, 1),
        (128, 90): (128, 64, 8, 2), (256, 90): (128, 16, 8, 1), (128, 100): (64, 64, 8, 2), (256, 100): (32, 32, 8, 2),
    }),
}  # fmt: skip
FORWARD[PLAIN] = LaunchTable({
    **FORWARD[OPTIONS].entries,
    **_table({(64, 90): (128, 128, 8, 3), (128, 90): (128, 128, 8, 2), (64, 100): (128, 64, 8, 3), (128, 100): (128, 64, 8, 3)}).entries,
})  # fmt: skip
BACKWARD_QUERIES = {
    OPTIONS: _table({
        (64, 80): (64, 32, 4, 2), (128, 80): (64, 64, 8, 2), (256, 80): (64, 32, 8, 2), (512, 80): (16, 16, 4, 1),
        (64, 90): (64, 64, 4, 2), (128, 90): (128, 32, 8, 2), (256, 90): (32, 32, 8, 2),
        (128, 100): (128, 64, 8, 2), (256, 100): (64, 32, 8, 2),
    }),
    LINKED: _table({
        (64, 80): (32, 32, 4, 2), (128, 80): (32, 32, 8, 2), (256, 80): (16, 16, 4, 2), (512, 80): (16, 16, 4, 1),
        (64, 90): (64, 32, 4, 2), (128, 90): (64, 32, 8, 2),
    }),
}  # fmt: skip
BACKWARD_QUERIES[PLAIN] = LaunchTable({**BACKWARD_QUERIES[OPTIONS].entries, **_table({(128, 90): (128, 64, 8, 2)}).entries})
BACKWARD_KEYS = {
    OPTIONS: _table({
        (64, 80): (32, 128, 8, 2), (128, 80): (32, 64, 8, 2), (256, 80): (64, 32, 8, 1), (512, 80): (16, 16, 4, 1),
        (128, 90): (32, 128, 8, 2), (256, 100): (32, 64, 8, 2),
    }),
    LINKED: _table({
        (64, 80): (32, 32, 4, 2), (128, 80): (32, 64, 8, 2), (256, 80): (32, 32, 8, 1), (512, 80): (16, 16, 4, 1),
        (64, 90): (32, 128, 8, 2), (128, 90): (32, 128, 8, 2), (64, 100): (32, 64, 8, 2), (128, 100): (32, 64, 8, 2),
    }),
}  # fmt: skip
BACKWARD_KEYS[PLAIN] = BACKWARD_KEYS[OPTIONS]
DECODE = _table({
    (64, 80): (16, 64, 4, 3), (128, 80): (16, 64, 8, 2), (256, 80): (16, 32, 8, 2), (512, 80): (16, 16, 8, 2),
})  # fmt: skip
COMBINE = LaunchTable({(512, 80): Launch(num_warps=8, num_stages=1, blocks={"BS": 128})})

DECODE_ROWS = 64  # query rows a key head (queries times heads of its group) up to which decoding beats the forward kernel
DECODE_PROGRAMS = 264  # programs that fill the chip: two a multiprocessor of an H200
DECODE_KEYS = 256  # fewest keys worth a program of their own


@triton.jit
def _locate(cu_q, cu_k, chunks, Tq, Tk, program, VARLEN: tl.constexpr):
    """(block in its sequence, first query among all, number of queries, first key among all, number of keys); no keys if idle."""
    if VARLEN:
        n = tl.load(chunks + program * 2)
        block = tl.load(chunks + program * 2 + 1)
        q0, nq, k0, nk = _lengths(cu_q, cu_k, tl.maximum(n, 0))
        nq = tl.where(n < 0, 0, nq)
        nk = tl.where(n < 0, 0, nk)
    else:
        block = program
        q0 = tl.program_id(2).to(tl.int64) * Tq
        k0 = tl.program_id(2).to(tl.int64) * Tk
        nq = Tq
        nk = Tk
    return block, q0, nq, k0, nk


@triton.jit
def _lengths(cu_q, cu_k, n):
    q0 = tl.load(cu_q + n).to(tl.int64)
    k0 = tl.load(cu_k + n).to(tl.int64)
    nq = (tl.load(cu_q + n + 1).to(tl.int64) - q0).to(tl.int32)
    nk = (tl.load(cu_k + n + 1).to(tl.int64) - k0).to(tl.int32)
    return q0, nq, k0, nk


@triton.jit
def _start(x, first, batch_stride, token_stride, VARLEN: tl.constexpr):
    """Where this program's sequence begins."""
    if VARLEN:
        x += first * token_stride
    else:
        x += tl.program_id(2).to(tl.int64) * batch_stride
    return x


@triton.jit
def _tile(x, first, stride, count, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr):
    """Rows first, ..., first + R - 1 of a matrix [count, D], zeros outside it; MASKED says that rows may lie outside."""
    r = tl.arange(0, R)
    d = tl.arange(0, P)
    at = x + tl.cast(first, tl.int64) * stride + (r[:, None] * stride + d[None, :])
    if MASKED:
        inside = ((first + r >= 0) & (first + r < count))[:, None]
        if D < P:
            inside = inside & (d < D)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
    elif D < P:
        tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _visible(t, i, window, prefix, WINDOW: tl.constexpr):
    """Which of keys i the queries at positions t see."""
    seen = i <= t
    if WINDOW:
        seen = seen & ((i > t - window) | (i < prefix))
    return seen


@triton.jit
def _key_blocks(first, last, window, prefix, WINDOW: tl.constexpr, BN: tl.constexpr):
    """Blocks of keys that queries at positions first, ..., last - 1 see: (ahead, low, full_low, full_high, end).

    [0, ahead) hold the prefix and [low, end) the rest; all of [full_low, full_high) is seen by every query, and older than each.
    """
    full_high = first // BN
    end = (last + BN - 1) // BN
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // BN
        full_low = tl.minimum((tl.maximum(last - window, 0) + BN - 1) // BN, full_high)
        ahead = tl.minimum((prefix + BN - 1) // BN, low)
    else:
        low = 0
        full_low = 0
        ahead = 0
    return ahead, low, full_low, full_high, end


@triton.jit
def _fade_tile(fade, first, nk, H: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):
    """The running sums of retention at keys first, ..., as a row, or [BM, BN] if `fade` is [BM, 1] pointers."""
    at = fade + tl.cast(first, tl.int64) * H + (tl.arange(0, BN) * H)[None, :]
    if MASKED:
        tile = tl.load(at, mask=(first + tl.arange(0, BN) < nk)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _attend(
    acc, total, peak, query, k, v, fade, block, nk, t, factor, fade_t, mode_b, mode_c, mode_f, window, prefix, skt, svt,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, LINKED: tl.constexpr, STRENGTH: tl.constexpr, RETENTION: tl.constexpr, MASKED: tl.constexpr,
    PREC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of keys in the online softmax: `total` and `peak` [BM] are the sum and the largest score (of base 2) so far.

    `fade` points at this head's running sums, or [BM, 1] pointers where the rows are of different heads.
    """
    i = block * BN + tl.arange(0, BN)
    scores = tl.dot(query, tl.trans(_tile(k, block * BN, skt, nk, DK, BK, BN, MASKED)), input_precision=PREC)
    unit = factor
    if STRENGTH:
        scores = scores * factor[:, None]
        unit = 1.0
    if RETENTION:
        if not STRENGTH:
            scores = scores * factor
        unit = 1.0
        scores += fade_t[:, None] - _fade_tile(fade, block * BN, nk, H, BN, MASKED)
    if MASKED:
        scores = tl.where(_visible(t[:, None], i[None, :], window, prefix, WINDOW), scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * unit)
    weights = tl.exp2(scores * unit - higher[:, None])
    kept = tl.exp2(peak - higher)
    total = total * kept + tl.sum(weights, 1)
    acc = acc * kept[:, None]
    value = _tile(v, block * BN, svt, nk, DV, BV, BN, MASKED)
    if LINKED:
        acc = tl.dot((weights * mode_c[:, None]).to(value.dtype), value, acc, input_precision=PREC)
        before = _tile(v, block * BN - 1, svt, nk, DV, BV, BN, True)
        acc = tl.dot((weights * mode_b[:, None]).to(value.dtype), before, acc, input_precision=PREC)
        forward = weights * mode_f[:, None]
        if MASKED:
            forward = tl.where(i[None, :] < t[:, None], forward, 0.0)
        after = _tile(v, block * BN + 1, svt, nk, DV, BV, BN, MASKED)
        acc = tl.dot(forward.to(value.dtype), after, acc, input_precision=PREC)
    else:
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PREC)
    return acc, total, higher


@triton.jit
def _row_options(
    modes, strength, fade, row, column, r, live, scale,
    H: tl.constexpr, LINKED: tl.constexpr, STRENGTH: tl.constexpr, RETENTION: tl.constexpr,
):  # fmt: skip
    """(factor of the scores in base 2, fade at the queries, weights of the three modes), of places `r` [.] in units of tokens and heads.

    They count from `row` of modes and strength [B Tq, H] and from `column` of fade [B Tk, H].
    """
    factor = scale * 1.4426950408889634
    fade_t = 0.0
    mode_b = 0.0
    mode_c = 0.0
    mode_f = 0.0
    if STRENGTH:
        factor = factor * tl.load(strength + row + r, mask=live, other=0.0).to(tl.float32)
    if RETENTION:
        fade_t = tl.load(fade + column + r, mask=live, other=0.0)
    if LINKED:
        at = modes + row * 3 + r * 3
        mode_b = tl.load(at, mask=live, other=0.0).to(tl.float32)
        mode_c = tl.load(at + 1, mask=live, other=0.0).to(tl.float32)
        mode_f = tl.load(at + 2, mask=live, other=0.0).to(tl.float32)
    return factor, fade_t, mode_b, mode_c, mode_f


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "prefix"])
def _forward_kernel(
    q, k, v, modes, strength, fade, y, lse, cu_q, cu_k, chunks, Tq, Tk, window, prefix, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, LINKED: tl.constexpr, STRENGTH: tl.constexpr, RETENTION: tl.constexpr, VARLEN: tl.constexpr,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head over the keys it sees; lse [B Tq, H] is the log of the softmax's sum, in base 2."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    block, q0, nq, k0, nk = _locate(cu_q, cu_k, chunks, Tq, Tk, program, VARLEN)
    start = block * BM
    if start >= nq:
        return
    head = tl.program_id(1)
    q = _start(q, q0, sqb, sqt, VARLEN) + head * sqh
    k = _start(k, k0, skb, skt, VARLEN) + (head // G) * skh
    v = _start(v, k0, svb, svt, VARLEN) + (head // G) * svh
    rows = start + tl.arange(0, BM)
    t = nk - nq + rows
    tokens = (q0 + rows) * H + head
    factor, fade_t, mode_b, mode_c, mode_f = _row_options(
        modes, strength, fade, (q0 + start) * H + head, (k0 + nk - nq + start) * H + head, tl.arange(0, BM) * H, rows < nq,
        scale, H, LINKED, STRENGTH, RETENTION,
    )  # fmt: skip
    fade_head = fade
    if RETENTION:
        fade_head = fade + k0 * H + head
    query = _tile(q, start, sqt, nq, DK, BK, BM, True)
    acc = tl.zeros((BM, BV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    peak = tl.full((BM,), -1e30, tl.float32)
    first = nk - nq + start
    ahead, low, full_low, full_high, end = _key_blocks(first, tl.minimum(first + BM, nk), window, prefix, WINDOW, BN)
    edges = ahead + full_low - low
    for at in range(edges + end - full_high):
        at_block = at - edges + full_high
        if WINDOW:
            at_block = tl.where(at < ahead, at, tl.where(at < edges, at - ahead + low, at_block))
        acc, total, peak = _attend(
            acc, total, peak, query, k, v, fade_head, at_block, nk, t, factor, fade_t, mode_b, mode_c, mode_f, window, prefix,
            skt, svt, H, DK, DV, BK, BV, WINDOW, LINKED, STRENGTH, RETENTION, True, PREC, BN,
        )  # fmt: skip
    for at_block in range(full_low, full_high):
        acc, total, peak = _attend(
            acc, total, peak, query, k, v, fade_head, at_block, nk, t, factor, fade_t, mode_b, mode_c, mode_f, window, prefix,
            skt, svt, H, DK, DV, BK, BV, WINDOW, LINKED, STRENGTH, RETENTION, False, PREC, BN,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # rows beyond the sequence may see nothing
    d = tl.arange(0, BV)
    tl.store(
        y + tokens[:, None] * DV + d[None, :],
        (acc / total[:, None]).to(y.dtype.element_ty),
        mask=(rows < nq)[:, None] & (d < DV)[None, :],
    )
    tl.store(lse + tokens, peak + tl.log2(total), mask=rows < nq)


@triton.jit
def _query_gradient(
    dq, db, dc, df, query, grad, lse, delta, k, v, fade, block, nk, t, factor, fade_t, mode_b, mode_c, mode_f, window, prefix,
    skt, svt,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, LINKED: tl.constexpr, STRENGTH: tl.constexpr, RETENTION: tl.constexpr, MASKED: tl.constexpr,
    PREC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of keys' part of dq (before the factor) and of the modes' gradients."""
    i = block * BN + tl.arange(0, BN)
    key = _tile(k, block * BN, skt, nk, DK, BK, BN, MASKED)
    scores = tl.dot(query, tl.trans(key), input_precision=PREC)
    if STRENGTH:
        scores = scores * factor[:, None]
    else:
        scores = scores * factor
    if RETENTION:
        scores += fade_t[:, None] - _fade_tile(fade, block * BN, nk, H, BN, MASKED)
    weights = tl.exp2(scores - lse[:, None])
    if MASKED:
        weights = tl.where(_visible(t[:, None], i[None, :], window, prefix, WINDOW), weights, 0.0)
    value = _tile(v, block * BN, svt, nk, DV, BV, BN, MASKED)
    dweights = tl.dot(grad, tl.trans(value), input_precision=PREC)
    if LINKED:
        dc += tl.sum(weights * dweights, 1)
        dweights = dweights * mode_c[:, None]
        before = _tile(v, block * BN - 1, svt, nk, DV, BV, BN, True)
        part = tl.dot(grad, tl.trans(before), input_precision=PREC)
        db += tl.sum(weights * part, 1)
        dweights += part * mode_b[:, None]
        after = _tile(v, block * BN + 1, svt, nk, DV, BV, BN, MASKED)
        part = tl.dot(grad, tl.trans(after), input_precision=PREC)
        if MASKED:
            part = tl.where(i[None, :] < t[:, None], part, 0.0)
        df += tl.sum(weights * part, 1)
        dweights += part * mode_f[:, None]
    dscores = weights * (dweights - delta[:, None])
    dq = tl.dot(dscores.to(key.dtype), key, dq, input_precision=PREC)
    return dq, db, dc, df


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "prefix"])
def _backward_queries_kernel(
    q, k, v, modes, strength, fade, y, lse, dy, delta, dq, dmodes, dstrength, cu_q, cu_k, chunks, Tq, Tk, window, prefix, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, LINKED: tl.constexpr, STRENGTH: tl.constexpr, RETENTION: tl.constexpr, VARLEN: tl.constexpr,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, their modes and strengths; also writes delta = <dy, y> [B Tq, H] for the other kernels."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block, q0, nq, k0, nk = _locate(cu_q, cu_k, chunks, Tq, Tk, program, VARLEN)
    start = block * BM
    if start >= nq:
        return
    head = tl.program_id(1)
    q = _start(q, q0, sqb, sqt, VARLEN) + head * sqh
    k = _start(k, k0, skb, skt, VARLEN) + (head // G) * skh
    v = _start(v, k0, svb, svt, VARLEN) + (head // G) * svh
    rows = start + tl.arange(0, BM)
    live = rows < nq
    t = nk - nq + rows
    tokens = (q0 + rows) * H + head
    factor, fade_t, mode_b, mode_c, mode_f = _row_options(
        modes, strength, fade, (q0 + start) * H + head, (k0 + nk - nq + start) * H + head, tl.arange(0, BM) * H, live, scale,
        H, LINKED, STRENGTH, RETENTION,
    )  # fmt: skip
    fade_head = fade
    if RETENTION:
        fade_head = fade + k0 * H + head
    query = _tile(q, start, sqt, nq, DK, BK, BM, True)
    grad = _tile(dy + (q0 * H + head) * DV, start, H * DV, nq, DV, BV, BM, True)
    output = _tile(y + (q0 * H + head) * DV, start, H * DV, nq, DV, BV, BM, True)
    row_delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta + tokens, row_delta, mask=live)
    row_lse = tl.load(lse + tokens, mask=live, other=float("inf"))
    acc = tl.zeros((BM, BK), tl.float32)
    db = tl.zeros((BM,), tl.float32)
    dc = tl.zeros((BM,), tl.float32)
    df = tl.zeros((BM,), tl.float32)
    first = nk - nq + start
    ahead, low, full_low, full_high, end = _key_blocks(first, tl.minimum(first + BM, nk), window, prefix, WINDOW, BN)
    edges = ahead + full_low - low
    for at in range(edges + end - full_high):
        at_block = at - edges + full_high
        if WINDOW:
            at_block = tl.where(at < ahead, at, tl.where(at < edges, at - ahead + low, at_block))
        acc, db, dc, df = _query_gradient(
            acc, db, dc, df, query, grad, row_lse, row_delta, k, v, fade_head, at_block, nk, t, factor, fade_t,
            mode_b, mode_c, mode_f, window, prefix, skt, svt,
            H, DK, DV, BK, BV, WINDOW, LINKED, STRENGTH, RETENTION, True, PREC, BN,
        )  # fmt: skip
    for at_block in range(full_low, full_high):
        acc, db, dc, df = _query_gradient(
            acc, db, dc, df, query, grad, row_lse, row_delta, k, v, fade_head, at_block, nk, t, factor, fade_t,
            mode_b, mode_c, mode_f, window, prefix, skt, svt,
            H, DK, DV, BK, BV, WINDOW, LINKED, STRENGTH, RETENTION, False, PREC, BN,
        )  # fmt: skip
    if LINKED:
        tl.store(dmodes + tokens * 3, db, mask=live)
        tl.store(dmodes + tokens * 3 + 1, dc, mask=live)
        tl.store(dmodes + tokens * 3 + 2, df, mask=live)
    if STRENGTH:
        tl.store(dstrength + tokens, tl.sum(acc * query.to(tl.float32), 1) * scale, mask=live)
        acc = acc * (factor * 0.6931471805599453)[:, None]
    else:
        acc = acc * scale
    d = tl.arange(0, BK)
    tl.store(dq + tokens[:, None] * DK + d[None, :], acc.to(dq.dtype.element_ty), mask=live[:, None] & (d < DK)[None, :])


@triton.jit
def _transposed_weights(
    key, query, factor, fade_t, fade_i, lse, t, i, window, prefix,
    WINDOW: tl.constexpr, STRENGTH: tl.constexpr, RETENTION: tl.constexpr, MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Softmax weights [BN, BM] of keys i over queries at positions t."""
    scores = tl.dot(key, tl.trans(query), input_precision=PREC)
    if STRENGTH:
        scores = scores * factor[None, :]
    else:
        scores = scores * factor
    if RETENTION:
        scores += fade_t[None, :] - fade_i[:, None]
    weights = tl.exp2(scores - lse[None, :])
    if MASKED:
        weights = tl.where(_visible(t[None, :], i[:, None], window, prefix, WINDOW), weights, 0.0)
    return weights


@triton.jit
def _key_gradient(
    dk, dv, column, key, key_before, key_after, value, value_before, value_after, q, dy, modes, strength, fade, lse, delta,
    fade_i, fade_before, fade_after, block, first, nq, nk, offset, scale, window, prefix, sqt,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, LINKED: tl.constexpr, STRENGTH: tl.constexpr, RETENTION: tl.constexpr, MASKED: tl.constexpr,
    DO_K: tl.constexpr, DO_V: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of queries' part of dk (before the scale), dv and the sums of the scores' gradients over the queries."""
    i = first + tl.arange(0, BN)
    r = tl.arange(0, BM)
    t = offset + block * BM + r
    live = block * BM + r < nq
    row = tl.cast(block * BM, tl.int64) * H
    factor, fade_t, mode_b, mode_c, mode_f = _row_options(
        modes, strength, fade, row, row + tl.cast(offset, tl.int64) * H, r * H, live, scale, H, LINKED, STRENGTH, RETENTION
    )
    if MASKED:
        row_lse = tl.load(lse + row + r * H, mask=live, other=float("inf"))
    else:
        row_lse = tl.load(lse + row + r * H)
    query = _tile(q, block * BM, sqt, nq, DK, BK, BM, MASKED)
    grad = _tile(dy, block * BM, H * DV, nq, DV, BV, BM, MASKED)
    weights = _transposed_weights(
        key, query, factor, fade_t, fade_i, row_lse, t, i, window, prefix, WINDOW, STRENGTH, RETENTION, MASKED, PREC
    )
    if DO_V:
        spread = weights
        if LINKED:
            # Value row j is read as i + 1 = j, i = j and i - 1 = j.
            spread = weights * mode_c[None, :]
            spread += mode_b[None, :] * _transposed_weights(
                key_after, query, factor, fade_t, fade_after, row_lse, t, i + 1, window, prefix,
                WINDOW, STRENGTH, RETENTION, MASKED, PREC,
            )  # fmt: skip
            forward = mode_f[None, :] * _transposed_weights(
                key_before, query, factor, fade_t, fade_before, row_lse, t, i - 1, window, prefix,
                WINDOW, STRENGTH, RETENTION, MASKED, PREC,
            )  # fmt: skip
            inside = (i > 0)[:, None]
            if MASKED:
                inside = inside & (i[:, None] <= t[None, :])
            spread += tl.where(inside, forward, 0.0)
        dv = tl.dot(spread.to(grad.dtype), grad, dv, input_precision=PREC)
    if DO_K:
        dweights = tl.dot(value, tl.trans(grad), input_precision=PREC)
        if LINKED:
            dweights = dweights * mode_c[None, :]
            dweights += mode_b[None, :] * tl.dot(value_before, tl.trans(grad), input_precision=PREC)
            forward = mode_f[None, :] * tl.dot(value_after, tl.trans(grad), input_precision=PREC)
            if MASKED:
                forward = tl.where(i[:, None] < t[None, :], forward, 0.0)
            dweights += forward
        if MASKED:
            row_delta = tl.load(delta + row + r * H, mask=live, other=0.0)
        else:
            row_delta = tl.load(delta + row + r * H)
        dscores = weights * (dweights - row_delta[None, :])
        if RETENTION:
            column += tl.sum(dscores, 1)
        if STRENGTH:
            dscores = dscores * tl.load(strength + row + r * H, mask=live, other=0.0).to(tl.float32)[None, :]
        dk = tl.dot(dscores.to(query.dtype), query, dk, input_precision=PREC)
    return dk, dv, column


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "prefix"])
def _backward_keys_kernel(
    q, k, v, modes, strength, fade, lse, dy, delta, dk, dv, columns, cu_q, cu_k, chunks, Tq, Tk, window, prefix, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, LINKED: tl.constexpr, STRENGTH: tl.constexpr, RETENTION: tl.constexpr, VARLEN: tl.constexpr,
    DO_K: tl.constexpr, DO_V: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One query head's part of the gradients of a block of keys (DO_K) and values (DO_V), [B Tk, H, .].

    `columns` [B Tk, H] are the sums of the scores' gradients over the queries, from which the retention's gradient follows.
    """
    block, q0, nq, k0, nk = _locate(cu_q, cu_k, chunks, Tq, Tk, tl.program_id(0), VARLEN)
    first = block * BN
    if first >= nk:
        return
    head = tl.program_id(1)
    q = _start(q, q0, sqb, sqt, VARLEN) + head * sqh
    k = _start(k, k0, skb, skt, VARLEN) + (head // G) * skh
    v = _start(v, k0, svb, svt, VARLEN) + (head // G) * svh
    row0 = q0 * H + head  # the first query among [B Tq, H]
    column0 = k0 * H + head
    i = first + tl.arange(0, BN)
    key = _tile(k, first, skt, nk, DK, BK, BN, True)
    value = key
    key_before = key
    key_after = key
    value_before = key
    value_after = key
    if DO_K:
        value = _tile(v, first, svt, nk, DV, BV, BN, True)
    if LINKED:
        if DO_V:
            key_before = _tile(k, first - 1, skt, nk, DK, BK, BN, True)
            key_after = _tile(k, first + 1, skt, nk, DK, BK, BN, True)
        if DO_K:
            value_before = _tile(v, first - 1, svt, nk, DV, BV, BN, True)
            value_after = _tile(v, first + 1, svt, nk, DV, BV, BN, True)
    acc_k = tl.zeros((BN, BK), tl.float32)
    acc_v = tl.zeros((BN, BV), tl.float32)

    # Blocks of queries that see any of these keys, [low, end), and those that are whole, younger than and see all: [full_low, full_high).
    # The links read one key more on both sides.
    offset = nk - nq
    oldest = first
    youngest = first + BN
    if LINKED:
        oldest = first - 1
        youngest = first + BN + 1
    seen_until = nk
    full_until = nk
    if WINDOW:
        if oldest >= prefix:
            seen_until = tl.minimum(nk, youngest - 1 + window)
        if youngest > prefix:
            full_until = tl.minimum(nk, oldest + window)
    low = tl.maximum(first - offset, 0) // BM
    end = (tl.maximum(seen_until - offset, 0) + BM - 1) // BM
    full_low = tl.minimum((tl.maximum(first + BN - offset, 0) + BM - 1) // BM, end)
    full_high = tl.maximum(tl.minimum(tl.maximum(full_until - offset, 0) // BM, end), full_low)

    modes_head = modes
    strength_head = strength
    fade_head = fade
    fade_i = 0.0
    fade_before = 0.0
    fade_after = 0.0
    if LINKED:
        modes_head = modes + row0 * 3
    if STRENGTH:
        strength_head = strength + row0
    if RETENTION:
        fade_head = fade + column0
        at = fade_head + i.to(tl.int64) * H
        fade_i = tl.load(at, mask=i < nk, other=0.0)
        if LINKED:
            fade_before = tl.load(at - H, mask=(i > 0) & (i - 1 < nk), other=0.0)
            fade_after = tl.load(at + H, mask=i + 1 < nk, other=0.0)
    column = tl.zeros((BN,), tl.float32)
    edges = full_low - low
    for at_edge in range(edges + end - full_high):
        at_block = tl.where(at_edge < edges, at_edge + low, at_edge - edges + full_high)
        acc_k, acc_v, column = _key_gradient(
            acc_k, acc_v, column, key, key_before, key_after, value, value_before, value_after, q, dy + row0 * DV,
            modes_head, strength_head, fade_head, lse + row0, delta + row0, fade_i, fade_before, fade_after,
            at_block, first, nq, nk, offset, scale, window, prefix, sqt, H, DK, DV, BK, BV,
            WINDOW, LINKED, STRENGTH, RETENTION, True, DO_K, DO_V, PREC, BM, BN,
        )  # fmt: skip
    for at_block in range(full_low, full_high):
        acc_k, acc_v, column = _key_gradient(
            acc_k, acc_v, column, key, key_before, key_after, value, value_before, value_after, q, dy + row0 * DV,
            modes_head, strength_head, fade_head, lse + row0, delta + row0, fade_i, fade_before, fade_after,
            at_block, first, nq, nk, offset, scale, window, prefix, sqt, H, DK, DV, BK, BV,
            WINDOW, LINKED, STRENGTH, RETENTION, False, DO_K, DO_V, PREC, BM, BN,
        )  # fmt: skip
    if RETENTION and DO_K:
        tl.store(columns + column0 + i.to(tl.int64) * H, column, mask=i < nk)
    if DO_K:
        d = tl.arange(0, BK)
        at = dk + ((k0 + i[:, None]) * H + head) * DK + d[None, :]
        tl.store(at, (acc_k * scale).to(dk.dtype.element_ty), mask=(i < nk)[:, None] & (d < DK)[None, :])
    if DO_V:
        d = tl.arange(0, BV)
        at = dv + ((k0 + i[:, None]) * H + head) * DV + d[None, :]
        tl.store(at, acc_v.to(dv.dtype.element_ty), mask=(i < nk)[:, None] & (d < DV)[None, :])


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "prefix", "S"])
def _decode_kernel(
    q, k, v, modes, strength, fade, y, lse, cu_q, cu_k, Tq, Tk, window, prefix, S, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, LINKED: tl.constexpr, STRENGTH: tl.constexpr, RETENTION: tl.constexpr, VARLEN: tl.constexpr,
    SPLIT: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One of S shares of the keys for the few queries of one sequence, the heads of a group together as rows (query, head).

    Writes y [B Tq, H, DV]; with SPLIT the share's own result in float32 [B Tq, H, S, DV] and lse [B Tq, H, S].
    """
    split = tl.program_id(0)
    key_head = tl.program_id(1)
    if VARLEN:
        q0, nq, k0, nk = _lengths(cu_q, cu_k, tl.program_id(2))
        if nq == 0:
            return
    else:
        q0 = tl.program_id(2).to(tl.int64) * Tq
        k0 = tl.program_id(2).to(tl.int64) * Tk
        nq = Tq
        nk = Tk
    q = _start(q, q0, sqb, sqt, VARLEN)
    k = _start(k, k0, skb, skt, VARLEN) + key_head * skh
    v = _start(v, k0, svb, svt, VARLEN) + key_head * svh
    for x0 in range(0, nq * G, BM):
        x = x0 + tl.arange(0, BM)
        rows = x // G
        head = key_head * G + x % G
        live = rows < nq
        t = nk - nq + rows
        tokens = (q0 + rows) * H + head
        factor, fade_t, mode_b, mode_c, mode_f = _row_options(
            modes, strength, fade, q0 * H, (k0 + nk - nq) * H, rows.to(tl.int64) * H + head, live, scale, H, LINKED,
            STRENGTH, RETENTION,
        )  # fmt: skip
        fade_head = fade
        if RETENTION:
            fade_head = fade + (k0 * H + head)[:, None]
        d = tl.arange(0, BK)
        query = tl.load(
            q + (rows.to(tl.int64) * sqt + head * sqh)[:, None] + d[None, :],
            mask=live[:, None] & (d < DK)[None, :],
            other=0.0,
        )
        acc = tl.zeros((BM, BV), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        peak = tl.full((BM,), -1e30, tl.float32)
        first = nk - nq + x0 // G
        last = tl.minimum(nk - nq + (x0 + BM - 1) // G + 1, nk)
        ahead, low, _, _, end = _key_blocks(first, last, window, prefix, WINDOW, BN)
        share = (ahead + end - low + S - 1) // S
        for at in range(split * share, tl.minimum((split + 1) * share, ahead + end - low)):
            block = at
            if WINDOW:
                block = tl.where(at < ahead, at, at - ahead + low)
            acc, total, peak = _attend(
                acc, total, peak, query, k, v, fade_head, block, nk, t, factor, fade_t, mode_b, mode_c, mode_f, window, prefix,
                skt, svt, H, DK, DV, BK, BV, WINDOW, LINKED, STRENGTH, RETENTION, True, PREC, BN,
            )  # fmt: skip
        seen = total > 0  # a share may hold no key that a query sees
        total = tl.where(seen, total, 1.0)
        if SPLIT:
            tokens = tokens * S + split
            tl.store(lse + tokens, tl.where(seen, peak + tl.log2(total), float("-inf")), mask=live)
        d = tl.arange(0, BV)
        tl.store(
            y + tokens[:, None] * DV + d[None, :],
            (acc / total[:, None]).to(y.dtype.element_ty),
            mask=live[:, None] & (d < DV)[None, :],
        )


@triton.jit(do_not_specialize=["S"])
def _combine_kernel(parts, lse, y, S, DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr):
    """y of one query and head: its S shares weighted by their sums."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BS)
    d = tl.arange(0, BV)
    share = tl.load(lse + row * S + s, mask=s < S, other=float("-inf"))
    share = tl.exp2(share - tl.max(share, 0))
    part = tl.load(parts + (row * S + s[:, None]) * DV + d[None, :], mask=(s < S)[:, None] & (d < DV)[None, :], other=0.0)
    tl.store(y + row * DV + d, (tl.sum(part * share[:, None], 0) / tl.sum(share, 0)).to(y.dtype.element_ty), mask=d < DV)


def _launch(table: LaunchTable, q: Tensor, v: Tensor) -> Launch:
    size = max(next_power_of_2(q.shape[3]), next_power_of_2(v.shape[3]), 64)
    return table.lookup(min(4 * size, 512) if q.dtype == torch.float32 else size, capability_of(q.device))


def _kind(constants: dict) -> str:
    """Which launch table serves these switches."""
    if constants["LINKED"]:
        return LINKED
    return OPTIONS if constants["WINDOW"] or constants["STRENGTH"] or constants["RETENTION"] else PLAIN


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, tokens and heads of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _constants(q, k, v, window, read_modes, key_strength, log_retention, cu_q) -> dict:
    """The kernels' switches and sizes."""
    heads = q.shape[2]
    return {
        "H": heads,
        "G": heads // k.shape[2],
        "DK": q.shape[3],
        "DV": v.shape[3],
        "BK": next_power_of_2(q.shape[3]),
        "BV": next_power_of_2(v.shape[3]),
        "WINDOW": window is not None,
        "LINKED": read_modes is not None,
        "STRENGTH": key_strength is not None,
        "RETENTION": log_retention is not None,
        "VARLEN": cu_q is not None,
        "PREC": "ieee" if interpreting() else "tf32x3",
    }


def _ready(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose last axis is contiguous; the rest may have any strides (a cache's rows are read where they lie).

    Offsets to a head, and between the rows of a tile, are int32 in the kernels: where they do not fit the tensor is copied.
    """
    return [
        x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < 2**31 and 256 * x.stride(1) < 2**31 else x.contiguous()
        for x in tensors
    ]


def _base2(log_retention: Tensor | None, cu_k: Tensor | None) -> Tensor | None:
    """The running sums of log_retention in units of log 2."""
    return None if log_retention is None else (retention_bias(log_retention, cu_k) * 1.4426950408889634).float()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _blocks(cu: Tensor | None, x: Tensor, block: int) -> tuple[int, Tensor | None]:
    """(blocks of tokens of one sequence, or of all packed ones; which block each of the latter is)."""
    if cu is None:
        return triton.cdiv(x.shape[1], block), None
    chunks = chunk_indices(cu, x.shape[1], block)
    return chunks.shape[0], chunks


@torch.library.custom_op("memzoo::attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read_modes: Tensor | None,
    scale: float,
    window: int | None,
    prefix: int,
    key_strength: Tensor | None,
    log_retention: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [B, Tq, Hq, Dv], log of the softmax's sum in base 2 [B, Tq, Hq])."""
    q, k, v = _ready(q, k, v)
    y = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    constants = _constants(q, k, v, window, read_modes, key_strength, log_retention, cu_q)
    launch = _launch(FORWARD[_kind(constants)], q, v)
    blocks, chunks = _blocks(cu_q, q, launch.blocks["BM"])
    _forward_kernel[(blocks, q.shape[2], q.shape[0])](
        q, k, v, _contiguous(read_modes), _contiguous(key_strength), _base2(log_retention, cu_k), y, lse, cu_q, cu_k, chunks,
        q.shape[1], k.shape[1], window or 0, prefix, scale, *_strides(q, k, v),
        **constants, **launch.options(),
    )  # fmt: skip
    return y, lse


@_forward.register_fake
def _(q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, cu_q, cu_k):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("memzoo::attention_backward", mutates_args=())
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    read_modes: Tensor | None,
    scale: float,
    window: int | None,
    prefix: int,
    key_strength: Tensor | None,
    log_retention: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dread_modes, dkey_strength, dlog_retention); the last three are empty when there is no such input."""
    q, k, v = _ready(q, k, v)
    dy, modes, strength, fade = dy.contiguous(), _contiguous(read_modes), _contiguous(key_strength), _base2(log_retention, cu_k)
    dq = q.new_empty(q.shape)
    # Each query head has its own rows of dk and dv; those of a group are summed afterwards.
    group = q.shape[2] // k.shape[2]
    dk, dv = (x.new_empty(*x.shape[:2], q.shape[2], x.shape[3], dtype=x.dtype if group == 1 else torch.float32) for x in (k, v))
    delta = torch.empty_like(lse)
    dmodes = q.new_empty(read_modes.shape if read_modes is not None else 0, dtype=torch.float32)
    dstrength = q.new_empty(key_strength.shape if key_strength is not None else 0, dtype=torch.float32)
    columns = q.new_empty(log_retention.shape if log_retention is not None else 0, dtype=torch.float32)
    sizes = (q.shape[1], k.shape[1], window or 0, prefix, scale, *_strides(q, k, v))
    constants = _constants(q, k, v, window, read_modes, key_strength, log_retention, cu_q)
    launch = _launch(BACKWARD_QUERIES[_kind(constants)], q, v)
    blocks, chunks = _blocks(cu_q, q, launch.blocks["BM"])
    _backward_queries_kernel[(blocks, q.shape[2], q.shape[0])](
        q, k, v, modes, strength, fade, y, lse, dy, delta, dq, dmodes, dstrength, cu_q, cu_k, chunks, *sizes,
        **constants, **launch.options(),
    )  # fmt: skip
    launch = _launch(BACKWARD_KEYS[_kind(constants)], q, v)
    blocks, chunks = _blocks(cu_k, k, launch.blocks["BN"])
    # With links the keys' gradient needs three value tiles and the values' three key tiles: too much for one program.
    for do_k, do_v in [(True, True)] if modes is None else [(True, False), (False, True)]:
        _backward_keys_kernel[(blocks, q.shape[2], k.shape[0])](
            q, k, v, modes, strength, fade, lse, dy, delta, dk, dv, columns, cu_q, cu_k, chunks, *sizes,
            **constants, DO_K=do_k, DO_V=do_v, **launch.options(),
        )  # fmt: skip
    if group > 1:
        dk, dv = (d.view(*x.shape[:3], group, x.shape[3]).sum(3).to(x.dtype) for d, x in ((dk, k), (dv, v)))
    return (
        dq,
        dk,
        dv,
        dmodes if read_modes is None else dmodes.to(read_modes.dtype),
        dstrength if key_strength is None else dstrength.to(key_strength.dtype),
        columns if log_retention is None else retention_gradient(columns, cu_k).to(log_retention.dtype),
    )


@_backward.register_fake
def _(dy, q, k, v, y, lse, read_modes, scale, window, prefix, key_strength, log_retention, cu_q, cu_k):
    options = [
        q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)
        for x in (read_modes, key_strength, log_retention)
    ]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *options


def _setup_context(ctx, inputs, output):
    q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, cu_q, cu_k = inputs
    y, lse = output
    ctx.save_for_backward(q, k, v, y, lse, read_modes, key_strength, log_retention, cu_q, cu_k)
    ctx.options = scale, window, prefix
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, _):
    q, k, v, y, lse, read_modes, key_strength, log_retention, cu_q, cu_k = ctx.saved_tensors
    if dy is None:
        return (None,) * 11
    dq, dk, dv, dmodes, dstrength, dretention = _backward(
        dy, q, k, v, y, lse, read_modes, *ctx.options, key_strength, log_retention, cu_q, cu_k
    )
    return (
        dq, dk, dv, None if read_modes is None else dmodes, None, None, None,
        None if key_strength is None else dstrength, None if log_retention is None else dretention, None, None,
    )  # fmt: skip


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _sequences_asked(q: Tensor, cu_q: Tensor | None) -> int:
    """At most so many sequences have queries."""
    return q.shape[0] if cu_q is None else min(cu_q.numel() - 1, q.shape[1])


def is_decode(q: Tensor, k: Tensor, cu_seqlens: tuple[Tensor, Tensor] | None) -> bool:
    """Whether there are so few queries a sequence that the keys must be shared out among programs to fill the chip."""
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    if cu_seqlens is None:
        return rows <= DECODE_ROWS
    asked = _sequences_asked(q, cu_seqlens[0])
    return rows <= DECODE_ROWS * asked and q.shape[1] <= 4 * asked


@torch.library.custom_op("memzoo::attention_decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read_modes: Tensor | None,
    scale: float,
    window: int | None,
    prefix: int,
    key_strength: Tensor | None,
    log_retention: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
) -> Tensor:
    q, k, v = _ready(q, k, v)
    y = q.new_empty(*q.shape[:3], v.shape[3])
    seen = k.shape[1] if window is None else min(k.shape[1], window + prefix)
    programs = _sequences_asked(q, cu_q) * k.shape[2]
    combine = _launch(COMBINE, q, v)
    splits = max(1, min(DECODE_PROGRAMS // programs, triton.cdiv(seen, DECODE_KEYS), combine.blocks["BS"]))
    parts, lse = y, None
    if splits > 1:
        parts = q.new_empty(*q.shape[:3], splits, v.shape[3], dtype=torch.float32)
        lse = q.new_empty(*q.shape[:3], splits, dtype=torch.float32)
    launch = _launch(DECODE, q, v)
    constants = _constants(q, k, v, window, read_modes, key_strength, log_retention, cu_q)
    _decode_kernel[(splits, k.shape[2], q.shape[0] if cu_q is None else cu_q.numel() - 1)](
        q, k, v, _contiguous(read_modes), _contiguous(key_strength), _base2(log_retention, cu_k), parts, lse, cu_q, cu_k,
        q.shape[1], k.shape[1], window or 0, prefix, splits, scale, *_strides(q, k, v),
        **constants, SPLIT=splits > 1, **launch.options(),
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(q.shape[0] * q.shape[1] * q.shape[2],)](
            parts, lse, y, splits, DV=v.shape[3], BV=constants["BV"], **combine.options()
        )
    return y


@_decode.register_fake
def _(q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, cu_q, cu_k):
    return q.new_empty(*q.shape[:3], v.shape[3])


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read_modes: Tensor | None,
    scale: float,
    window: int | None,
    prefix: int,
    key_strength: Tensor | None,
    log_retention: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor] | None,
) -> Tensor:
    cu_seqlens = (None, None) if cu_seqlens is None else cu_seqlens
    return _forward(q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, *cu_seqlens)[0]


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read_modes: Tensor | None,
    scale: float,
    window: int | None,
    prefix: int,
    key_strength: Tensor | None,
    log_retention: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The decode step: few queries over many keys, no gradient."""
    cu_seqlens = (None, None) if cu_seqlens is None else cu_seqlens
    return _decode(q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, *cu_seqlens)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability in bf16, packed, with every option."""
    integers = ("Tq", "Tk", "window", "prefix")
    strides = tuple(f"s{x}{axis}" for x in "qkv" for axis in "bth")
    inputs = dict.fromkeys(("q", "k", "v"), "*bf16")
    options = {"modes": "*fp32", "strength": "*fp32", "fade": "*fp32", "cu_q": "*i64", "cu_k": "*i64", "chunks": "*i32"}
    numbers = {**dict.fromkeys(integers + strides, "i32"), "scale": "fp32"}
    outputs = {
        _forward_kernel: {"y": "*bf16", "lse": "*fp32"},
        _backward_queries_kernel: {
            "y": "*bf16", "lse": "*fp32", "dy": "*bf16", "delta": "*fp32", "dq": "*bf16", "dmodes": "*fp32", "dstrength": "*fp32",
        },
        _backward_keys_kernel: {
            "lse": "*fp32", "dy": "*bf16", "delta": "*fp32", "dk": "*fp32", "dv": "*fp32", "columns": "*fp32",
        },
        _decode_kernel: {"y": "*fp32", "lse": "*fp32", "S": "i32"},
    }  # fmt: skip

    def spec(name, kernel, kind, launch, size, **more):
        switches = {**dict.fromkeys(("WINDOW", "STRENGTH", "RETENTION"), kind != PLAIN), "LINKED": kind == LINKED, "VARLEN": True}
        absent = {PLAIN: ("modes", "strength", "fade"), OPTIONS: ("modes",), LINKED: ()}[kind]
        constants = {
            **switches, "H": 16, "G": 4, "DK": size, "DV": size, "BK": size, "BV": size, "PREC": "tf32x3",
            **more, **launch.blocks, **dict.fromkeys(absent),
        }  # fmt: skip
        label = {PLAIN: "", OPTIONS: ", every option", LINKED: ", links and every option"}[kind]
        return CompileSpec(
            f"attention {name} {size}{label}", kernel, {**inputs, **options, **outputs[kernel], **numbers}, constants,
            launch.num_warps, launch.num_stages, strides,
        )  # fmt: skip

    parts = (
        ("forward", _forward_kernel, FORWARD),
        ("backward queries", _backward_queries_kernel, BACKWARD_QUERIES),
        ("backward keys", _backward_keys_kernel, BACKWARD_KEYS),
    )
    for size in (64, 128, 256):
        for name, kernel, tables in parts:
            for kind, table in tables.items():
                launch = table.lookup(size, capability)
                if kind == PLAIN and launch == tables[OPTIONS].lookup(size, capability):
                    continue  # compiled with every option already, which takes more of everything
                if kernel is not _backward_keys_kernel:
                    yield spec(name, kernel, kind, launch, size)
                elif kind == LINKED:
                    yield spec(name, kernel, kind, launch, size, DO_K=True, DO_V=False)
                    yield spec("backward values", kernel, kind, launch, size, DO_K=False, DO_V=True)
                else:
                    yield spec("backward keys and values", kernel, kind, launch, size, DO_K=True, DO_V=True)
        yield spec("decode", _decode_kernel, LINKED, DECODE.lookup(size, capability), size, SPLIT=True)
    combine = COMBINE.lookup(256, capability)
    yield CompileSpec(
        "attention combine", _combine_kernel, {"parts": "*fp32", "lse": "*fp32", "y": "*bf16", "S": "i32"},
        {"DV": 256, "BV": 256, **combine.blocks}, combine.num_warps, combine.num_stages,
    )  # fmt: skip
