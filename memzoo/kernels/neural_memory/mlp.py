"""Triton kernels of the neural memory of depth 2: an MLP [D, F], GELU, [F, Dv] that each (sequence, head) trains as it reads.

The weights, momentum and start of a state do not fit registers or shared memory (16 D F bytes: 256 KiB at D = 64, F = 256), so a
program keeps them in float32 scratch that stays in L2 and works through the hidden width F in slices; the second layer is held transposed,
[Dv, F]. What couples slices (the inner prediction, gradient norms, a X^T, y) is summed in one pass before the next begins. In the notation
of chunked.py, with B the weights at the chunk's start and G each layer's output gradient before the step size s:

    Z = K B1, X = gelu(Z), G2 = X B2 (+ K) - V, U = G2 B2^T, G1 = U gelu'(Z), s = theta min(1, max / n), g = s G
    h = beta Q W1 + c Q S1 - (A . Q K^T) g1, a = gelu(h);   y = (q +) beta a W2 + c a S2 - (A . a X^T) g2
    W' = beta_b W + c_b S - (A[b] . x)^T g,   S' = e_b S - (E[b] . x)^T g

The backward rebuilds the states of a super-chunk from its boundary, then takes its chunks from the last, pass after pass.

For each token and head, with chunks of b tokens and Dv = D, forward, in brackets at D = 64, F = 256, b = 64:
    operations 22 D F + 4 b (D + F) (0.44 M); the backward, with the chunks it rebuilds, has 3.3 times as many
    L2 bytes 60 D F / b + 20 F (20 KiB: B three times, W and S read twice and written once, hidden rows); device memory 8 D + 8 b + 32
At 6 TFLOP/s and 42 GB/s of L2 for one multiprocessor, L2 decides: 0.5 us a token and head on one against 0.07 us for the products, 3.7 ns
with 132 (sequence, head)s in flight. A longer chunk moves fewer bytes a token. Not measured: no GPU has run this yet.
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
    (64, 80): Launch(num_warps=8, num_stages=1, blocks={"BF": 16}),
    (128, 80): Launch(num_warps=8, num_stages=1, blocks={"BF": 16}),
})  # fmt: skip
BACKWARD = LaunchTable({
    (64, 80): Launch(num_warps=8, num_stages=1, blocks={"BF": 16}),
    (128, 80): Launch(num_warps=8, num_stages=1, blocks={"BF": 16}),
})  # fmt: skip
STEP = LaunchTable({
    (64, 80): Launch(num_warps=8, num_stages=1, blocks={"BF": 16}),
    (128, 80): Launch(num_warps=8, num_stages=1, blocks={"BF": 16}),
})  # fmt: skip

# By direction, head dimension and chunk: what does not fit the registers, in bytes a thread, the most over the targets (Triton 3.9; sm_90
# spills 48, 296 and 440 in the entries at 128 but the backward in chunks of 64, and nothing at 64). The state of these sizes is streamed
# through L2 as it is, which a spill of hundreds of bytes a chunk adds little to.
KNOWN_SPILLS = {
    ("forward", 128, 64): 208,
    ("forward", 128, 128): 744,
    ("backward", 64, 64): 344,
    ("backward", 128, 64): 824,
    ("backward", 128, 128): 1720,
}


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


@triton.jit(noinline=True)
def _copy(to, source, SIZE: tl.constexpr):
    i = tl.arange(0, 1024)
    for at in range(0, SIZE, 1024):
        inside = at + i < SIZE
        tl.store(to + at + i, tl.load(source + at + i, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit(noinline=True)
def _add(to, source, SIZE: tl.constexpr):
    i = tl.arange(0, 1024)
    for at in range(0, SIZE, 1024):
        inside = at + i < SIZE
        total = tl.load(to + at + i, mask=inside, other=0.0) + tl.load(source + at + i, mask=inside, other=0.0)
        tl.store(to + at + i, total, mask=inside)


@triton.jit(noinline=True)
def _turn(to, source, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr):
    """Copy or add the transpose of [ROWS, COLUMNS] to [COLUMNS, ROWS]."""
    for begin in range(0, ROWS * COLUMNS, 1024):
        at = begin + tl.arange(0, 1024)
        inside = at < ROWS * COLUMNS
        value = tl.load(source + (at % ROWS) * COLUMNS + at // ROWS, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(to + at, mask=inside, other=0.0)
        tl.store(to + at, value, mask=inside)


@triton.jit(noinline=True)
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


@triton.jit(noinline=True)
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


# A program's scratch: `hidden` rows [BT, F] in the inputs' type (xs, slopes, us; in the backward also hs, dxs, dgs, curves); `rows` in
# float32 (in the backward key_rows [BT, D] before it; eight vectors [BT]; grads [BT, Dv]; in the backward dgrads [BT, Dv]); `pairs`
# [BT, BT] in their type, two in the backward. `vectors`: step, min(1, max / n), n, |K|^2, |G1|^2, |X|^2, |G2|^2, dA of the last row.
#
# Each pass over the hidden width is a function of its own, not inlined: the compiler otherwise computes the addresses of all passes first
# and keeps them in registers throughout. What a loop multiplies by in every slice is loaded in every slice for the same reason, and `nil`,
# always 0 and unknown to the compiler, keeps index arithmetic in its loop. A product that is needed transposed goes through memory.


@triton.jit(noinline=True)
def _inner_gradient(
    k, v, lr, b1, b2, hidden, rows, base, front, end, head, H, nil, limit,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    CURVE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of one chunk: X, gelu'(Z), (with CURVE) gelu''(Z) and U to scratch [BT, F], and G2 to rows [BT, Dv].

    To vectors, by row: theta min(1, max / n), and with a clamp min(1, max / n), n, |K|^2, |G1|^2, |X|^2 and |G2|^2.
    """
    xs = hidden
    slopes = hidden + BT * F
    us = hidden + 2 * BT * F
    curves = hidden + 6 * BT * F
    vectors = rows
    grads = rows + 8 * BT
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
    tl.store(grads + wide, grad, mask=real)
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


@triton.jit(noinline=True)
def _compare(
    q, k, mask, pairs, base, front, end, head, H, nil,
    D: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A . (Q K^T), or its transpose, to pairs."""
    query = _load(q, base + nil, front, end, head, H, D, BT, BD)
    key = _load(k, base + nil, front, end, head, H, D, BT, BD)
    left = _load(mask, base + nil, front, end, head, H, BT, BT, BT)
    if TURNED:
        pair = tl.trans(left) * tl.dot(key, tl.trans(query), input_precision=PRECISION)
    else:
        pair = left * tl.dot(query, tl.trans(key), input_precision=PRECISION)
    at, inside = _rows(nil, BT, BT, BT)
    tl.store(pairs + at, pair.to(k.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _read(
    q, k, y, mask, scalars, slot, pairs, hidden, rows, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, whose state before it is `slot`."""
    xs = hidden
    slopes = hidden + BT * F
    us = hidden + 2 * BT * F
    vectors = rows
    grads = rows + 8 * BT
    kind = k.dtype.element_ty
    step = tl.load(vectors + nil + tl.arange(0, BT))
    beta = _gate(scalars, base, front, end, head, H, BT, 4, 0)[:, None]
    c = _gate(scalars, base, front, end, head, H, BT, 4, 1)[:, None]
    mixed = tl.zeros((BT, BT), tl.float32)
    out = tl.zeros((BT, BV), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at1, inside1 = _slice(f, still, D, F, BD, BF)
        at2, inside2 = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        inner = step[:, None] * tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        inner *= tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        h = -tl.dot(_get(pairs, still, BT, BT, BT), inner.to(kind), input_precision=PRECISION)
        query = _load(q, base + still, front, end, head, H, D, BT, BD)
        weight = tl.load(slot + at1, mask=inside1, other=0.0).to(kind)
        h += beta * tl.dot(query, weight, input_precision=PRECISION)
        weight = tl.load(slot + D * F + at1, mask=inside1, other=0.0).to(kind)
        h += c * tl.dot(query, weight, input_precision=PRECISION)
        a = _gelu(h).to(kind)
        x = tl.load(xs + here, mask=held, other=0.0)
        mixed += tl.dot(a, tl.trans(x), input_precision=PRECISION)
        weight = tl.load(slot + 2 * D * F + at2, mask=inside2, other=0.0).to(kind)
        out += beta * tl.dot(a, tl.trans(weight), input_precision=PRECISION)
        weight = tl.load(slot + 2 * D * F + F * DV + at2, mask=inside2, other=0.0).to(kind)
        out += c * tl.dot(a, tl.trans(weight), input_precision=PRECISION)
    write = (step[:, None] * _get(grads, nil, DV, BT, BV)).to(kind)
    mixed *= _load(mask, base + nil, front, end, head, H, BT, BT, BT)
    out -= tl.dot(mixed.to(kind), write, input_precision=PRECISION)
    if RESIDUAL:
        out += _load(q, base + nil, front, end, head, H, D, BT, BD).to(tl.float32)
    _store(y, out, base + nil, front, end, head, H, DV, BT, BV)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _write(
    k, mask, scalars, slot, to, opened, keep_start, hidden, rows, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, KEEP_START: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write one chunk: the state `slot` to the state `to`, which may be the same.

    With KEEP_START and `keep_start` not 0, the weights before go to `opened` too: they are the start of a chunk that stays open.
    """
    xs = hidden
    slopes = hidden + BT * F
    us = hidden + 2 * BT * F
    vectors = rows
    grads = rows + 8 * BT
    kind = k.dtype.element_ty
    first: tl.constexpr = D * F
    second: tl.constexpr = F * DV
    step = tl.load(vectors + nil + tl.arange(0, BT))
    into_weights, into_momentum, beta_last, c_last, e_last = _last_row(mask, scalars, base, front, end, head, H, BT)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, D, F, BD, BF)
        here, held = _hidden(f, still, F, BT, BF)
        inner = step[:, None] * tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        inner *= tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        key = _load(k, base + still, front, end, head, H, D, BT, BD)
        change = tl.dot(tl.trans(key), (into_weights[:, None] * inner).to(kind), input_precision=PRECISION)
        moved = tl.dot(tl.trans(key), (into_momentum[:, None] * inner).to(kind), input_precision=PRECISION)
        w = tl.load(slot + at, mask=inside, other=0.0)
        s = tl.load(slot + first + at, mask=inside, other=0.0)
        tl.debug_barrier()  # every thread has read this slice before any writes it
        if KEEP_START:  # noqa: SIM102
            if keep_start != 0:
                tl.store(opened + at, w, mask=inside)
        tl.store(to + at, beta_last * w + c_last * s - change, mask=inside)
        tl.store(to + first + at, e_last * s - moved, mask=inside)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        x = tl.load(xs + here, mask=held, other=0.0).to(tl.float32)
        write = (step[:, None] * _get(grads, still, DV, BT, BV)).to(kind)
        change = tl.dot(tl.trans(write), (into_weights[:, None] * x).to(kind), input_precision=PRECISION)
        moved = tl.dot(tl.trans(write), (into_momentum[:, None] * x).to(kind), input_precision=PRECISION)
        w = tl.load(slot + 2 * first + at, mask=inside, other=0.0)
        s = tl.load(slot + 2 * first + second + at, mask=inside, other=0.0)
        tl.debug_barrier()
        if KEEP_START:  # noqa: SIM102
            if keep_start != 0:
                tl.store(opened + first + at, w, mask=inside)
        tl.store(to + 2 * first + at, beta_last * w + c_last * s - change, mask=inside)
        tl.store(to + 2 * first + second + at, e_last * s - moved, mask=inside)
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
    hidden += program * (3 * BT * F)
    rows += program * (BT * (8 + DV))
    pairs += program * (BT * BT)
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
                k, v, lr, slot + b1, slot + b2, hidden, rows, base, front, end, head, H, nil, limit,
                D, F, DV, RESIDUAL, L2, CLAMP, False, PRECISION, BT, BD, BF, BV,
            )  # fmt: skip
            _compare(q, k, mask, pairs, base, front, end, head, H, nil, D, False, PRECISION, BT, BD)
            _read(
                q, k, y, mask, scalars, slot, pairs, hidden, rows, base, front, end, head, H, nil,
                D, F, DV, RESIDUAL, PRECISION, BT, BD, BF, BV,
            )  # fmt: skip
            keep_start = ((chunk == count - 1) & (end < BT) & (front == 0)).to(tl.int32)
            _write(
                k, mask, scalars, slot, slot, start, keep_start, hidden, rows, base, front, end, head, H, nil,
                D, F, DV, HAS_FINAL, PRECISION, BT, BD, BF, BV,
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


@triton.jit(noinline=True)
def _pass_hidden(
    q, k, mask, scalars, slot, pairs, hidden, rows, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The queries' hidden rows before GELU, to hs."""
    slopes = hidden + BT * F
    us = hidden + 2 * BT * F
    hs = hidden + 3 * BT * F
    vectors = rows
    kind = k.dtype.element_ty
    step = tl.load(vectors + nil + tl.arange(0, BT))
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


@triton.jit(noinline=True)
def _pass_write(
    k, mask, dscalars, scalars, carry, hidden, rows, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Through the second layer's write: part of dg2 to drows, of dX to dxs, of the last row's dA to vectors and of its dE to dscalars."""
    xs = hidden
    dxs = hidden + 4 * BT * F
    vectors = rows
    grads = rows + 8 * BT
    dgrads = rows + 8 * BT + BT * DV
    kind = k.dtype.element_ty
    second: tl.constexpr = F * DV
    carry += 2 * D * F
    step = tl.load(vectors + nil + tl.arange(0, BT))
    into_weights, into_momentum, _, _, _ = _last_row(mask, scalars, base, front, end, head, H, BT)
    into_weights = into_weights[:, None]
    into_momentum = into_momentum[:, None]
    dwrite = tl.zeros((BT, BV), tl.float32)
    dinto_weights = tl.zeros((BT,), tl.float32)
    dinto_momentum = tl.zeros((BT,), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        x = tl.load(xs + here, mask=held, other=0.0)
        write = (step[:, None] * _get(grads, still, DV, BT, BV)).to(kind)
        weight = tl.load(carry + at, mask=inside, other=0.0).to(kind)
        part = tl.dot(write, weight, input_precision=PRECISION)
        dinto_weights -= tl.sum(x.to(tl.float32) * part, 1)
        dx = -into_weights * part
        dwrite -= into_weights * tl.dot(x, tl.trans(weight), input_precision=PRECISION)
        weight = tl.load(carry + second + at, mask=inside, other=0.0).to(kind)
        part = tl.dot(write, weight, input_precision=PRECISION)
        dinto_momentum -= tl.sum(x.to(tl.float32) * part, 1)
        dx -= into_momentum * part
        dwrite -= into_momentum * tl.dot(x, tl.trans(weight), input_precision=PRECISION)
        tl.store(dxs + here, dx.to(kind), mask=held)
    wide, real = _rows(nil, DV, BT, BV)
    tl.store(dgrads + wide, dwrite, mask=real)
    tl.store(vectors + 7 * BT + nil + tl.arange(0, BT), dinto_weights)
    _put(dscalars, dinto_momentum, base + nil, front, end, head, H, BT, 4, 3)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_carry(
    x, scalars, dscalars, slot, carry, hidden, base, front, end, head, H, nil,
    GELU: tl.constexpr, D: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Carry dW and dS of one layer to before the chunk. Layers are [D, F]; `slot` and `carry` begin at the layer's weights.

    What the chunk's reads give to W and S is x^T (beta hs) and x^T (c hs), x being the queries and hs dH, or, of the second layer, which is
    held transposed, x being dY and GELU(hs) the layer's input. To dscalars, at the last row, its dbeta, dc and de: the second layer, which
    comes first, writes them, the first adds to them.
    """
    hs = hidden + 3 * BT * F
    kind = x.dtype.element_ty
    size: tl.constexpr = D * F
    beta = _gate(scalars, base, front, end, head, H, BT, 4, 0)[:, None]
    c = _gate(scalars, base, front, end, head, H, BT, 4, 1)[:, None]
    token = (base + end - 1) * H + head
    beta_last, c_last = tl.load(scalars + token * 4), tl.load(scalars + token * 4 + 1)
    e_last = tl.load(scalars + token * 4 + 2)
    dbeta = tl.zeros((BD,), tl.float32)
    dc = tl.zeros((BD,), tl.float32)
    de = tl.zeros((BD,), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, D, F, BD, BF)
        here, held = _hidden(f, still, F, BT, BF)
        h = tl.load(hs + here, mask=held, other=0.0).to(tl.float32)
        if GELU:
            h = _gelu(h)
        left = tl.trans(_load(x, base + still, front, end, head, H, D, BT, BD))
        from_weights = tl.dot(left, (beta * h).to(kind), input_precision=PRECISION)
        from_momentum = tl.dot(left, (c * h).to(kind), input_precision=PRECISION)
        dw = tl.load(carry + at, mask=inside, other=0.0)
        dbeta += tl.sum(tl.load(slot + at, mask=inside, other=0.0) * dw, 1)
        s = tl.load(slot + size + at, mask=inside, other=0.0)
        dc += tl.sum(s * dw, 1)
        ds = tl.load(carry + size + at, mask=inside, other=0.0)
        de += tl.sum(s * ds, 1)
        tl.debug_barrier()  # every thread has read this slice before any writes it
        tl.store(carry + at, beta_last * dw + from_weights, mask=inside)
        tl.store(carry + size + at, c_last * dw + e_last * ds + from_momentum, mask=inside)
    last = tl.arange(0, BT) == end - 1
    for which in tl.static_range(3):
        total = tl.sum(dbeta if which == 0 else dc if which == 1 else de, 0)
        value = tl.where(last, total, 0.0)
        if not GELU:
            value += _gate(dscalars, base + nil, front, end, head, H, BT, 4, which)
        _put(dscalars, value, base + nil, front, end, head, H, BT, 4, which)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_pair(
    dy, mask, pairs, rows, base, front, end, head, H, nil,
    DV: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A . (dY g2^T), or its transpose, to pairs."""
    kind = dy.dtype.element_ty
    step = tl.load(rows + nil + tl.arange(0, BT))
    given = _load(dy, base + nil, front, end, head, H, DV, BT, BV)
    write = (step[:, None] * _get(rows + 8 * BT, nil, DV, BT, BV)).to(kind)
    left = _load(mask, base + nil, front, end, head, H, BT, BT, BT)
    if TURNED:
        pair = tl.trans(left) * tl.dot(write, tl.trans(given), input_precision=PRECISION)
    else:
        pair = left * tl.dot(given, tl.trans(write), input_precision=PRECISION)
    at, inside = _rows(nil, BT, BT, BT)
    tl.store(pairs + at, pair.to(kind), mask=inside)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_second(
    dy, scalars, dscalars, slot, pairs, hidden, base, front, end, head, H, nil,
    F: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Through the second layer's read: dH to hs, more of dX to dxs and of dbeta and dc to dscalars."""
    xs = hidden
    hs = hidden + 3 * BT * F
    dxs = hidden + 4 * BT * F
    kind = dy.dtype.element_ty
    beta = _gate(scalars, base, front, end, head, H, BT, 4, 0)[:, None]
    c = _gate(scalars, base, front, end, head, H, BT, 4, 1)[:, None]
    dbeta = tl.zeros((BT,), tl.float32)
    dc = tl.zeros((BT,), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        x = tl.load(xs + here, mask=held, other=0.0)
        dh = -tl.dot(_get(pairs, still, BT, BT, BT), x, input_precision=PRECISION)
        a, slope, _ = _gelu_slopes(tl.load(hs + here, mask=held, other=0.0).to(tl.float32))
        given = _load(dy, base + still, front, end, head, H, DV, BT, BV)
        weight = tl.load(slot + at, mask=inside, other=0.0).to(kind)
        part = tl.dot(given, weight, input_precision=PRECISION)
        dbeta += tl.sum(a * part, 1)
        dh += beta * part
        weight = tl.load(slot + F * DV + at, mask=inside, other=0.0).to(kind)
        part = tl.dot(given, weight, input_precision=PRECISION)
        dc += tl.sum(a * part, 1)
        dh += c * part
        dh *= slope
        dx = tl.load(dxs + here, mask=held, other=0.0).to(tl.float32)
        dx -= tl.dot(_get(pairs + BT * BT, still, BT, BT, BT), a.to(kind), input_precision=PRECISION)
        tl.debug_barrier()  # every thread has read this slice before any writes it
        tl.store(hs + here, dh.to(kind), mask=held)
        tl.store(dxs + here, dx.to(kind), mask=held)
    dbeta += _gate(dscalars, base + nil, front, end, head, H, BT, 4, 0)
    dc += _gate(dscalars, base + nil, front, end, head, H, BT, 4, 1)
    tl.debug_barrier()
    _put(dscalars, dbeta, base + nil, front, end, head, H, BT, 4, 0)
    _put(dscalars, dc, base + nil, front, end, head, H, BT, 4, 1)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_mixed(
    k, dy, mask, dmask, pairs, hidden, rows, base, front, end, head, H, nil,
    F: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of what the second layer's rows have in common, a X^T: the rest of dg2 to dgrads, and part of dA to dmask."""
    kind = k.dtype.element_ty
    dgrads = rows + 8 * BT + BT * DV
    step = tl.load(rows + nil + tl.arange(0, BT))
    at, inside = _rows(nil, BT, BT, BT)
    mixed = tl.zeros((BT, BT), tl.float32)
    for f in range(0, F, BF):
        here, held = _hidden(f, f * nil, F, BT, BF)
        a = _gelu(tl.load(hidden + 3 * BT * F + here, mask=held, other=0.0).to(tl.float32))
        x = tl.load(hidden + here, mask=held, other=0.0)
        mixed += tl.dot(a.to(kind), tl.trans(x), input_precision=PRECISION)
    left = _load(mask, base + nil, front, end, head, H, BT, BT, BT)
    tl.store(pairs + at, (mixed * left).to(kind), mask=inside)
    given = _load(dy, base + nil, front, end, head, H, DV, BT, BV)
    write = (step[:, None] * _get(rows + 8 * BT, nil, DV, BT, BV)).to(kind)
    mixed *= tl.dot(given, tl.trans(write), input_precision=PRECISION)
    tl.debug_barrier()
    _store(dmask, -mixed, base + nil, front, end, head, H, BT, BT, BT)
    dwrite = _get(dgrads, nil, DV, BT, BV)
    dwrite -= tl.dot(tl.trans(_get(pairs, nil, BT, BT, BT)), given, input_precision=PRECISION)
    tl.debug_barrier()
    wide, real = _rows(nil, DV, BT, BV)
    tl.store(dgrads + wide, dwrite, mask=real)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_keys(
    q, k, mask, scalars, dlr, dscalars, carry, pairs, hidden, rows, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Through what the first layer is written: dg1 to dgs, rowsum(dg1 * G1) to dlr, part of dK to key_rows, and the rest
    of the last row's dA to vectors and of its dE to dscalars.
    """
    slopes = hidden + BT * F
    us = hidden + 2 * BT * F
    hs = hidden + 3 * BT * F
    dgs = hidden + 5 * BT * F
    vectors = rows
    key_rows = rows - BT * D
    kind = k.dtype.element_ty
    step = tl.load(vectors + nil + tl.arange(0, BT))
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
    dinto_weights += tl.load(vectors + 7 * BT + nil + tl.arange(0, BT))
    _put(dlr, dstep, base + nil, front, end, head, H, BT, 1, 0)
    dinto_momentum += _gate(dscalars, base + nil, front, end, head, H, BT, 4, 3)
    tl.debug_barrier()
    tl.store(vectors + 7 * BT + nil + tl.arange(0, BT), dinto_weights)
    _put(dscalars, dinto_momentum, base + nil, front, end, head, H, BT, 4, 3)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_mask(
    q, k, mask, dmask, pairs, hidden, rows, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The rest of dA to dmask, and M1 to pairs."""
    slopes = hidden + BT * F
    us = hidden + 2 * BT * F
    hs = hidden + 3 * BT * F
    vectors = rows
    kind = k.dtype.element_ty
    step = tl.load(vectors + nil + tl.arange(0, BT))
    mixed = tl.zeros((BT, BT), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        here, held = _hidden(f, still, F, BT, BF)
        write = step[:, None] * tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        write *= tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        dh = tl.load(hs + here, mask=held, other=0.0)
        mixed += tl.dot(dh, tl.trans(write.to(kind)), input_precision=PRECISION)
    square, whole = _rows(nil, BT, BT, BT)
    tl.store(pairs + square, (mixed * _load(mask, base + nil, front, end, head, H, BT, BT, BT)).to(kind), mask=whole)
    key = _load(k, base + nil, front, end, head, H, D, BT, BD)
    mixed *= tl.dot(_load(q, base + nil, front, end, head, H, D, BT, BD), tl.trans(key), input_precision=PRECISION)
    dleft = _load(dmask, base + nil, front, end, head, H, BT, BT, BT) - mixed
    dinto_weights = tl.load(vectors + 7 * BT + nil + tl.arange(0, BT))
    dleft += tl.where((tl.arange(0, BT) == end - 1)[:, None], dinto_weights[None, :], 0.0)
    tl.debug_barrier()
    _store(dmask, dleft, base + nil, front, end, head, H, BT, BT, BT)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_first(
    q, k, dy, scalars, dq, dscalars, slot, pairs, hidden, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Through the first layer's read: dQ, and the rest of dbeta and dc to dscalars."""
    hs = hidden + 3 * BT * F
    kind = k.dtype.element_ty
    beta = _gate(scalars, base, front, end, head, H, BT, 4, 0)[:, None]
    c = _gate(scalars, base, front, end, head, H, BT, 4, 1)[:, None]
    dquery = tl.zeros((BT, BD), tl.float32)
    dbeta = tl.zeros((BT,), tl.float32)
    dc = tl.zeros((BT,), tl.float32)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, D, F, BD, BF)
        here, held = _hidden(f, still, F, BT, BF)
        dh = tl.load(hs + here, mask=held, other=0.0)
        query = _load(q, base + still, front, end, head, H, D, BT, BD)
        weight = tl.load(slot + at, mask=inside, other=0.0).to(kind)
        dbeta += tl.sum(dh.to(tl.float32) * tl.dot(query, weight, input_precision=PRECISION), 1)
        dquery += beta * tl.dot(dh, tl.trans(weight), input_precision=PRECISION)
        weight = tl.load(slot + D * F + at, mask=inside, other=0.0).to(kind)
        dc += tl.sum(dh.to(tl.float32) * tl.dot(query, weight, input_precision=PRECISION), 1)
        dquery += c * tl.dot(dh, tl.trans(weight), input_precision=PRECISION)
    key = _load(k, base + nil, front, end, head, H, D, BT, BD)
    dquery -= tl.dot(_get(pairs, nil, BT, BT, BT), key, input_precision=PRECISION)
    if RESIDUAL:
        dquery += _load(dy, base + nil, front, end, head, H, D, BT, BD).to(tl.float32)
    _store(dq, dquery, base + nil, front, end, head, H, D, BT, BD)
    dbeta += _gate(dscalars, base + nil, front, end, head, H, BT, 4, 0)
    dc += _gate(dscalars, base + nil, front, end, head, H, BT, 4, 1)
    tl.debug_barrier()
    _put(dscalars, dbeta, base + nil, front, end, head, H, BT, 4, 0)
    _put(dscalars, dc, base + nil, front, end, head, H, BT, 4, 1)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_grad(
    k, dv, dlr, b2, hidden, rows, base, front, end, head, H, nil, limit,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Through the clamp and the second layer of the inner gradient: dlr, dV = -dG2, and its share of dK to key_rows.

    With a clamp, |K|^2, |G1|^2 and |G2|^2 in vectors are replaced by what each times its partner adds to the gradient of that partner.
    """
    slopes = hidden + BT * F
    us = hidden + 2 * BT * F
    dgs = hidden + 5 * BT * F
    vectors = rows
    grads = rows + 8 * BT
    dgrads = rows + 8 * BT + BT * DV
    key_rows = rows - BT * D
    kind = k.dtype.element_ty
    i = nil + tl.arange(0, BT)
    step = tl.load(vectors + i)
    dgrad = _get(dgrads, nil, DV, BT, BV)
    dstep = _gate(dlr, base + nil, front, end, head, H, BT, 1, 0)
    dstep += tl.sum(dgrad * _get(grads, nil, DV, BT, BV), 1)
    dgrad *= step[:, None]
    dtheta = dstep
    by_key = tl.zeros((BT,), tl.float32)
    if CLAMP:
        norm = tl.load(vectors + 2 * BT + i)
        by_norm = tl.where(norm > limit, -step * dstep / tl.maximum(norm * norm, limit * limit), 0.0)
        by_key = by_norm * tl.load(vectors + 3 * BT + i)
        by_inner = by_norm * tl.load(vectors + 4 * BT + i)
        by_grad = by_norm * tl.load(vectors + 6 * BT + i)
        dgrad += (by_norm * tl.load(vectors + 5 * BT + i))[:, None] * _get(grads, nil, DV, BT, BV)
        dtheta *= tl.load(vectors + BT + i)
        tl.debug_barrier()
        tl.store(vectors + 3 * BT + i, by_key)
        tl.store(vectors + 4 * BT + i, by_inner)
        tl.store(vectors + 6 * BT + i, by_grad)
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
    if RESIDUAL and L2:
        dgrad += _get(key_rows, nil, D, BT, BV)
        tl.debug_barrier()
        wide, real = _rows(nil, D, BT, BV)
        tl.store(key_rows + wide, dgrad, mask=real)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_base_second(
    v, dv, db2, hidden, rows, base, front, end, head, H, nil,
    F: tl.constexpr, DV: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of the second layer's weights that the inner gradient is taken at, added to db2."""
    slopes = hidden + BT * F
    us = hidden + 2 * BT * F
    dgs = hidden + 5 * BT * F
    kind = v.dtype.element_ty
    step = tl.load(rows + nil + tl.arange(0, BT))
    by_key = tl.load(rows + 3 * BT + nil + tl.arange(0, BT))
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        slope = tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        dinner = step[:, None] * tl.load(dgs + here, mask=held, other=0.0).to(tl.float32)
        if CLAMP:
            dinner += by_key[:, None] * slope * tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        grad = _get(rows + 8 * BT, still, DV, BT, BV).to(kind)
        change = tl.dot(tl.trans(grad), (dinner * slope).to(kind), input_precision=PRECISION)
        if L2:
            negative = _load(dv, base + still, front, end, head, H, DV, BT, BV)
            x = tl.load(hidden + here, mask=held, other=0.0)
            change -= tl.dot(tl.trans(negative), x, input_precision=PRECISION)
        change += tl.load(db2 + at, mask=inside, other=0.0)
        tl.debug_barrier()  # every thread has read this slice before any writes it
        tl.store(db2 + at, change, mask=inside)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_inner(
    dv, b2, hidden, rows, base, front, end, head, H, nil,
    F: tl.constexpr, DV: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Through the GELU of the inner gradient: dZ to dgs."""
    slopes = hidden + BT * F
    us = hidden + 2 * BT * F
    dxs = hidden + 4 * BT * F
    dgs = hidden + 5 * BT * F
    curves = hidden + 6 * BT * F
    kind = dv.dtype.element_ty
    step = tl.load(rows + nil + tl.arange(0, BT))
    by_key = tl.load(rows + 3 * BT + nil + tl.arange(0, BT))
    by_grad = tl.load(rows + 6 * BT + nil + tl.arange(0, BT))
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, DV, F, BV, BF)
        here, held = _hidden(f, still, F, BT, BF)
        slope = tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        u = tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        dinner = step[:, None] * tl.load(dgs + here, mask=held, other=0.0).to(tl.float32)
        dx = tl.load(dxs + here, mask=held, other=0.0).to(tl.float32)
        if CLAMP:
            dinner += by_key[:, None] * slope * u
            dx += by_grad[:, None] * tl.load(hidden + here, mask=held, other=0.0).to(tl.float32)
        if L2:
            negative = _load(dv, base + still, front, end, head, H, DV, BT, BV)
            weight = tl.load(b2 + at, mask=inside, other=0.0).to(kind)
            dx -= tl.dot(negative, weight, input_precision=PRECISION)
        dz = dinner * u * tl.load(curves + here, mask=held, other=0.0).to(tl.float32) + dx * slope
        tl.debug_barrier()  # every thread has read this slice before any writes it
        tl.store(dgs + here, dz.to(kind), mask=held)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pass_base(
    q, k, dk, b1, db1, pairs, hidden, rows, base, front, end, head, H, nil,
    D: tl.constexpr, F: tl.constexpr, CLAMP: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Through the first layer of the inner gradient: dK, and the gradient of the first layer's weights added to db1."""
    dgs = hidden + 5 * BT * F
    vectors = rows
    key_rows = rows - BT * D
    kind = k.dtype.element_ty
    dkey = _get(key_rows, nil, D, BT, BD)
    for f in range(0, F, BF):
        still = f * nil
        at, inside = _slice(f, still, D, F, BD, BF)
        here, held = _hidden(f, still, F, BT, BF)
        dz = tl.load(dgs + here, mask=held, other=0.0)
        weight = tl.load(b1 + at, mask=inside, other=0.0).to(kind)
        dkey += tl.dot(dz, tl.trans(weight), input_precision=PRECISION)
        keys = _load(k, base + still, front, end, head, H, D, BT, BD)
        change = tl.dot(tl.trans(keys), dz, input_precision=PRECISION)
        change += tl.load(db1 + at, mask=inside, other=0.0)
        tl.debug_barrier()
        tl.store(db1 + at, change, mask=inside)
    if CLAMP:
        by_inner = tl.load(vectors + 4 * BT + nil + tl.arange(0, BT))
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
    hidden += program * (7 * BT * F)
    rows += program * (BT * (D + 8 + 2 * DV)) + BT * D
    pairs += program * (2 * BT * BT)
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
                    k, v, lr, slot + b1, slot + b2, hidden, rows, base, front, end, head, H, nil, limit,
                    D, F, DV, RESIDUAL, L2, CLAMP, False, PRECISION, BT, BD, BF, BV,
                )  # fmt: skip
                _write(
                    k, mask, scalars, slot, slot + size, slot, 0,
                    hidden, rows, base, front, end, head, H, nil, D, F, DV, False, PRECISION, BT, BD, BF, BV,
                )  # fmt: skip
            for back in range(begin, stop):
                chunk = begin + stop - 1 - back
                base, front, end = _chunk(n, chunk, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
                nil = (chunk + 1) * zero
                slot = slots + (chunk - begin) * size
                b1 = tl.where(front > 0, (every - chunk + begin) * size, 0)
                b2 = tl.where(front > 0, (every - chunk + begin) * size + first, 2 * first)
                _inner_gradient(
                    k, v, lr, slot + b1, slot + b2, hidden, rows, base, front, end, head, H, nil, limit,
                    D, F, DV, RESIDUAL, L2, CLAMP, True, PRECISION, BT, BD, BF, BV,
                )  # fmt: skip
                _compare(q, k, mask, pairs, base, front, end, head, H, nil, D, False, PRECISION, BT, BD)
                _pass_hidden(
                    q, k, mask, scalars, slot, pairs, hidden, rows, base, front, end, head, H, nil,
                    D, F, PRECISION, BT, BD, BF,
                )  # fmt: skip
                _pass_write(
                    k, mask, dscalars, scalars, carry, hidden, rows, base, front, end, head, H, nil,
                    D, F, DV, PRECISION, BT, BF, BV,
                )  # fmt: skip
                _pass_carry(
                    dy, scalars, dscalars, slot + 2 * first, carry + 2 * first, hidden, base, front, end, head, H, nil, True,
                    DV, F, PRECISION, BT, BV, BF,
                )  # fmt: skip
                _pass_mixed(
                    k, dy, mask, dmask, pairs, hidden, rows, base, front, end, head, H, nil, F, DV, PRECISION, BT, BF, BV
                )  # fmt: skip
                _pass_pair(dy, mask, pairs, rows, base, front, end, head, H, nil, DV, False, PRECISION, BT, BV)
                _pass_pair(dy, mask, pairs + BT * BT, rows, base, front, end, head, H, nil, DV, True, PRECISION, BT, BV)
                _pass_second(
                    dy, scalars, dscalars, slot + 2 * first, pairs, hidden, base, front, end, head, H, nil,
                    F, DV, PRECISION, BT, BF, BV,
                )  # fmt: skip
                _compare(q, k, mask, pairs, base, front, end, head, H, nil, D, True, PRECISION, BT, BD)
                _pass_keys(
                    q, k, mask, scalars, dlr, dscalars, carry, pairs,
                    hidden, rows, base, front, end, head, H, nil, D, F, PRECISION, BT, BD, BF,
                )  # fmt: skip
                _pass_carry(
                    q, scalars, dscalars, slot, carry, hidden, base, front, end, head, H, nil, False, D, F, PRECISION, BT, BD, BF
                )  # fmt: skip
                _pass_mask(
                    q, k, mask, dmask, pairs, hidden, rows, base, front, end, head, H, nil,
                    D, F, PRECISION, BT, BD, BF,
                )  # fmt: skip
                _pass_first(
                    q, k, dy, scalars, dq, dscalars, slot, pairs, hidden, base, front, end, head, H, nil,
                    D, F, RESIDUAL, PRECISION, BT, BD, BF,
                )  # fmt: skip
                into1 = tl.where(front > 0, size, 0)
                into2 = tl.where(front > 0, size + first, 2 * first)
                _pass_grad(
                    k, dv, dlr, slot + b2,
                    hidden, rows, base, front, end, head, H, nil, limit, D, F, DV, RESIDUAL, L2, CLAMP, PRECISION, BT, BF, BV,
                )  # fmt: skip
                _pass_base_second(
                    v, dv, carry + into2, hidden, rows, base, front, end, head, H, nil,
                    F, DV, L2, CLAMP, PRECISION, BT, BF, BV,
                )  # fmt: skip
                _pass_inner(
                    dv, slot + b2, hidden, rows, base, front, end, head, H, nil, F, DV, L2, CLAMP, PRECISION, BT, BF, BV
                )  # fmt: skip
                _pass_base(
                    q, k, dk, slot + b1, carry + into1, pairs, hidden, rows, base, front, end, head, H, nil,
                    D, F, CLAMP, PRECISION, BT, BD, BF,
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


@triton.jit
def _step_kernel(
    q, k, v, lr, momentum, decay, w1, w2, m1, m2, s1, s2, y, nw1, nw2, nm1, nm2, ns1, ns2, hidden, position, H, limit,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one sequence and head: the inner gradient slice by slice, then every slice is written and read once."""
    number = tl.program_id(0).to(tl.int64)
    place = tl.load(position + number // H)
    i = tl.arange(0, BD)[:, None]
    n = tl.arange(0, BV)[None, :]
    key = tl.load(k + number * D + i, mask=i < D, other=0.0).to(tl.float32)
    query = tl.load(q + number * D + i, mask=i < D, other=0.0).to(tl.float32)
    grad = -tl.load(v + number * DV + n, mask=n < DV, other=0.0).to(tl.float32)
    out = tl.zeros((1, BV), tl.float32)
    if RESIDUAL:
        out += tl.load(q + number * D + n, mask=n < DV, other=0.0).to(tl.float32)
        if L2:
            grad += tl.load(k + number * D + n, mask=n < DV, other=0.0).to(tl.float32)
    step = tl.load(lr + number).to(tl.float32)
    eta = tl.load(momentum + number).to(tl.float32)
    keep = 1.0 - tl.load(decay + number).to(tl.float32)
    first = number * (D * F)
    second = number * (F * DV)
    inputs = hidden + number * (3 * F)
    x_square = 0.0
    u_square = 0.0
    for f in range(0, F, BF):
        j = f + tl.arange(0, BF)
        inside = (i < D) & (j[None, :] < F)
        at = first + i * F + j[None, :]
        if place > 0:
            weight = tl.load(s1 + at, mask=inside, other=0.0)
        else:
            weight = tl.load(w1 + at, mask=inside, other=0.0)
        x, slope, _ = _gelu_slopes(tl.sum(key * weight, 0))
        tl.store(inputs + j, x, mask=j < F)
        tl.store(inputs + F + j, slope, mask=j < F)
        if CLAMP:
            x_square += tl.sum(x * x, 0)
        if L2:
            inside = (j[:, None] < F) & (n < DV)
            at = second + j[:, None] * DV + n
            if place > 0:
                weight2 = tl.load(s2 + at, mask=inside, other=0.0)
            else:
                weight2 = tl.load(w2 + at, mask=inside, other=0.0)
            grad += tl.sum(x[:, None] * weight2, 0)[None, :]
    tl.debug_barrier()
    for f in range(0, F, BF):
        j = f + tl.arange(0, BF)
        inside = (j[:, None] < F) & (n < DV)
        at = second + j[:, None] * DV + n
        if place > 0:
            weight = tl.load(s2 + at, mask=inside, other=0.0)
        else:
            weight = tl.load(w2 + at, mask=inside, other=0.0)
        inner = tl.sum(grad * weight, 1) * tl.load(inputs + F + j, mask=j < F, other=0.0)
        tl.store(inputs + 2 * F + j, inner, mask=j < F)
        if CLAMP:
            u_square += tl.sum(inner * inner, 0)
    tl.debug_barrier()
    if CLAMP:
        k_square = tl.sum(tl.sum(key * key, 1), 0)
        g_square = tl.sum(tl.sum(grad * grad, 1), 0)
        step *= limit / tl.maximum(tl.sqrt(k_square * u_square + x_square * g_square), limit)
    for f in range(0, F, BF):
        j = f + tl.arange(0, BF)
        inside = (i < D) & (j[None, :] < F)
        at = first + i * F + j[None, :]
        before = tl.load(w1 + at, mask=inside, other=0.0)
        inner = tl.load(inputs + 2 * F + j, mask=j < F, other=0.0)
        moved = eta * tl.load(m1 + at, mask=inside, other=0.0) - key * (step * inner)[None, :]
        after = keep * before + moved
        tl.store(nm1 + at, moved, mask=inside)
        tl.store(nw1 + at, after, mask=inside)
        if place == BT - 1:  # the chunk is full: the next starts from the weights
            before = after
        elif place > 0:
            before = tl.load(s1 + at, mask=inside, other=0.0)
        tl.store(ns1 + at, before, mask=inside)
        a = _gelu(tl.sum(query * after, 0))
        inside = (j[:, None] < F) & (n < DV)
        at = second + j[:, None] * DV + n
        before2 = tl.load(w2 + at, mask=inside, other=0.0)
        x = tl.load(inputs + j, mask=j < F, other=0.0)
        moved2 = eta * tl.load(m2 + at, mask=inside, other=0.0) - x[:, None] * (step * grad)
        after2 = keep * before2 + moved2
        tl.store(nm2 + at, moved2, mask=inside)
        tl.store(nw2 + at, after2, mask=inside)
        if place == BT - 1:
            before2 = after2
        elif place > 0:
            before2 = tl.load(s2 + at, mask=inside, other=0.0)
        tl.store(ns2 + at, before2, mask=inside)
        out += tl.sum(a[:, None] * after2, 0)[None, :]
    tl.store(y + number * DV + n, out.to(y.dtype.element_ty), mask=n < DV)


_FUNCTIONS = [function for function in globals().values() if getattr(function, "noinline", False)]


def _call_or_inline(capability: int) -> None:
    """From sm_100 on products are accumulated in tensor memory, which Triton (3.9) does not have in functions: all is inlined there."""
    for function in _FUNCTIONS:
        function.noinline = capability < 100


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))


def _options(call, table: LaunchTable) -> dict[str, object]:
    dim, value_dim, hidden = call.dim, call.value_dim, call.weights[0].shape[-1]
    # float32 takes twice the room of what the tables are made for.
    entry = max(_padded(dim), _padded(value_dim), call.chunk)
    launch = table.lookup(entry, call.capability)
    _call_or_inline(call.capability)
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
    rows = call.q.new_empty(call.programs, call.chunk, 8 + call.value_dim, dtype=torch.float32)
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
    rows = new(programs, call.chunk, call.dim + 8 + 2 * call.value_dim, dtype=torch.float32)
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


def mlp_step(call, y: Tensor, final: list[Tensor]) -> None:
    """Write y and the new weights, momentum and start, a tensor a layer."""
    programs = call.sequences * call.heads
    hidden = call.q.new_empty(programs, 3, call.weights[0].shape[-1], dtype=torch.float32)
    options = _options(call, STEP)
    for name in ("HAS_POSITION", "VARLEN", "PRECISION"):
        del options[name]
    _step_kernel[(programs,)](
        call.q, call.k, call.v, call.lr, call.momentum, call.decay, *call.weights, *call.state_momentum, *call.state_start,
        y, *final, hidden, call.position, call.heads, call.max_grad_norm or 1.0, **options,
    )  # fmt: skip


def mlp_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry at its largest sizes."""
    _call_or_inline(capability)
    flags = {
        "RESIDUAL": True, "L2": True, "CLAMP": True, "HAS_POSITION": True, "HAS_FINAL": True, "VARLEN": True, "PRECISION": "tf32",
    }  # fmt: skip
    inputs = {**dict.fromkeys(("q", "k", "v", "lr"), "*bf16"), **dict.fromkeys(("mask", "scalars"), "*fp32")}
    memory = dict.fromkeys(("w1", "w2", "m1", "m2", "s1", "s2"), "*fp32")
    shared = {
        **inputs, **memory, "boundaries": "*fp32", "slot_starts": "*i64",
        "states": "*fp32", "hidden": "*bf16", "rows": "*fp32", "pairs": "*bf16",
        "position": "*i64",
        "cu_seqlens": "*i64", "T": "i32", "H": "i32", "numbers": "i32", "every": "i32", "zero": "i32", "limit": "fp32",
    }  # fmt: skip

    def specs(name, kernel, table, signature, constants, chunks=(64, 128)):
        for size, chunk in ((64, 64), *((128, chunk) for chunk in chunks)):
            launch = table.lookup(size, capability)
            given = {
                **constants,
                "D": size,
                "F": min(4 * size, 512),
                "DV": size,
                "BT": chunk,
                "BD": size,
                "BV": size,
                **launch.blocks,
            }
            entry = f"mlp {name} {size}" + (f", chunk {chunk}" if len(chunks) > 1 else "")
            yield CompileSpec(
                f"neural_memory {entry}", kernel, signature, {n: given[n] for n in kernel.arg_names if n in given},
                launch.num_warps, launch.num_stages, ("H",), KNOWN_SPILLS.get((name, size, chunk), 0),
            )  # fmt: skip

    final = dict.fromkeys(("fw1", "fw2", "fm1", "fm2", "fs1", "fs2"), "*fp32")
    yield from specs("forward", _forward_kernel, FORWARD, {**shared, "y": "*bf16", **final}, {**flags, "KEEP": True})
    grads = {
        **dict.fromkeys(("gw1", "gw2", "gm1", "gm2", "gs1", "gs2", "dw1", "dw2", "dm1", "dm2", "ds1", "ds2"), "*fp32"),
        **dict.fromkeys(("dy", "dq", "dk", "dv"), "*bf16"), **dict.fromkeys(("dlr", "dmask", "dscalars"), "*fp32"),
    }  # fmt: skip
    yield from specs("backward", _backward_kernel, BACKWARD, {**shared, **grads}, flags)
    new = dict.fromkeys(("nw1", "nw2", "nm1", "nm2", "ns1", "ns2", "hidden"), "*fp32")
    gates = dict.fromkeys(("momentum", "decay"), "*bf16")
    yield from specs("step", _step_kernel, STEP, {**shared, **gates, **new, "y": "*bf16"}, flags, chunks=(64,))
