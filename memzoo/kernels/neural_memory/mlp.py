"""Triton kernels of the neural memory of depth 2: an MLP [D, F], GELU, [F, Dv] that each (sequence, head) trains as it reads.

HEAD
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch, LaunchTable, next_power_of_2
from .gates import _chunk, _chunks, _gate, _load, _store

# Keyed by the largest of the padded D and Dv and the chunk's length. BF is the slice of the hidden width that is worked on at once.
FORWARD = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BF": 32}),
    (128, 80): Launch(num_warps=8, num_stages=1, blocks={"BF": 32}),
})  # fmt: skip
BACKWARD = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BF": 32}),
    (128, 80): Launch(num_warps=8, num_stages=1, blocks={"BF": 32}),
})  # fmt: skip


@triton.jit
def _inside(i, j, R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Mask of the tile at rows i and columns j of an [R, C] matrix, where tiles do not fit it exactly."""
    inside = tl.full((BR, BC), 1, tl.int1)
    if R % BR != 0:
        inside = inside & (i < R)
    if C % BC != 0:
        inside = inside & (j < C)
    return inside


@triton.jit
def _slice(f, nil, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr):
    """Offsets and mask of columns [f, f + BF) of a layer in scratch, [D, F], or the second layer transposed, [Dv, F]."""
    i = nil + tl.arange(0, BD)[:, None]
    j = f + tl.arange(0, BF)[None, :]
    return i * F + j, _inside(i, j, D, F, BD, BF)


@triton.jit
def _hidden(f, nil, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """Offsets and mask of columns [f, f + BF) of a chunk's hidden rows [BT, F]."""
    i = nil + tl.arange(0, BT)[:, None]
    j = f + tl.arange(0, BF)[None, :]
    return i * F + j, _inside(i, j, BT, F, BT, BF)


@triton.jit
def _rows(nil, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """Offsets and mask of scratch rows [BT, W]."""
    i = nil + tl.arange(0, BT)[:, None]
    j = tl.arange(0, BW)[None, :]
    return i * W + j, _inside(i, j, BT, W, BT, BW)


@triton.jit
def _get(x, nil, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    at, inside = _rows(nil, W, BT, BW)
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def _places(n, position, cu_seqlens, T, HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr):
    """The tokens of a sequence, those already written in the chunk it opens with included."""
    length = T
    if VARLEN:
        length = (tl.load(cu_seqlens + n + 1) - tl.load(cu_seqlens + n)).to(tl.int32)
    if HAS_POSITION:
        length += tl.load(position + n).to(tl.int32)
    return length


@triton.jit
def _copy(to, source, SIZE: tl.constexpr):
    i = tl.arange(0, 1024)
    for at in range(0, SIZE, 1024):
        inside = at + i < SIZE
        tl.store(to + at + i, tl.load(source + at + i, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def _add(to, source, SIZE: tl.constexpr):
    i = tl.arange(0, 1024)
    for at in range(0, SIZE, 1024):
        inside = at + i < SIZE
        total = tl.load(to + at + i, mask=inside, other=0.0) + tl.load(source + at + i, mask=inside, other=0.0)
        tl.store(to + at + i, total, mask=inside)


@triton.jit
def _turn(to, source, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr):
    """Copy or add the transpose of [ROWS, COLUMNS] to [COLUMNS, ROWS]."""
    for begin in range(0, ROWS * COLUMNS, 1024):
        at = begin + tl.arange(0, 1024)
        inside = at < ROWS * COLUMNS
        value = tl.load(source + (at % ROWS) * COLUMNS + at // ROWS, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(to + at, mask=inside, other=0.0)
        tl.store(to + at, value, mask=inside)


@triton.jit
def _clear(to, SIZE: tl.constexpr):
    i = tl.arange(0, 1024)
    for at in range(0, SIZE, 1024):
        tl.store(to + at + i, tl.zeros((1024,), tl.float32), mask=at + i < SIZE)


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_slopes(z):
    """(GELU, its first and its second derivative)."""
    below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return z * below, below + z * density, density * (2.0 - z * z)


@triton.jit
def _enter(
    slot, base, number, head, w1, w2, m1, m2, s1, s2,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, HAS_POSITION: tl.constexpr,
):  # fmt: skip
    """Copy what a sequence begins with to a slot (W1, S1, W2^T, S2^T) and the weights of its open chunk to `base` (B1, B2^T)."""
    first: tl.constexpr = D * F
    second: tl.constexpr = F * DV
    if HAS_POSITION:
        at = number.to(tl.int64)
        _copy(slot + first, m1 + at * first, first)
        _turn(slot + 2 * first + second, m2 + at * second, F, DV, False)
        _copy(base, s1 + at * first, first)
        _turn(base + first, s2 + at * second, F, DV, False)
    else:
        at = head.to(tl.int64)
        _clear(slot + first, first)
        _clear(slot + 2 * first + second, second)
    _copy(slot, w1 + at * first, first)
    _turn(slot + 2 * first, w2 + at * second, F, DV, False)
    tl.debug_barrier()


@triton.jit
def _inner_gradient(
    k, v, lr, b1, b2, xs, slopes, curves, us, rows, vectors, base, front, end, head, H, nil, limit,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    CURVE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of one chunk: X, gelu'(Z), (with CURVE) gelu''(Z) and U to scratch [BT, F], and G2 to rows [BT, Dv].

    To vectors, by row: theta min(1, max / n), and with a clamp min(1, max / n), n, |K|^2, |G1|^2, |X|^2 and |G2|^2.
    """
    kind = k.dtype.element_ty
    key = _load(k, base + nil, front, end, head, H, D, BT, BD)
    grad = -_load(v, base + nil, front, end, head, H, DV, BT, BV).to(tl.float32)
    if RESIDUAL and L2:
        grad += key.to(tl.float32)
    x_square = tl.zeros((BT,), tl.float32)
    u_square = tl.zeros((BT,), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, D, F, BD, BF)
        here, held = _hidden(f, still, F, BT, BF)
        z = tl.dot(key, tl.load(b1 + at, mask=inside, other=0.0).to(kind), input_precision=PRECISION)
        x, slope, curve = _gelu_slopes(z)
        tl.store(xs + here, x.to(kind), mask=held)
        tl.store(slopes + here, slope.to(kind), mask=held)
        if CURVE:
            tl.store(curves + here, curve.to(kind), mask=held)
        if CLAMP:
            x_square += tl.sum(x * x, 1)
        if L2:
            at, inside = _slice(f, still, DV, F, BV, BF)
            weight = tl.load(b2 + at, mask=inside, other=0.0).to(kind)
            grad += tl.dot(x.to(kind), tl.trans(weight), input_precision=PRECISION)
    wide, real = _rows(nil, DV, BT, BV)
    tl.store(rows + wide, grad, mask=real)
    tl.debug_barrier()
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        weight = tl.load(b2 + at, mask=inside, other=0.0).to(kind)
        u = tl.dot(grad.to(kind), weight, input_precision=PRECISION)
        tl.store(us + here, u.to(kind), mask=held)
        if CLAMP:
            inner = u * tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
            u_square += tl.sum(inner * inner, 1)
    step = _gate(lr, base, front, end, head, H, BT, 1, 0)
    i = nil + tl.arange(0, BT)
    if CLAMP:
        k_square = tl.sum(key.to(tl.float32) * key.to(tl.float32), 1)
        g_square = tl.sum(grad * grad, 1)
        norm = tl.sqrt(k_square * u_square + x_square * g_square)
        factor = limit / tl.maximum(norm, limit)
        step *= factor
        tl.store(vectors + BT + i, factor)
        tl.store(vectors + 2 * BT + i, norm)
        tl.store(vectors + 3 * BT + i, k_square)
        tl.store(vectors + 4 * BT + i, u_square)
        tl.store(vectors + 5 * BT + i, x_square)
        tl.store(vectors + 6 * BT + i, g_square)
    tl.store(vectors + i, step)
    tl.debug_barrier()


@triton.jit
def _put(x, value, base, front, end, head, H, BT: tl.constexpr, COUNT: tl.constexpr, WHICH: tl.constexpr):
    """Number WHICH of COUNT a token."""
    i = tl.arange(0, BT)
    tl.store(x + ((base + i) * H + head) * COUNT + WHICH, value, mask=(i >= front) & (i < end))


@triton.jit
def _last_row(mask, scalars, base, front, end, head, H, BT: tl.constexpr):
    """Of the chunk's last token: its rows of A and E, zero at places that are not real, and its beta, c and e."""
    i = tl.arange(0, BT)
    last = (base + end - 1) * H + head
    into_weights = tl.load(mask + last * BT + i)
    into_momentum = _gate(scalars, base, front, end, head, H, BT, 4, 3)
    return (
        into_weights,
        into_momentum,
        tl.load(scalars + last * 4),
        tl.load(scalars + last * 4 + 1),
        tl.load(scalars + last * 4 + 2),
    )


@triton.jit
def _advance(
    q, k, y, mask, scalars, slot, to, xs, slopes, us, rows, pairs, vectors, base, front, end, head, H, nil, opened, keep_start,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, READ: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write one chunk: the state `slot` to the state `to` (which may be the same), and with READ its outputs to y.

    With READ and `keep_start`, the weights before go to `opened` too: they are the start of a chunk that stays open.
    """
    kind = k.dtype.element_ty
    step = tl.load(vectors + nil + tl.arange(0, BT))
    first: tl.constexpr = D * F
    second: tl.constexpr = F * DV
    into_weights, into_momentum, beta_last, c_last, e_last = _last_row(mask, scalars, base, front, end, head, H, BT)
    square, inside = _rows(nil, BT, BT, BT)
    if READ:
        keys = _load(k, base + nil, front, end, head, H, D, BT, BD)
        pair = tl.dot(_load(q, base + nil, front, end, head, H, D, BT, BD), tl.trans(keys), input_precision=PRECISION)
        pair *= _load(mask, base + nil, front, end, head, H, BT, BT, BT)
        tl.store(pairs + square, pair.to(kind), mask=inside)
        tl.debug_barrier()
        beta = _gate(scalars, base, front, end, head, H, BT, 4, 0)[:, None]
        c = _gate(scalars, base, front, end, head, H, BT, 4, 1)[:, None]
        mixed = tl.zeros((BT, BT), tl.float32)
        out = tl.zeros((BT, BV), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at1, inside1 = _slice(f, still, D, F, BD, BF)
        at2, inside2 = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        x = tl.load(xs + here, mask=held, other=0.0)
        inner = step[:, None] * tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        inner *= tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        w1 = tl.load(slot + at1, mask=inside1, other=0.0)
        s1 = tl.load(slot + first + at1, mask=inside1, other=0.0)
        if READ:
            query = _load(q, base + still, front, end, head, H, D, BT, BD)
            compared = _get(pairs, still, BT, BT, BT)
            h = beta * tl.dot(query, w1.to(kind), input_precision=PRECISION)
            h += c * tl.dot(query, s1.to(kind), input_precision=PRECISION)
            h -= tl.dot(compared, inner.to(kind), input_precision=PRECISION)
        key = _load(k, base + still, front, end, head, H, D, BT, BD)
        change1 = tl.dot(tl.trans(key), (into_weights[:, None] * inner).to(kind), input_precision=PRECISION)
        moved1 = tl.dot(tl.trans(key), (into_momentum[:, None] * inner).to(kind), input_precision=PRECISION)
        tl.debug_barrier()  # every thread has read this slice before any writes it
        if READ:  # noqa: SIM102
            if keep_start:
                tl.store(opened + at1, w1, mask=inside1)
        tl.store(to + at1, beta_last * w1 + c_last * s1 - change1, mask=inside1)
        tl.store(to + first + at1, e_last * s1 - moved1, mask=inside1)
        w2 = tl.load(slot + 2 * first + at2, mask=inside2, other=0.0)
        s2 = tl.load(slot + 2 * first + second + at2, mask=inside2, other=0.0)
        if READ:
            a = _gelu(h).to(kind)
            mixed += tl.dot(a, tl.trans(x), input_precision=PRECISION)
            out += beta * tl.dot(a, tl.trans(w2.to(kind)), input_precision=PRECISION)
            out += c * tl.dot(a, tl.trans(s2.to(kind)), input_precision=PRECISION)
        write = (step[:, None] * _get(rows, still, DV, BT, BV)).to(kind)
        x = x.to(tl.float32)
        change2 = tl.dot(tl.trans(write), (into_weights[:, None] * x).to(kind), input_precision=PRECISION)
        moved2 = tl.dot(tl.trans(write), (into_momentum[:, None] * x).to(kind), input_precision=PRECISION)
        tl.debug_barrier()
        if READ:  # noqa: SIM102
            if keep_start:
                tl.store(opened + first + at2, w2, mask=inside2)
        tl.store(to + 2 * first + at2, beta_last * w2 + c_last * s2 - change2, mask=inside2)
        tl.store(to + 2 * first + second + at2, e_last * s2 - moved2, mask=inside2)
    if READ:
        written = (step[:, None] * _get(rows, nil, DV, BT, BV)).to(kind)
        mixed *= _load(mask, base + nil, front, end, head, H, BT, BT, BT)
        out -= tl.dot(mixed.to(kind), written, input_precision=PRECISION)
        if RESIDUAL:
            out += _load(q, base + nil, front, end, head, H, D, BT, BD).to(tl.float32)
        _store(y, out, base + nil, front, end, head, H, DV, BT, BV)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "numbers", "every", "zero"])
def _forward_kernel(
    q, k, v, lr, mask, scalars, w1, w2, m1, m2, s1, s2, y, fw1, fw2, fm1, fm2, fs1, fs2, boundaries, slot_starts,
    states, hidden, rows, pairs, position, cu_seqlens, T, H, numbers, every, zero, limit,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_FINAL: tl.constexpr, KEEP: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All chunks of one (sequence, head) after another: outputs, boundaries (KEEP), final states (HAS_FINAL)."""
    first: tl.constexpr = D * F
    second: tl.constexpr = F * DV
    size: tl.constexpr = 2 * (first + second)
    program = tl.program_id(0).to(tl.int64)
    slot = states + program * (size + first + second)
    start = slot + size
    xs = hidden + program * (3 * BT * F)
    slopes = xs + BT * F
    us = slopes + BT * F
    grad_rows = rows + program * (BT * (DV + 8))
    pair_rows = pairs + program * (BT * BT)
    vectors = grad_rows + BT * DV
    for turn in range(tl.cdiv(numbers - tl.program_id(0), tl.num_programs(0))):
        number = tl.program_id(0) + turn * tl.num_programs(0)
        n = number // H
        head = number % H
        count = _chunks(n, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
        _enter(slot, start, number, head, w1, w2, m1, m2, s1, s2, D, F, DV, HAS_POSITION)
        for chunk in range(count):
            base, front, end = _chunk(n, chunk, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
            nil = (chunk + 1) * zero
            # The weights that gradients are taken at: those of the chunk's start.
            b1 = tl.where(front > 0, size, 0)
            b2 = tl.where(front > 0, size + first, 2 * first)
            _inner_gradient(
                k, v, lr, slot + b1, slot + b2, xs, slopes, slopes, us, grad_rows, vectors, base, front, end, head, H, nil, limit,
                D, F, DV, RESIDUAL, L2, CLAMP, False, PRECISION, BT, BD, BF, BV,
            )  # fmt: skip
            keep_start = (chunk == count - 1) & (end < BT) & (front == 0)
            _advance(
                q, k, y, mask, scalars, slot, slot, xs, slopes, us, grad_rows, pair_rows, vectors,
                base, front, end, head, H, nil, start, keep_start, D, F, DV, RESIDUAL, True, PRECISION, BT, BD, BF, BV,
            )  # fmt: skip
            if KEEP:
                after = chunk + 1
                if (after % every == 0) & (after < count):
                    kept = tl.load(slot_starts + n) + after // every - 1
                    _copy(boundaries + (kept * H + head) * size, slot, size)
        if HAS_FINAL:
            at = number.to(tl.int64)
            _copy(fw1 + at * first, slot, first)
            _copy(fm1 + at * first, slot + first, first)
            _turn(fw2 + at * second, slot + 2 * first, DV, F, False)
            _turn(fm2 + at * second, slot + 2 * first + second, DV, F, False)
            open_chunk = _places(n, position, cu_seqlens, T, HAS_POSITION, VARLEN) % BT > 0
            _copy(fs1 + at * first, slot + tl.where(open_chunk, size, 0), first)
            _turn(fs2 + at * second, slot + tl.where(open_chunk, size + first, 2 * first), DV, F, False)
        tl.debug_barrier()


# The backward of one chunk, a pass over the hidden width each, in this order. A program's scratch, beside the states: hidden rows [BT, F] in
# the inputs' type (xs, slopes, curves, us, hs, dxs, dgs), rows [BT, D or Dv] and vectors [BT] in float32, and two pairs [BT, BT] in the inputs' type. What a
# loop multiplies by in every slice is loaded in every slice: kept across the loop it would fill the registers. A product that is needed
# transposed goes through memory.


@triton.jit
def _pass_hidden(
    q, k, mask, scalars, slot, slopes, us, hs, pairs, vectors, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The queries' hidden rows before GELU, to hs."""
    kind = k.dtype.element_ty
    step = tl.load(vectors + nil + tl.arange(0, BT))
    square, whole = _rows(nil, BT, BT, BT)
    key = _load(k, base + nil, front, end, head, H, D, BT, BD)
    pair = tl.dot(_load(q, base + nil, front, end, head, H, D, BT, BD), tl.trans(key), input_precision=PRECISION)
    pair *= _load(mask, base + nil, front, end, head, H, BT, BT, BT)
    tl.store(pairs + square, pair.to(kind), mask=whole)
    tl.debug_barrier()
    beta = _gate(scalars, base, front, end, head, H, BT, 4, 0)[:, None]
    c = _gate(scalars, base, front, end, head, H, BT, 4, 1)[:, None]
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, D, F, BD, BF)
        here, held = _hidden(f, still, F, BT, BF)
        inner = step[:, None] * tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        inner *= tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        h = -tl.dot(_get(pairs, still, BT, BT, BT), inner.to(kind), input_precision=PRECISION)
        query = _load(q, base + still, front, end, head, H, D, BT, BD)
        w1 = tl.load(slot + at, mask=inside, other=0.0).to(kind)
        h += beta * tl.dot(query, w1, input_precision=PRECISION)
        s1 = tl.load(slot + D * F + at, mask=inside, other=0.0).to(kind)
        h += c * tl.dot(query, s1, input_precision=PRECISION)
        tl.store(hs + here, h.to(kind), mask=held)
    tl.debug_barrier()


@triton.jit
def _pass_second(
    k, dy, mask, scalars, dmask, dscalars, slot, carry, xs, hs, dxs, rows, drows, pairs, vectors, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Through the second layer's read and write: dH to hs, part of dX to dxs, dg2 to drows, dW2 and dS2 carried on; part of dA to dmask and of the
    gradients of beta, c, e and the last row of E to dscalars.
    """
    kind = k.dtype.element_ty
    step = tl.load(vectors + nil + tl.arange(0, BT))
    first: tl.constexpr = D * F
    second: tl.constexpr = F * DV
    wide, real = _rows(nil, DV, BT, BV)
    square, whole = _rows(nil, BT, BT, BT)
    outer = _load(dy, base + nil, front, end, head, H, DV, BT, BV)
    left = _load(mask, base + nil, front, end, head, H, BT, BT, BT)
    written = (step[:, None] * _get(rows, nil, DV, BT, BV)).to(kind)
    pair = left * tl.dot(outer, tl.trans(written), input_precision=PRECISION)
    tl.store(pairs + square, pair.to(kind), mask=whole)
    pair = tl.trans(left) * tl.dot(written, tl.trans(outer), input_precision=PRECISION)
    tl.store(pairs + BT * BT + square, pair.to(kind), mask=whole)
    tl.debug_barrier()
    beta = _gate(scalars, base, front, end, head, H, BT, 4, 0)[:, None]
    c = _gate(scalars, base, front, end, head, H, BT, 4, 1)[:, None]
    into_weights, into_momentum, beta_last, c_last, e_last = _last_row(mask, scalars, base, front, end, head, H, BT)
    into_weights = into_weights[:, None]
    into_momentum = into_momentum[:, None]
    mixed = tl.zeros((BT, BT), tl.float32)
    dwrite = tl.zeros((BT, BV), tl.float32)
    dbeta = tl.zeros((BT,), tl.float32)
    dc = tl.zeros((BT,), tl.float32)
    dinto_weights = tl.zeros((BT,), tl.float32)
    dinto_momentum = tl.zeros((BT,), tl.float32)
    dbeta_last = tl.zeros((BV,), tl.float32)
    dc_last = tl.zeros((BV,), tl.float32)
    de_last = tl.zeros((BV,), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        x = tl.load(xs + here, mask=held, other=0.0)
        a, slope, _ = _gelu_slopes(tl.load(hs + here, mask=held, other=0.0).to(tl.float32))
        mixed += tl.dot(a.to(kind), tl.trans(x), input_precision=PRECISION)
        # The read.
        given = _load(dy, base + still, front, end, head, H, DV, BT, BV)
        w2 = tl.load(slot + 2 * first + at, mask=inside, other=0.0)
        part = tl.dot(given, w2.to(kind), input_precision=PRECISION)
        dbeta += tl.sum(a * part, 1)
        dh = beta * part
        s2 = tl.load(slot + 2 * first + second + at, mask=inside, other=0.0)
        part = tl.dot(given, s2.to(kind), input_precision=PRECISION)
        dc += tl.sum(a * part, 1)
        dh += c * part
        dh -= tl.dot(_get(pairs, still, BT, BT, BT), x, input_precision=PRECISION)
        # The write.
        dx = -tl.dot(_get(pairs + BT * BT, still, BT, BT, BT), a.to(kind), input_precision=PRECISION)
        write = (step[:, None] * _get(rows, still, DV, BT, BV)).to(kind)
        dw2 = tl.load(carry + 2 * first + at, mask=inside, other=0.0)
        part = tl.dot(write, dw2.to(kind), input_precision=PRECISION)
        dinto_weights -= tl.sum(x.to(tl.float32) * part, 1)
        dx -= into_weights * part
        ds2 = tl.load(carry + 2 * first + second + at, mask=inside, other=0.0)
        part = tl.dot(write, ds2.to(kind), input_precision=PRECISION)
        dinto_momentum -= tl.sum(x.to(tl.float32) * part, 1)
        dx -= into_momentum * part
        dwrite -= into_weights * tl.dot(x, tl.trans(dw2.to(kind)), input_precision=PRECISION)
        dwrite -= into_momentum * tl.dot(x, tl.trans(ds2.to(kind)), input_precision=PRECISION)
        dbeta_last += tl.sum(w2 * dw2, 1)
        dc_last += tl.sum(s2 * dw2, 1)
        de_last += tl.sum(s2 * ds2, 1)
        from_weights = tl.dot(tl.trans(given), (beta * a).to(kind), input_precision=PRECISION)
        from_momentum = tl.dot(tl.trans(given), (c * a).to(kind), input_precision=PRECISION)
        tl.debug_barrier()  # every thread has read this slice before any writes it
        tl.store(hs + here, (dh * slope).to(kind), mask=held)
        tl.store(dxs + here, dx.to(kind), mask=held)
        tl.store(carry + 2 * first + at, beta_last * dw2 + from_weights, mask=inside)
        tl.store(carry + 2 * first + second + at, c_last * dw2 + e_last * ds2 + from_momentum, mask=inside)
    outer = _load(dy, base + nil, front, end, head, H, DV, BT, BV)
    written = (step[:, None] * _get(rows, nil, DV, BT, BV)).to(kind)
    left = _load(mask, base + nil, front, end, head, H, BT, BT, BT)
    tl.debug_barrier()
    tl.store(pairs + square, (left * mixed).to(kind), mask=whole)
    mixed *= tl.dot(outer, tl.trans(written), input_precision=PRECISION)
    last = tl.arange(0, BT) == end - 1
    mixed = tl.where(last[:, None], dinto_weights[None, :], 0.0) - mixed
    _store(dmask, mixed, base + nil, front, end, head, H, BT, BT, BT)
    tl.debug_barrier()
    dwrite -= tl.dot(tl.trans(_get(pairs, nil, BT, BT, BT)), outer, input_precision=PRECISION)
    tl.store(drows + wide, dwrite, mask=real)
    _put(dscalars, dbeta + tl.where(last, tl.sum(dbeta_last, 0), 0.0), base + nil, front, end, head, H, BT, 4, 0)
    _put(dscalars, dc + tl.where(last, tl.sum(dc_last, 0), 0.0), base + nil, front, end, head, H, BT, 4, 1)
    _put(dscalars, tl.where(last, tl.sum(de_last, 0), 0.0), base + nil, front, end, head, H, BT, 4, 2)
    _put(dscalars, dinto_momentum, base + nil, front, end, head, H, BT, 4, 3)
    tl.debug_barrier()


@triton.jit
def _pass_keys(
    q, k, mask, scalars, dlr, dscalars, carry, slopes, us, hs, dgs, key_rows, pairs, vectors, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Through what the first layer is written: dg1 to dgs, rowsum(dg1 * G1) to dlr, part of dK to key_rows, of the last
    row's dA to vectors and of its dE to dscalars.
    """
    kind = k.dtype.element_ty
    step = tl.load(vectors + nil + tl.arange(0, BT))
    square, whole = _rows(nil, BT, BT, BT)
    query = _load(q, base + nil, front, end, head, H, D, BT, BD)
    pair = tl.dot(_load(k, base + nil, front, end, head, H, D, BT, BD), tl.trans(query), input_precision=PRECISION)
    pair *= tl.trans(_load(mask, base + nil, front, end, head, H, BT, BT, BT))
    tl.store(pairs + square, pair.to(kind), mask=whole)
    tl.debug_barrier()
    into_weights, into_momentum, _, _, _ = _last_row(mask, scalars, base, front, end, head, H, BT)
    into_weights = into_weights[:, None]
    into_momentum = into_momentum[:, None]
    dkey = tl.zeros((BT, BD), tl.float32)
    dstep = tl.zeros((BT,), tl.float32)
    dinto_weights = tl.zeros((BT,), tl.float32)
    dinto_momentum = tl.zeros((BT,), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, D, F, BD, BF)
        here, held = _hidden(f, still, F, BT, BF)
        dh = tl.load(hs + here, mask=held, other=0.0)
        dwrite = -tl.dot(_get(pairs, still, BT, BT, BT), dh, input_precision=PRECISION)
        inner = tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        inner *= tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        write = step[:, None] * inner
        key = _load(k, base + still, front, end, head, H, D, BT, BD)
        dw1 = tl.load(carry + at, mask=inside, other=0.0).to(kind)
        part = tl.dot(key, dw1, input_precision=PRECISION)
        dinto_weights -= tl.sum(write * part, 1)
        dwrite -= into_weights * part
        dkey -= into_weights * tl.dot(write.to(kind), tl.trans(dw1), input_precision=PRECISION)
        ds1 = tl.load(carry + D * F + at, mask=inside, other=0.0).to(kind)
        part = tl.dot(key, ds1, input_precision=PRECISION)
        dinto_momentum -= tl.sum(write * part, 1)
        dwrite -= into_momentum * part
        dkey -= into_momentum * tl.dot(write.to(kind), tl.trans(ds1), input_precision=PRECISION)
        dstep += tl.sum(dwrite * inner, 1)
        tl.store(dgs + here, dwrite.to(kind), mask=held)
    wide, real = _rows(nil, D, BT, BD)
    tl.store(key_rows + wide, dkey, mask=real)
    tl.store(vectors + 7 * BT + nil + tl.arange(0, BT), dinto_weights)
    _put(dlr, dstep, base + nil, front, end, head, H, BT, 1, 0)
    dinto_momentum += _gate(dscalars, base + nil, front, end, head, H, BT, 4, 3)
    tl.debug_barrier()
    _put(dscalars, dinto_momentum, base + nil, front, end, head, H, BT, 4, 3)
    tl.debug_barrier()


@triton.jit
def _pass_first(
    q, k, dy, mask, scalars, dq, dmask, dscalars, slot, carry, slopes, us, hs, pairs, vectors, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Through the first layer's read: dQ, dW1 and dS1 carried on, M1 to pairs, and the rest of dmask and dscalars."""
    kind = k.dtype.element_ty
    step = tl.load(vectors + nil + tl.arange(0, BT))
    beta = _gate(scalars, base, front, end, head, H, BT, 4, 0)[:, None]
    c = _gate(scalars, base, front, end, head, H, BT, 4, 1)[:, None]
    token = (base + end - 1) * H + head
    beta_last, c_last = tl.load(scalars + token * 4), tl.load(scalars + token * 4 + 1)
    e_last = tl.load(scalars + token * 4 + 2)
    mixed = tl.zeros((BT, BT), tl.float32)
    dquery = tl.zeros((BT, BD), tl.float32)
    dbeta = tl.zeros((BT,), tl.float32)
    dc = tl.zeros((BT,), tl.float32)
    dbeta_last = tl.zeros((BD,), tl.float32)
    dc_last = tl.zeros((BD,), tl.float32)
    de_last = tl.zeros((BD,), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, D, F, BD, BF)
        here, held = _hidden(f, still, F, BT, BF)
        dh = tl.load(hs + here, mask=held, other=0.0)
        write = step[:, None] * tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        write *= tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        mixed += tl.dot(dh, tl.trans(write.to(kind)), input_precision=PRECISION)
        query = _load(q, base + still, front, end, head, H, D, BT, BD)
        w1 = tl.load(slot + at, mask=inside, other=0.0)
        part = tl.dot(dh, tl.trans(w1.to(kind)), input_precision=PRECISION)
        dbeta += tl.sum(query.to(tl.float32) * part, 1)
        dquery += beta * part
        s1 = tl.load(slot + D * F + at, mask=inside, other=0.0)
        part = tl.dot(dh, tl.trans(s1.to(kind)), input_precision=PRECISION)
        dc += tl.sum(query.to(tl.float32) * part, 1)
        dquery += c * part
        dw1 = tl.load(carry + at, mask=inside, other=0.0)
        ds1 = tl.load(carry + D * F + at, mask=inside, other=0.0)
        dbeta_last += tl.sum(w1 * dw1, 1)
        dc_last += tl.sum(s1 * dw1, 1)
        de_last += tl.sum(s1 * ds1, 1)
        dh = dh.to(tl.float32)
        from_weights = tl.dot(tl.trans(query), (beta * dh).to(kind), input_precision=PRECISION)
        from_momentum = tl.dot(tl.trans(query), (c * dh).to(kind), input_precision=PRECISION)
        tl.debug_barrier()
        tl.store(carry + at, beta_last * dw1 + from_weights, mask=inside)
        tl.store(carry + D * F + at, c_last * dw1 + e_last * ds1 + from_momentum, mask=inside)
    key = _load(k, base + nil, front, end, head, H, D, BT, BD)
    pair = (mixed * _load(mask, base + nil, front, end, head, H, BT, BT, BT)).to(kind)
    square, whole = _rows(nil, BT, BT, BT)
    tl.store(pairs + square, pair, mask=whole)
    dquery -= tl.dot(pair, key, input_precision=PRECISION)
    if RESIDUAL:
        dquery += _load(dy, base + nil, front, end, head, H, D, BT, BD).to(tl.float32)
    _store(dq, dquery, base + nil, front, end, head, H, D, BT, BD)
    mixed *= tl.dot(_load(q, base + nil, front, end, head, H, D, BT, BD), tl.trans(key), input_precision=PRECISION)
    dleft = _load(dmask, base + nil, front, end, head, H, BT, BT, BT) - mixed
    last = tl.arange(0, BT) == end - 1
    dinto_weights = tl.load(vectors + 7 * BT + nil + tl.arange(0, BT))
    dleft += tl.where(last[:, None], dinto_weights[None, :], 0.0)
    dbeta += _gate(dscalars, base + nil, front, end, head, H, BT, 4, 0) + tl.where(last, tl.sum(dbeta_last, 0), 0.0)
    dc += _gate(dscalars, base + nil, front, end, head, H, BT, 4, 1) + tl.where(last, tl.sum(dc_last, 0), 0.0)
    de = _gate(dscalars, base + nil, front, end, head, H, BT, 4, 2) + tl.where(last, tl.sum(de_last, 0), 0.0)
    tl.debug_barrier()
    _store(dmask, dleft, base + nil, front, end, head, H, BT, BT, BT)
    _put(dscalars, dbeta, base + nil, front, end, head, H, BT, 4, 0)
    _put(dscalars, dc, base + nil, front, end, head, H, BT, 4, 1)
    _put(dscalars, de, base + nil, front, end, head, H, BT, 4, 2)
    tl.debug_barrier()


@triton.jit
def _pass_inner(
    q, k, dk, dv, dlr, b1, b2, db1, db2, xs, slopes, curves, us, dxs, dgs, rows, drows, key_rows, pairs,
    vectors, base, front, end, head, H, nil, limit,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Through the clamp and the inner gradient: dlr, dV, dK, and the gradient of the weights it is taken at, added to db1 and db2."""
    kind = k.dtype.element_ty
    i = nil + tl.arange(0, BT)
    step = tl.load(vectors + i)
    dgrad = _get(drows, nil, DV, BT, BV)
    dstep = _gate(dlr, base + nil, front, end, head, H, BT, 1, 0)
    dstep += tl.sum(dgrad * _get(rows, nil, DV, BT, BV), 1)
    dgrad *= step[:, None]
    dtheta = dstep
    if CLAMP:
        # Of n, over n: what every gradient that n is made of gets, times its own partner's square.
        norm = tl.load(vectors + 2 * BT + i)
        by_norm = tl.where(norm > limit, -step * dstep / tl.maximum(norm * norm, limit * limit), 0.0)
        by_key = by_norm * tl.load(vectors + 3 * BT + i)
        by_inner = by_norm * tl.load(vectors + 4 * BT + i)
        by_grad = by_norm * tl.load(vectors + 6 * BT + i)
        dgrad += (by_norm * tl.load(vectors + 5 * BT + i))[:, None] * _get(rows, nil, DV, BT, BV)
        dtheta *= tl.load(vectors + BT + i)
    tl.debug_barrier()
    _put(dlr, dtheta, base + nil, front, end, head, H, BT, 1, 0)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        slope = tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        dinner = step[:, None] * tl.load(dgs + here, mask=held, other=0.0).to(tl.float32)
        if CLAMP:
            dinner += by_key[:, None] * slope * tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        weight = tl.load(b2 + at, mask=inside, other=0.0).to(kind)
        dgrad += tl.dot((dinner * slope).to(kind), tl.trans(weight), input_precision=PRECISION)
    _store(dv, -dgrad, base + nil, front, end, head, H, DV, BT, BV)
    dkey = _get(key_rows, nil, D, BT, BD)
    if RESIDUAL and L2:
        dkey += dgrad
    tl.debug_barrier()
    for f in range(0, F, BF):
        still = f * nil
        at1, inside1 = _slice(f, still, D, F, BD, BF)
        at2, inside2 = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        slope = tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        u = tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        x = tl.load(xs + here, mask=held, other=0.0)
        dinner = step[:, None] * tl.load(dgs + here, mask=held, other=0.0).to(tl.float32)
        if CLAMP:
            dinner += by_key[:, None] * slope * u
        grad = _get(rows, still, DV, BT, BV).to(kind)
        change2 = tl.dot(tl.trans(grad), (dinner * slope).to(kind), input_precision=PRECISION)
        dx = tl.load(dxs + here, mask=held, other=0.0).to(tl.float32)
        if CLAMP:
            dx += by_grad[:, None] * x.to(tl.float32)
        if L2:
            negative = _load(dv, base + still, front, end, head, H, DV, BT, BV)
            weight = tl.load(b2 + at2, mask=inside2, other=0.0).to(kind)
            dx -= tl.dot(negative, weight, input_precision=PRECISION)
            change2 -= tl.dot(tl.trans(negative), x, input_precision=PRECISION)
        change2 += tl.load(db2 + at2, mask=inside2, other=0.0)
        dz = (dinner * u * tl.load(curves + here, mask=held, other=0.0).to(tl.float32) + dx * slope).to(kind)
        weight = tl.load(b1 + at1, mask=inside1, other=0.0).to(kind)
        dkey += tl.dot(dz, tl.trans(weight), input_precision=PRECISION)
        key = _load(k, base + still, front, end, head, H, D, BT, BD)
        change1 = tl.dot(tl.trans(key), dz, input_precision=PRECISION)
        change1 += tl.load(db1 + at1, mask=inside1, other=0.0)
        tl.debug_barrier()
        tl.store(db1 + at1, change1, mask=inside1)
        tl.store(db2 + at2, change2, mask=inside2)
    if CLAMP:
        dkey += by_inner[:, None] * _load(k, base + nil, front, end, head, H, D, BT, BD).to(tl.float32)
    query = _load(q, base + nil, front, end, head, H, D, BT, BD)
    dkey -= tl.dot(tl.trans(_get(pairs, nil, BT, BT, BT)), query, input_precision=PRECISION)
    _store(dk, dkey, base + nil, front, end, head, H, D, BT, BD)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "numbers", "every", "zero"])
def _backward_kernel(
    q, k, v, lr, mask, scalars, w1, w2, m1, m2, s1, s2, boundaries, slot_starts, dy, gw1, gw2, gm1, gm2, gs1, gs2,
    dq, dk, dv, dlr, dmask, dscalars, dw1, dw2, dm1, dm2, ds1, ds2,
    states, hidden, rows, pairs, position, cu_seqlens, T, H, numbers, every, zero, limit,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_FINAL: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All gradients of one (sequence, head) after another, chunk by chunk from the last; gw1 to gs2 are the final state's gradients.

    Scratch of a program: `states` has the state before each chunk of a super-chunk, the weights of an open chunk, the gradient of the state
    after the chunk at hand, and the gradient of an open chunk's weights.
    """
    first: tl.constexpr = D * F
    second: tl.constexpr = F * DV
    both: tl.constexpr = first + second
    size: tl.constexpr = 2 * both
    program = tl.program_id(0).to(tl.int64)
    slots = states + program * ((every + 1) * size + 2 * both)
    start = slots + every.to(tl.int64) * size
    carry = start + both
    dstart = carry + size
    xs = hidden + program * (7 * BT * F)
    slopes = xs + BT * F
    curves = slopes + BT * F
    us = curves + BT * F
    hs = us + BT * F
    dxs = hs + BT * F
    dgs = dxs + BT * F
    grad_rows = rows + program * (BT * (D + 2 * DV + 8))
    dgrad_rows = grad_rows + BT * DV
    key_rows = dgrad_rows + BT * DV
    pair_rows = pairs + program * (2 * BT * BT)
    vectors = key_rows + BT * D
    if not HAS_POSITION:
        _clear(dw1 + program * first, first)
        _clear(dw2 + program * second, second)
        tl.debug_barrier()
    for turn in range(tl.cdiv(numbers - tl.program_id(0), tl.num_programs(0))):
        number = tl.program_id(0) + turn * tl.num_programs(0)
        n = number // H
        head = number % H
        at = number.to(tl.int64)
        count = _chunks(n, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
        _clear(dstart, both)
        closed = True
        if HAS_FINAL:
            _copy(carry, gw1 + at * first, first)
            _copy(carry + first, gm1 + at * first, first)
            _turn(carry + 2 * first, gw2 + at * second, F, DV, False)
            _turn(carry + 2 * first + second, gm2 + at * second, F, DV, False)
            tl.debug_barrier()
            closed = _places(n, position, cu_seqlens, T, HAS_POSITION, VARLEN) % BT == 0
            if closed:  # no chunk is open: `start` is the weights
                _add(carry, gs1 + at * first, first)
                _turn(carry + 2 * first, gs2 + at * second, F, DV, True)
        else:
            _clear(carry, size)
        tl.debug_barrier()
        supers = tl.cdiv(count, every)
        for done in range(supers):
            begin = (supers - 1 - done) * every
            stop = tl.minimum(begin + every, count)
            if begin == 0:
                _enter(slots, start, number, head, w1, w2, m1, m2, s1, s2, D, F, DV, HAS_POSITION)
            else:
                kept = tl.load(slot_starts + n) + begin // every - 1
                _copy(slots, boundaries + (kept * H + head) * size, size)
                tl.debug_barrier()
            for chunk in range(begin, stop - 1):
                base, front, end = _chunk(n, chunk, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
                nil = (chunk + 1) * zero
                slot = slots + (chunk - begin) * size
                b1 = tl.where(front > 0, (every - chunk + begin) * size, 0)
                b2 = tl.where(front > 0, (every - chunk + begin) * size + first, 2 * first)
                _inner_gradient(
                    k, v, lr, slot + b1, slot + b2, xs, slopes, curves, us, grad_rows, vectors, base, front, end, head, H, nil, limit,
                    D, F, DV, RESIDUAL, L2, CLAMP, False, PRECISION, BT, BD, BF, BV,
                )  # fmt: skip
                _advance(
                    q, k, dy, mask, scalars, slot, slot + size, xs, slopes, us, grad_rows, pair_rows, vectors,
                    base, front, end, head, H, nil, start, False, D, F, DV, RESIDUAL, False, PRECISION, BT, BD, BF, BV,
                )  # fmt: skip
            for back in range(begin, stop):
                chunk = begin + stop - 1 - back
                base, front, end = _chunk(n, chunk, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
                nil = (chunk + 1) * zero
                slot = slots + (chunk - begin) * size
                b1 = tl.where(front > 0, (every - chunk + begin) * size, 0)
                b2 = tl.where(front > 0, (every - chunk + begin) * size + first, 2 * first)
                _inner_gradient(
                    k, v, lr, slot + b1, slot + b2, xs, slopes, curves, us, grad_rows, vectors, base, front, end, head, H, nil, limit,
                    D, F, DV, RESIDUAL, L2, CLAMP, True, PRECISION, BT, BD, BF, BV,
                )  # fmt: skip
                _pass_hidden(
                    q, k, mask, scalars, slot, slopes, us, hs, pair_rows, vectors, base, front, end, head, H, nil,
                    D, F, PRECISION, BT, BD, BF,
                )  # fmt: skip
                _pass_second(
                    k, dy, mask, scalars, dmask, dscalars, slot, carry, xs, hs, dxs, grad_rows, dgrad_rows, pair_rows, vectors,
                    base, front, end, head, H, nil, D, F, DV, PRECISION, BT, BF, BV,
                )  # fmt: skip
                _pass_keys(
                    q, k, mask, scalars, dlr, dscalars, carry, slopes, us, hs, dgs, key_rows, pair_rows, vectors,
                    base, front, end, head, H, nil, D, F, PRECISION, BT, BD, BF,
                )  # fmt: skip
                _pass_first(
                    q, k, dy, mask, scalars, dq, dmask, dscalars, slot, carry, slopes, us, hs, pair_rows, vectors,
                    base, front, end, head, H, nil, D, F, RESIDUAL, PRECISION, BT, BD, BF,
                )  # fmt: skip
                into1 = tl.where(front > 0, size, 0)
                into2 = tl.where(front > 0, size + first, 2 * first)
                _pass_inner(
                    q, k, dk, dv, dlr, slot + b1, slot + b2, carry + into1, carry + into2, xs, slopes, curves, us, dxs, dgs,
                    grad_rows, dgrad_rows, key_rows, pair_rows, vectors, base, front, end, head, H, nil, limit,
                    D, F, DV, RESIDUAL, L2, CLAMP, PRECISION, BT, BD, BF, BV,
                )  # fmt: skip
                if HAS_FINAL:  # noqa: SIM102
                    if (chunk == count - 1) & (front == 0) & (closed == 0):
                        _add(carry, gs1 + at * first, first)
                        _turn(carry + 2 * first, gs2 + at * second, F, DV, True)
                        tl.debug_barrier()
        if HAS_POSITION:
            if HAS_FINAL:
                opened = tl.load(position + n)
                if (closed == 0) & (count <= 1) & (opened > 0):
                    _add(dstart, gs1 + at * first, first)
                    _turn(dstart + first, gs2 + at * second, F, DV, True)
                    tl.debug_barrier()
            _copy(dw1 + at * first, carry, first)
            _copy(dm1 + at * first, carry + first, first)
            _turn(dw2 + at * second, carry + 2 * first, DV, F, False)
            _turn(dm2 + at * second, carry + 2 * first + second, DV, F, False)
            _copy(ds1 + at * first, dstart, first)
            _turn(ds2 + at * second, dstart + first, DV, F, False)
        else:
            _add(dw1 + program * first, carry, first)
            _turn(dw2 + program * second, carry + 2 * first, DV, F, True)
        tl.debug_barrier()


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))


def _options(call, table: LaunchTable) -> dict[str, object]:
    dim, value_dim, hidden = call.dim, call.value_dim, call.weights[0].shape[-1]
    # float32 takes twice the room of what the tables are made for.
    entry = max(_padded(dim), _padded(value_dim), call.chunk)
    launch = table.lookup(entry, call.capability)
    return {
        **launch.options(), "D": dim, "F": hidden, "DV": value_dim, "RESIDUAL": call.residual, "L2": call.loss == "l2",
        "CLAMP": call.max_grad_norm is not None, "HAS_POSITION": call.position is not None,
        "VARLEN": call.cu_seqlens is not None, "PRECISION": call.precision,
        "BT": call.chunk, "BD": _padded(dim), "BV": _padded(value_dim), "BF": min(launch.blocks["BF"], _padded(hidden)),
    }  # fmt: skip


def mlp_forward(call, mask: Tensor, scalars: Tensor, y: Tensor, final: list[Tensor] | None, boundaries: Tensor | None) -> None:
    """Write y, the final state (weights, momentum, start, a tensor a layer) and the boundaries, where given."""
    sizes = [w.shape[-2] * w.shape[-1] for w in call.weights]
    hidden = call.weights[0].shape[-1]
    states = call.q.new_empty(call.programs, 3 * sum(sizes), dtype=torch.float32)
    scratch = call.q.new_empty(call.programs, 3, call.chunk, hidden)
    rows = call.q.new_empty(call.programs, call.chunk, call.value_dim + 8, dtype=torch.float32)
    pairs = call.q.new_empty(call.programs, call.chunk, call.chunk)
    none = [None, None]
    _forward_kernel[(call.programs,)](
        call.q, call.k, call.v, call.lr, mask, scalars, *call.weights, *(call.state_momentum or none), *(call.state_start or none),
        y, *(final or none * 3), boundaries, None if boundaries is None else call.slot_starts(), states, scratch, rows, pairs,
        call.position, call.cu_seqlens, call.length, call.heads, call.sequences * call.heads, call.every, 0, call.max_grad_norm or 1.0,
        HAS_FINAL=final is not None, KEEP=boundaries is not None, **_options(call, FORWARD),
    )  # fmt: skip


def mlp_backward(
    call, mask: Tensor, scalars: Tensor, boundaries: Tensor, dy: Tensor, dfinal: list[Tensor] | None,
    dq: Tensor, dk: Tensor, dv: Tensor, dlr: Tensor, dmask: Tensor, dscalars: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Write dq to dscalars; return the gradient of each tensor of the call's memory, in float32."""
    sizes = [w.shape[-2] * w.shape[-1] for w in call.weights]
    hidden = call.weights[0].shape[-1]
    new, programs = call.q.new_empty, call.programs
    states = new(programs, (2 * (call.every + 1) + 2) * sum(sizes), dtype=torch.float32)
    scratch = new(programs, 7, call.chunk, hidden)
    rows = new(programs, call.chunk, call.dim + 2 * call.value_dim + 8, dtype=torch.float32)
    pairs = new(programs, 2, call.chunk, call.chunk)
    none = [None, None]
    given = (*call.weights, *(call.state_momentum or none), *(call.state_start or none))
    if call.position is None:
        dmemory = [new(programs, *shape, dtype=torch.float32) for shape in call.layers]
    else:
        dmemory = [torch.empty_like(x, dtype=torch.float32) for x in given]
    _backward_kernel[(programs,)](
        call.q, call.k, call.v, call.lr, mask, scalars, *given, boundaries, call.slot_starts(), dy, *(dfinal or none * 3),
        dq, dk, dv, dlr, dmask, dscalars, *dmemory, *(none * 2 if call.position is None else ()),
        states, scratch, rows, pairs, call.position, call.cu_seqlens, call.length, call.heads, call.sequences * call.heads,
        call.every, 0, call.max_grad_norm or 1.0, HAS_FINAL=dfinal is not None, **_options(call, BACKWARD),
    )  # fmt: skip
    if call.position is None:
        return [x.unflatten(0, (-1, call.heads)).sum(0) for x in dmemory]
    return dmemory


def mlp_step(call, y, final) -> None:
    raise NotImplementedError


def mlp_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry at its largest sizes."""
    flags = {
        "RESIDUAL": True, "L2": True, "CLAMP": True, "HAS_POSITION": True, "HAS_FINAL": True, "VARLEN": True, "PRECISION": "tf32",
    }  # fmt: skip
    inputs = {**dict.fromkeys(("q", "k", "v", "lr"), "*bf16"), **dict.fromkeys(("mask", "scalars"), "*fp32")}
    memory = dict.fromkeys(("w1", "w2", "m1", "m2", "s1", "s2"), "*fp32")
    shared = {
        **inputs, **memory, "boundaries": "*fp32", "slot_starts": "*i64", "states": "*fp32", "hidden": "*bf16", "rows": "*fp32", "pairs": "*bf16", "position": "*i64",
        "cu_seqlens": "*i64", "T": "i32", "H": "i32", "numbers": "i32", "every": "i32", "zero": "i32", "limit": "fp32",
    }  # fmt: skip

    def specs(name, kernel, table, signature, constants):
        for size in sorted({size for size, _ in table.entries}):
            launch = table.lookup(size, capability)
            given = {
                **constants,
                "D": size,
                "F": min(4 * size, 512),
                "DV": size,
                "BT": size,
                "BD": size,
                "BV": size,
                **launch.blocks,
            }
            yield CompileSpec(
                f"neural_memory {name} {size}", kernel, signature, {n: given[n] for n in kernel.arg_names if n in given},
                launch.num_warps, launch.num_stages, ("H",),
            )  # fmt: skip

    final = dict.fromkeys(("fw1", "fw2", "fm1", "fm2", "fs1", "fs2"), "*fp32")
    yield from specs("mlp forward", _forward_kernel, FORWARD, {**shared, "y": "*bf16", **final}, {**flags, "KEEP": True})
    grads = {
        **dict.fromkeys(("gw1", "gw2", "gm1", "gm2", "gs1", "gs2", "dw1", "dw2", "dm1", "dm2", "ds1", "ds2"), "*fp32"),
        **dict.fromkeys(("dy", "dq", "dk", "dv"), "*bf16"), **dict.fromkeys(("dlr", "dmask", "dscalars"), "*fp32"),
    }  # fmt: skip
    yield from specs("mlp backward", _backward_kernel, BACKWARD, {**shared, **grads}, flags)
