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


@triton.jit
def _first(f, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr):
    """Offsets and mask of columns [f, f + BF) of a first layer [D, F]."""
    i = tl.arange(0, BD)[:, None]
    j = f + tl.arange(0, BF)[None, :]
    return i * F + j, (i < D) & (j < F)


@triton.jit
def _second(f, F: tl.constexpr, DV: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr):
    """Offsets and mask of rows [f, f + BF) of a second layer [F, Dv]."""
    i = f + tl.arange(0, BF)[:, None]
    j = tl.arange(0, BV)[None, :]
    return i * DV + j, (i < F) & (j < DV)


@triton.jit
def _hidden(f, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """Offsets and mask of columns [f, f + BF) of a chunk's hidden rows [BT, F]."""
    i = tl.arange(0, BT)[:, None]
    j = f + tl.arange(0, BF)[None, :]
    return i * F + j, (i < BT) & (j < F)


@triton.jit
def _copy(to, source, SIZE: tl.constexpr):
    i = tl.arange(0, 1024)
    for at in range(0, SIZE, 1024):
        inside = at + i < SIZE
        tl.store(to + at + i, tl.load(source + at + i, mask=inside, other=0.0).to(tl.float32), mask=inside)


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
    """Copy what a sequence begins with to a slot (W1, S1, W2, S2) and the weights of its open chunk to `base` (B1, B2)."""
    first: tl.constexpr = D * F
    second: tl.constexpr = F * DV
    if HAS_POSITION:
        at = number.to(tl.int64)
        _copy(slot + first, m1 + at * first, first)
        _copy(slot + 2 * first + second, m2 + at * second, second)
        _copy(base, s1 + at * first, first)
        _copy(base + first, s2 + at * second, second)
    else:
        at = head.to(tl.int64)
        _clear(slot + first, first)
        _clear(slot + 2 * first + second, second)
    _copy(slot, w1 + at * first, first)
    _copy(slot + 2 * first, w2 + at * second, second)
    tl.debug_barrier()


@triton.jit
def _inner_gradient(
    k, v, lr, b1, b2, xs, slopes, curves, us, base, front, end, head, H, limit,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    CURVE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of one chunk: X, gelu'(Z), (with CURVE) gelu''(Z) and U to scratch [BT, F].

    Returns G2 [BT, Dv] and by row theta, min(1, max / n), n, |K|^2, |G1|^2, |X|^2 and |G2|^2, the norms zero without a clamp.
    """
    kind = k.dtype.element_ty
    key = _load(k, base, front, end, head, H, D, BT, BD)
    grad = -_load(v, base, front, end, head, H, DV, BT, BV).to(tl.float32)
    if RESIDUAL and L2:
        grad += key.to(tl.float32)
    x_square = tl.zeros((BT,), tl.float32)
    u_square = tl.zeros((BT,), tl.float32)
    for f in range(0, F, BF):
        at, inside = _first(f, D, F, BD, BF)
        here, held = _hidden(f, F, BT, BF)
        z = tl.dot(key, tl.load(b1 + at, mask=inside, other=0.0).to(kind), input_precision=PRECISION)
        x, slope, curve = _gelu_slopes(z)
        tl.store(xs + here, x.to(kind), mask=held)
        tl.store(slopes + here, slope.to(kind), mask=held)
        if CURVE:
            tl.store(curves + here, curve.to(kind), mask=held)
        if CLAMP:
            x_square += tl.sum(x * x, 1)
        if L2:
            at, inside = _second(f, F, DV, BF, BV)
            grad += tl.dot(x.to(kind), tl.load(b2 + at, mask=inside, other=0.0).to(kind), input_precision=PRECISION)
    tl.debug_barrier()
    for f in range(0, F, BF):
        at, inside = _second(f, F, DV, BF, BV)
        here, held = _hidden(f, F, BT, BF)
        weight = tl.load(b2 + at, mask=inside, other=0.0).to(kind)
        u = tl.dot(grad.to(kind), tl.trans(weight), input_precision=PRECISION)
        tl.store(us + here, u.to(kind), mask=held)
        if CLAMP:
            inner = u * tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
            u_square += tl.sum(inner * inner, 1)
    tl.debug_barrier()
    theta = _gate(lr, base, front, end, head, H, BT, 1, 0)
    k_square = tl.sum(key.to(tl.float32) * key.to(tl.float32), 1)
    g_square = tl.sum(grad * grad, 1)
    norm = tl.sqrt(k_square * u_square + x_square * g_square)
    if CLAMP:
        factor = limit / tl.maximum(norm, limit)
    else:
        factor = tl.full((BT,), 1.0, tl.float32)
    return grad, theta, factor, norm, k_square, u_square, x_square, g_square


@triton.jit
def _last_row(mask, scalars, base, front, end, head, H, BT: tl.constexpr):
    """Of the chunk's last token: its rows of A and E, zero at places that are not real, and its beta, c and e."""
    i = tl.arange(0, BT)
    last = (base + end - 1) * H + head
    into_weights = tl.load(mask + last * BT + i)
    into_momentum = _gate(scalars, base, front, end, head, H, BT, 4, 3)
    return into_weights, into_momentum, tl.load(scalars + last * 4), tl.load(scalars + last * 4 + 1), tl.load(scalars + last * 4 + 2)


@triton.jit
def _advance(
    q, k, y, mask, scalars, slot, to, xs, slopes, us, grad, step, base, front, end, head, H, opened, keep_start,
    D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, READ: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write one chunk: the state `slot` to the state `to` (which may be the same), and with READ its outputs to y.

    With READ and `keep_start`, the weights before go to `opened` too: they are the start of a chunk that stays open.
    """
    kind = k.dtype.element_ty
    first: tl.constexpr = D * F
    second: tl.constexpr = F * DV
    key = _load(k, base, front, end, head, H, D, BT, BD)
    into_weights, into_momentum, beta_last, c_last, e_last = _last_row(mask, scalars, base, front, end, head, H, BT)
    if READ:
        query = _load(q, base, front, end, head, H, D, BT, BD)
        left = _load(mask, base, front, end, head, H, BT, BT, BT)
        compared = (left * tl.dot(query, tl.trans(key), input_precision=PRECISION)).to(kind)
        beta = _gate(scalars, base, front, end, head, H, BT, 4, 0)[:, None]
        c = _gate(scalars, base, front, end, head, H, BT, 4, 1)[:, None]
        mixed = tl.zeros((BT, BT), tl.float32)
        out = tl.zeros((BT, BV), tl.float32)
    write = step[:, None] * grad
    for f in range(0, F, BF):
        at1, inside1 = _first(f, D, F, BD, BF)
        at2, inside2 = _second(f, F, DV, BF, BV)
        here, held = _hidden(f, F, BT, BF)
        x = tl.load(xs + here, mask=held, other=0.0)
        u = tl.load(us + here, mask=held, other=0.0).to(tl.float32)
        inner = step[:, None] * u * tl.load(slopes + here, mask=held, other=0.0).to(tl.float32)
        w1 = tl.load(slot + at1, mask=inside1, other=0.0)
        s1 = tl.load(slot + first + at1, mask=inside1, other=0.0)
        w2 = tl.load(slot + 2 * first + at2, mask=inside2, other=0.0)
        s2 = tl.load(slot + 2 * first + second + at2, mask=inside2, other=0.0)
        if READ:
            h = beta * tl.dot(query, w1.to(kind), input_precision=PRECISION)
            h += c * tl.dot(query, s1.to(kind), input_precision=PRECISION)
            h -= tl.dot(compared, inner.to(kind), input_precision=PRECISION)
            a = _gelu(h).to(kind)
            mixed += tl.dot(a, tl.trans(x), input_precision=PRECISION)
            out += beta * tl.dot(a, w2.to(kind), input_precision=PRECISION)
            out += c * tl.dot(a, s2.to(kind), input_precision=PRECISION)
        change1 = tl.dot(tl.trans(key), (into_weights[:, None] * inner).to(kind), input_precision=PRECISION)
        moved1 = tl.dot(tl.trans(key), (into_momentum[:, None] * inner).to(kind), input_precision=PRECISION)
        change2 = tl.dot(tl.trans(x), (into_weights[:, None] * write).to(kind), input_precision=PRECISION)
        moved2 = tl.dot(tl.trans(x), (into_momentum[:, None] * write).to(kind), input_precision=PRECISION)
        tl.debug_barrier()  # every thread has read this slice before any writes it
        if READ:
            if keep_start:
                tl.store(opened + at1, w1, mask=inside1)
                tl.store(opened + first + at2, w2, mask=inside2)
        tl.store(to + at1, beta_last * w1 + c_last * s1 - change1, mask=inside1)
        tl.store(to + first + at1, e_last * s1 - moved1, mask=inside1)
        tl.store(to + 2 * first + at2, beta_last * w2 + c_last * s2 - change2, mask=inside2)
        tl.store(to + 2 * first + second + at2, e_last * s2 - moved2, mask=inside2)
    if READ:
        out -= tl.dot((left * mixed).to(kind), write.to(kind), input_precision=PRECISION)
        if RESIDUAL:
            out += query.to(tl.float32)
        _store(y, out, base, front, end, head, H, DV, BT, BV)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "numbers", "every"])
def _forward_kernel(
    q, k, v, lr, mask, scalars, w1, w2, m1, m2, s1, s2, y, fw1, fw2, fm1, fm2, fs1, fs2, boundaries, slot_starts,
    states, hidden, position, cu_seqlens, T, H, numbers, every, limit,
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
    for turn in range(0, tl.cdiv(numbers - tl.program_id(0), tl.num_programs(0))):
        number = tl.program_id(0) + turn * tl.num_programs(0)
        n = number // H
        head = number % H
        count = _chunks(n, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
        _enter(slot, start, number, head, w1, w2, m1, m2, s1, s2, D, F, DV, HAS_POSITION)
        for chunk in range(0, count):
            base, front, end = _chunk(n, chunk, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
            # The weights that gradients are taken at: those of the chunk's start.
            b1 = tl.where(front > 0, size, 0)
            b2 = tl.where(front > 0, size + first, 2 * first)
            grad, theta, factor, _, _, _, _, _ = _inner_gradient(
                k, v, lr, slot + b1, slot + b2, xs, slopes, slopes, us, base, front, end, head, H, limit,
                D, F, DV, RESIDUAL, L2, CLAMP, False, PRECISION, BT, BD, BF, BV,
            )  # fmt: skip
            keep_start = (chunk == count - 1) & (end < BT) & (front == 0)
            _advance(
                q, k, y, mask, scalars, slot, slot, xs, slopes, us, grad, theta * factor, base, front, end, head, H, start,
                keep_start, D, F, DV, RESIDUAL, True, PRECISION, BT, BD, BF, BV,
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
            _copy(fw2 + at * second, slot + 2 * first, second)
            _copy(fm2 + at * second, slot + 2 * first + second, second)
            open_chunk = _places(n, position, cu_seqlens, T, HAS_POSITION, VARLEN) % BT > 0
            _copy(fs1 + at * first, slot + tl.where(open_chunk, size, 0), first)
            _copy(fs2 + at * second, slot + tl.where(open_chunk, size + first, 2 * first), second)
        tl.debug_barrier()


@triton.jit
def _places(n, position, cu_seqlens, T, HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr):
    """The tokens of a sequence, those already written in the chunk it opens with included."""
    length = T
    if VARLEN:
        length = (tl.load(cu_seqlens + n + 1) - tl.load(cu_seqlens + n)).to(tl.int32)
    if HAS_POSITION:
        length += tl.load(position + n).to(tl.int32)
    return length


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


def mlp_forward(
    call, mask: Tensor, scalars: Tensor, y: Tensor, final: list[Tensor] | None, boundaries: Tensor | None
) -> None:
    """Write y, the final state (weights, momentum, start, a tensor a layer) and the boundaries, where given."""
    sizes = [w.shape[-2] * w.shape[-1] for w in call.weights]
    hidden = call.weights[0].shape[-1]
    states = call.q.new_empty(call.programs, 3 * sum(sizes), dtype=torch.float32)
    scratch = call.q.new_empty(call.programs, 3, call.chunk, hidden)
    none = [None, None]
    _forward_kernel[(call.programs,)](
        call.q, call.k, call.v, call.lr, mask, scalars, *call.weights, *(call.state_momentum or none), *(call.state_start or none),
        y, *(final or none * 3), boundaries, None if boundaries is None else call.slot_starts(), states, scratch,
        call.position, call.cu_seqlens, call.length, call.heads, call.sequences * call.heads, call.every, call.max_grad_norm or 1.0,
        HAS_FINAL=final is not None, KEEP=boundaries is not None, **_options(call, FORWARD),
    )  # fmt: skip


def mlp_backward(call, mask, scalars, boundaries, dy, dfinal, dq, dk, dv, dlr, dmask, dscalars) -> list[Tensor]:
    raise NotImplementedError


def mlp_step(call, y, final) -> None:
    raise NotImplementedError


def mlp_specs(capability: int) -> Iterator[CompileSpec]:
    yield from ()
