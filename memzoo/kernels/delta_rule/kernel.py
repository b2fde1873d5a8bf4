"""Triton kernels of the delta rule: chunk-parallel forward and backward, and one decode step; checked against the definition.

With G the running sum of log-decays in a chunk of C tokens, e_ij = exp(G_i - G_j), M = strictly lower (e . K K^T), and S the state before
the chunk, the errors `R = V - exp(G) K S - M beta R` solve a unit lower-triangular system. Its interaction `Phi = (I + M beta)^-1 M`,
strictly lower, has entries of at most 1 for unit keys and `beta <= 2`; with it every solve is one product with the identity exact:

    R = B - Phi beta B, B = V - exp(G) K S;   Y = scale exp(G) Q S + P beta R, P = scale lower (e . Q K^T)
    S' = exp(G_C) S + K^T (exp(G_C - G) beta R)
    backward, with D = beta R, from dS' and dY:   dD = P^T dY + exp(G_C - G) K dS';   X = dD - Phi^T beta dD;   dV = beta X;   dbeta = X . R
    dS = exp(G_C) dS' + Q^T (scale exp(G) dY) - K^T (exp(G) dV)
    dQ = scale exp(G) dY S^T + F K, F = scale lower (e . dY D^T);   with E = strictly lower (e . dV D^T)
    dK = (-exp(G) dV S^T - E K) + (exp(G_C - G) D dS'^T + F^T Q - E^T K);   dG = rows of q . dQ + k . (first - second part of dK), F's
    diagonal left out of both

Phi comes from exact block elimination: 1 x 1 blocks are merged in pairs up to C x C, `Phi_21 = (I - Phi_22 beta) M_21 (I - beta Phi_11)`.
There is no power series, so keys that are all the same stay exact. In bf16 the merges run in tf32, whose error stays below that of storing
Phi in bf16 for `beta <= 1`; between 1 and 2 with keys that are nearly all the same it can reach a few percent.

Kernels: `prepare` (a chunk a program) writes Phi and P; `sweep` (a sequence, head and tile of Dv a program) carries the state in registers.
The backward saves only inputs: it runs both again, `sweep` now writing S and R; `reverse` carries dS back and writes dS', X and dV; `pairs`
(a chunk a program) writes F, E and dbeta; `inputs` (a chunk and tile of Dk a program) writes dQ, dK and dG. F, E, Phi and P pass
through memory because they are needed transposed as well, and because 2 C bytes a token and head cost less than forming them for each tile.

For each token and head in bf16, Dk = Dv = D, in brackets at D = 128, C = 64:
    forward   12 D + 8 C bytes (2,048; compulsory 8 D = 1,024)             6 D^2 + 8 C D + 20 C^2 operations (246 k, 82 k of them tf32)
    backward  40 D + 18 C + 8 D^2 / C bytes (8,320; compulsory 1,792)      16 D^2 + 22 C D + 20 C^2 operations (524 k)
At 4.3 TB/s and 790 TFLOP/s bytes decide: 0.48 ns forward (compulsory 0.24) and 1.9 ns backward. With few sequences and heads the chain of
dependent products in `sweep` and `reverse`, three to four a chunk, decides instead. A step reads and writes the state once: 8 Dk Dv bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import MAX_HEAD_DIM
from ..common.dispatch import interpreting
from ..common.launch import CompileSpec, Launch, LaunchTable, capability_of, next_power_of_2
from ..common.packing import chunk_indices

# Keyed by the padded Dk. BT is the chunk's length, the same for every kernel of a call.
PREPARE = LaunchTable({
    (128, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BK": 64}),
    (256, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 32, "BK": 64}),
})  # fmt: skip
SWEEP = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=2, blocks={"BV": 32}),
    (128, 80): Launch(num_warps=4, num_stages=2, blocks={"BV": 16}),
    (128, 90): Launch(num_warps=4, num_stages=2, blocks={"BV": 32}),
    (256, 80): Launch(num_warps=4, num_stages=2, blocks={"BV": 16}),
})  # fmt: skip
REVERSE = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=2, blocks={"BV": 32}),
    (128, 80): Launch(num_warps=4, num_stages=1, blocks={"BV": 16}),
    (128, 90): Launch(num_warps=4, num_stages=2, blocks={"BV": 32}),
    (256, 80): Launch(num_warps=4, num_stages=2, blocks={"BV": 16}),
})  # fmt: skip
PAIRS = LaunchTable({
    (128, 80): Launch(num_warps=2, num_stages=2, blocks={"BV": 32}),
    (256, 80): Launch(num_warps=2, num_stages=2, blocks={"BV": 64}),
})  # fmt: skip
INPUTS = LaunchTable({
    (128, 80): Launch(num_warps=4, num_stages=2, blocks={"BK": 32, "BV": 64}),
    (128, 90): Launch(num_warps=4, num_stages=2, blocks={"BK": 64, "BV": 32}),
    (256, 80): Launch(num_warps=4, num_stages=2, blocks={"BK": 64, "BV": 64}),
})  # fmt: skip
STEP = LaunchTable({
    (64, 80): Launch(num_warps=2, num_stages=1, blocks={"BV": 32}),
    (128, 80): Launch(num_warps=4, num_stages=1, blocks={"BV": 32}),
    (256, 80): Launch(num_warps=4, num_stages=1, blocks={"BV": 16}),
})  # fmt: skip


@triton.jit
def _chunk_of(program, cu_seqlens, chunks, T, BT: tl.constexpr, VARLEN: tl.constexpr):
    """(the chunk's first row in memory, how many tokens it has); the count is not positive if the program is idle."""
    if VARLEN:
        n = tl.load(chunks + program * 2)
        start = tl.load(chunks + program * 2 + 1) * BT
        first = tl.load(cu_seqlens + tl.maximum(n, 0)).to(tl.int64)
        length = (tl.load(cu_seqlens + tl.maximum(n, 0) + 1).to(tl.int64) - first).to(tl.int32)
        length = tl.where(n < 0, 0, length)
    else:
        count = tl.cdiv(T, BT)
        start = (program % count) * BT
        first = (program // count).to(tl.int64) * T
        length = T
    return first + start, length - start


@triton.jit
def _sequence(n, cu_seqlens, starts, T, BT: tl.constexpr, VARLEN: tl.constexpr):
    """(the sequence's first row in memory, its length, the number of its first chunk)."""
    if VARLEN:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - first).to(tl.int32)
        chunk = tl.load(starts + n).to(tl.int64)
    else:
        first = n.to(tl.int64) * T
        length = T
        chunk = n.to(tl.int64) * tl.cdiv(T, BT)
    return first, length, chunk


@triton.jit
def _tile(head, H, column, D: tl.constexpr, valid, BT: tl.constexpr, BD: tl.constexpr):
    """Offsets and mask of columns [column, column + BD) of BT rows of a [.., H, D] tensor, from the first row on."""
    i = tl.arange(0, BT)
    j = column + tl.arange(0, BD)
    inside = (i < valid)[:, None]
    if D % BD != 0:
        inside = inside & (j < D)[None, :]
    return head * D + i[:, None] * (H * D) + j[None, :], inside


@triton.jit
def _load(x, row, head, H, column, D: tl.constexpr, valid, BT: tl.constexpr, BD: tl.constexpr):
    offsets, inside = _tile(head, H, column, D, valid, BT, BD)
    return tl.load(x + row * H * D + offsets, mask=inside, other=0.0)


@triton.jit
def _store(x, value, row, head, H, column, D: tl.constexpr, valid, BT: tl.constexpr, BD: tl.constexpr):
    offsets, inside = _tile(head, H, column, D, valid, BT, BD)
    tl.store(x + row * H * D + offsets, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gate(x, row, head, H, valid, BT: tl.constexpr):
    """One number a token, zero after the sequence's end."""
    i = tl.arange(0, BT)
    return tl.load(x + row * H + head + i * H, mask=i < valid, other=0.0)


@triton.jit
def _state(index, column, value_column, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Offsets and mask of a [BK, BV] tile of state number `index`."""
    rows = column + tl.arange(0, BK)
    columns = value_column + tl.arange(0, BV)
    inside = (rows >= 0)[:, None]
    if DK % BK != 0:
        inside = inside & (rows < DK)[:, None]
    if DV % BV != 0:
        inside = inside & (columns < DV)[None, :]
    return index * DK * DV + rows[:, None] * DV + columns[None, :], inside


@triton.jit
def _decays(cumulative, row, head, H, valid, BT: tl.constexpr):
    """(exp(G), exp(G_C - G), exp(G_C)) of a chunk."""
    g = _gate(cumulative, row, head, H, valid, BT)
    last = tl.load(cumulative + (row + tl.minimum(valid, BT) - 1) * H + head)
    to_end = tl.where(tl.arange(0, BT) < valid, (last - g).to(tl.float32), 0.0)
    return tl.exp(g.to(tl.float32)), tl.exp(to_end), tl.exp(last.to(tl.float32))


@triton.jit(do_not_specialize=["T"])
def _prepare_kernel(
    q, k, beta, log_decay, cumulative, phi, reads, cu_seqlens, chunks, T, H, scale,
    DK: tl.constexpr, HAS_DECAY: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Phi and P of one chunk, [B, T, H, BT] each, and the running sum of its log-decays in float64, [B, T, H]."""
    head = tl.program_id(0) % H
    row, valid = _chunk_of(tl.program_id(0) // H, cu_seqlens, chunks, T, BT, VARLEN)
    if valid <= 0:
        return
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    strength = _gate(beta, row, head, H, valid, BT).to(tl.float32)[None, :]
    read = tl.zeros((BT, BT), tl.float32)
    mixed = tl.zeros((BT, BT), tl.float32)
    for column in range(0, DK, BK):
        key = _load(k, row, head, H, column, DK, valid, BT, BK)
        query = _load(q, row, head, H, column, DK, valid, BT, BK)
        read += tl.dot(query, tl.trans(key), input_precision=PRECISION)
        mixed += tl.dot(key, tl.trans(key), input_precision=PRECISION)
    if HAS_DECAY:
        # In float64, a difference of running sums loses nothing to strong decays earlier in the chunk.
        g = tl.cumsum(_gate(log_decay, row, head, H, valid, BT).to(tl.float64), 0)
        at = tl.arange(0, BT)
        tl.store(cumulative + row * H + head + at * H, g, mask=at < valid)
        decay = tl.exp(tl.where(i >= j, (g[:, None] - g[None, :]).to(tl.float32), 0.0))
        read *= decay
        mixed *= decay
    read = tl.where(i >= j, read * scale, 0.0)
    _store(reads, read, row, head, H, 0, BT, valid, BT, BT)
    mixed = tl.where(i > j, mixed, 0.0)
    found = tl.where(i // 2 == j // 2, mixed, 0.0)
    for level in tl.static_range(1, 7):
        if (1 << level) < BT:
            cross = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level), mixed, 0.0)
            cross -= tl.dot(found * strength, cross, input_precision=PRECISION)
            found += cross - tl.dot(cross * strength, found, input_precision=PRECISION)
    _store(phi, found, row, head, H, 0, BT, valid, BT, BT)


@triton.jit(do_not_specialize=["T"])
def _sweep_kernel(
    q, k, v, beta, cumulative, phi, reads, initial_state, y, final_state, states, errors, cu_seqlens, starts, T, H, scale,
    DK: tl.constexpr, DV: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr,
    KEEP: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All chunks of one sequence, head and tile of Dv: outputs and the last state, or (KEEP) the state before each chunk and the errors."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    column = (tl.program_id(0) % tiles) * BV
    number = tl.program_id(0) // tiles
    head = number % H
    first, length, chunk = _sequence(number // H, cu_seqlens, starts, T, BT, VARLEN)
    where, held = _state(number.to(tl.int64), 0, column, DK, DV, BK, BV)
    state = tl.zeros((BK, BV), tl.float32)
    if HAS_STATE:
        state = tl.load(initial_state + where, mask=held, other=0.0)
    kind = k.dtype.element_ty
    for c in range(tl.cdiv(length, BT)):
        row = first + c * BT
        valid = length - c * BT
        strength = _gate(beta, row, head, H, valid, BT).to(tl.float32)[:, None]
        key = _load(k, row, head, H, 0, DK, valid, BT, BK)
        seen = state.to(kind)
        held_back = tl.dot(key, seen, input_precision=PRECISION)
        if HAS_DECAY:
            since_start, to_end, kept = _decays(cumulative, row, head, H, valid, BT)
            held_back *= since_start[:, None]
        error = _load(v, row, head, H, column, DV, valid, BT, BV).to(tl.float32) - held_back
        interaction = _load(phi, row, head, H, 0, BT, valid, BT, BT)
        error -= tl.dot(interaction, (strength * error).to(kind), input_precision=PRECISION)
        if KEEP:
            before, _ = _state((chunk + c) * H + head, 0, column, DK, DV, BK, BV)
            tl.store(states + before, seen, mask=held)
            _store(errors, error, row, head, H, column, DV, valid, BT, BV)
        write = strength * error
        if not KEEP:
            query = _load(q, row, head, H, 0, DK, valid, BT, BK)
            read = _load(reads, row, head, H, 0, BT, valid, BT, BT)
            output = tl.dot(query, seen, input_precision=PRECISION) * scale
            if HAS_DECAY:
                output *= since_start[:, None]
            output += tl.dot(read, write.to(kind), input_precision=PRECISION)
            _store(y, output, row, head, H, column, DV, valid, BT, BV)
        if HAS_DECAY:
            write *= to_end[:, None]
            state *= kept
        state += tl.dot(tl.trans(key), write.to(kind), input_precision=PRECISION)
    if HAS_FINAL:
        tl.store(final_state + where, state, mask=held)


@triton.jit(do_not_specialize=["T"])
def _reverse_kernel(
    q, k, beta, cumulative, phi, reads, dy, dfinal, dstates, x, dv, dinitial, cu_seqlens, starts, T, H, scale,
    DK: tl.constexpr, DV: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DFINAL: tl.constexpr, HAS_STATE: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All chunks of one sequence, head and tile of Dv from the last: the gradient of the state after each chunk, X, dV, dinitial."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    column = (tl.program_id(0) % tiles) * BV
    number = tl.program_id(0) // tiles
    head = number % H
    first, length, chunk = _sequence(number // H, cu_seqlens, starts, T, BT, VARLEN)
    where, held = _state(number.to(tl.int64), 0, column, DK, DV, BK, BV)
    dstate = tl.zeros((BK, BV), tl.float32)
    if HAS_DFINAL:
        dstate = tl.load(dfinal + where, mask=held, other=0.0)
    kind = k.dtype.element_ty
    count = tl.cdiv(length, BT)
    for back in range(count):
        c = count - 1 - back
        row = first + c * BT
        valid = length - c * BT
        after, _ = _state((chunk + c) * H + head, 0, column, DK, DV, BK, BV)
        carried = dstate.to(kind)
        tl.store(dstates + after, carried, mask=held)
        strength = _gate(beta, row, head, H, valid, BT).to(tl.float32)[:, None]
        key = _load(k, row, head, H, 0, DK, valid, BT, BK)
        grad = tl.dot(key, carried, input_precision=PRECISION)
        if HAS_DECAY:
            since_start, to_end, kept = _decays(cumulative, row, head, H, valid, BT)
            grad *= to_end[:, None]
        given = _load(dy, row, head, H, column, DV, valid, BT, BV)
        read = _load(reads, row, head, H, 0, BT, valid, BT, BT)
        grad += tl.dot(tl.trans(read), given, input_precision=PRECISION)
        interaction = _load(phi, row, head, H, 0, BT, valid, BT, BT)
        grad -= tl.dot(tl.trans(interaction), (strength * grad).to(kind), input_precision=PRECISION)
        _store(x, grad, row, head, H, column, DV, valid, BT, BV)
        grad *= strength
        _store(dv, grad, row, head, H, column, DV, valid, BT, BV)
        asked = given.to(tl.float32) * scale
        if HAS_DECAY:
            asked *= since_start[:, None]
            grad *= since_start[:, None]
            dstate *= kept
        query = _load(q, row, head, H, 0, DK, valid, BT, BK)
        dstate += tl.dot(tl.trans(query), asked.to(kind), input_precision=PRECISION)
        dstate -= tl.dot(tl.trans(key), grad.to(kind), input_precision=PRECISION)
    if HAS_STATE:
        tl.store(dinitial + where, dstate, mask=held)


@triton.jit(do_not_specialize=["T"])
def _pairs_kernel(
    beta, cumulative, dy, errors, x, asked, erased, own, dbeta, cu_seqlens, chunks, T, H, scale,
    DV: tl.constexpr, HAS_DECAY: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of one chunk: F below its diagonal and E, [B, T, H, BT] each; F's diagonal, where a token reads its own write; and dbeta."""
    head = tl.program_id(0) % H
    row, valid = _chunk_of(tl.program_id(0) // H, cu_seqlens, chunks, T, BT, VARLEN)
    if valid <= 0:
        return
    f = tl.zeros((BT, BT), tl.float32)
    e = tl.zeros((BT, BT), tl.float32)
    grad_beta = tl.zeros((BT,), tl.float32)
    diagonal = tl.zeros((BT,), tl.float32)
    for column in range(0, DV, BV):
        error = _load(errors, row, head, H, column, DV, valid, BT, BV)
        given = _load(dy, row, head, H, column, DV, valid, BT, BV)
        grad = _load(x, row, head, H, column, DV, valid, BT, BV)
        f += tl.dot(given, tl.trans(error), input_precision=PRECISION)
        e += tl.dot(grad, tl.trans(error), input_precision=PRECISION)
        grad_beta += tl.sum(grad.to(tl.float32) * error.to(tl.float32), 1)
        diagonal += tl.sum(given.to(tl.float32) * error.to(tl.float32), 1)
    at = tl.arange(0, BT)
    tl.store(dbeta + row * H + head + at * H, grad_beta, mask=at < valid)
    i = at[:, None]
    j = at[None, :]
    strength = _gate(beta, row, head, H, valid, BT).to(tl.float32)
    tl.store(own + row * H + head + at * H, diagonal * strength * scale, mask=at < valid)
    f *= strength[None, :] * scale
    e *= strength[None, :] * strength[:, None]
    if HAS_DECAY:
        g = _gate(cumulative, row, head, H, valid, BT)
        decay = tl.exp(tl.where((i >= j) & (i < valid), (g[:, None] - g[None, :]).to(tl.float32), 0.0))
        f *= decay
        e *= decay
    _store(asked, tl.where(i > j, f, 0.0), row, head, H, 0, BT, valid, BT, BT)
    _store(erased, tl.where(i > j, e, 0.0), row, head, H, 0, BT, valid, BT, BT)


@triton.jit(do_not_specialize=["T"])
def _inputs_kernel(
    q, k, beta, cumulative, dy, errors, x, asked, erased, own, states, dstates, dq, dk, ddecay,
    cu_seqlens, chunks, T, H, scale, rows,
    DK: tl.constexpr, DV: tl.constexpr, HAS_DECAY: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dQ and dK of one chunk and tile of Dk, and this tile's share of the gradient of log-decay, [tiles, B, T, H]."""
    tiles: tl.constexpr = (DK + BK - 1) // BK
    part = tl.program_id(0) % tiles
    column = part * BK
    number = tl.program_id(0) // tiles
    head = number % H
    row, valid = _chunk_of(number // H, cu_seqlens, chunks, T, BT, VARLEN)
    if valid <= 0:
        return
    grad_q = tl.zeros((BT, BK), tl.float32)  # of what reads: queries
    grad_compared = tl.zeros((BT, BK), tl.float32)  # of what is compared with the memory: keys
    grad_written = tl.zeros((BT, BK), tl.float32)  # of what is written: keys again
    change = tl.zeros((BK,), tl.float32)
    for value_column in range(0, DV, BV):
        where, held = _state(number.to(tl.int64), column, value_column, DK, DV, BK, BV)
        state = tl.load(states + where, mask=held, other=0.0)
        dstate = tl.load(dstates + where, mask=held, other=0.0)
        given = _load(dy, row, head, H, value_column, DV, valid, BT, BV)
        error = _load(errors, row, head, H, value_column, DV, valid, BT, BV)
        grad = _load(x, row, head, H, value_column, DV, valid, BT, BV)
        grad_q += tl.dot(given, tl.trans(state), input_precision=PRECISION)
        grad_compared += tl.dot(grad, tl.trans(state), input_precision=PRECISION)
        grad_written += tl.dot(error, tl.trans(dstate), input_precision=PRECISION)
        if HAS_DECAY:
            change += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    strength = _gate(beta, row, head, H, valid, BT).to(tl.float32)[:, None]
    key = _load(k, row, head, H, column, DK, valid, BT, BK)
    grad_q *= scale
    grad_compared *= -strength
    grad_written *= strength
    if HAS_DECAY:
        since_start, to_end, kept = _decays(cumulative, row, head, H, valid, BT)
        grad_q *= since_start[:, None]
        grad_compared *= since_start[:, None]
        grad_written *= to_end[:, None]
        last = kept * tl.sum(change, 0) + tl.sum(key.to(tl.float32) * grad_written)
    f = _load(asked, row, head, H, 0, BT, valid, BT, BT)
    e = _load(erased, row, head, H, 0, BT, valid, BT, BT)
    query = _load(q, row, head, H, column, DK, valid, BT, BK)
    grad_q += tl.dot(f, key, input_precision=PRECISION)
    grad_compared -= tl.dot(e, key, input_precision=PRECISION)
    grad_written += tl.dot(tl.trans(f), query, input_precision=PRECISION)
    grad_written -= tl.dot(tl.trans(e), key, input_precision=PRECISION)
    if HAS_DECAY:
        # A token's read of its own write does not depend on any decay; left out here, it leaves no rounding error behind.
        slope = tl.sum(query.to(tl.float32) * grad_q + key.to(tl.float32) * (grad_compared - grad_written), 1)
        slope = tl.cumsum(slope, 0, reverse=True) + last
        at = tl.arange(0, BT)
        share = part.to(tl.int64) * rows + row
        tl.store(ddecay + share * H + head + at * H, slope, mask=at < valid)
    diagonal = _gate(own, row, head, H, valid, BT)[:, None]
    grad_q += diagonal * key.to(tl.float32)
    grad_written += diagonal * query.to(tl.float32)
    _store(dq, grad_q, row, head, H, column, DK, valid, BT, BK)
    _store(dk, grad_compared + grad_written, row, head, H, column, DK, valid, BT, BK)


@triton.jit
def _step_kernel(
    q, k, v, beta, log_decay, state, y, new_state, scale,
    DK: tl.constexpr, DV: tl.constexpr, HAS_DECAY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one sequence, head and tile of Dv: the state is read once and written once."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    column = (tl.program_id(0) % tiles) * BV
    number = (tl.program_id(0) // tiles).to(tl.int64)
    where, held = _state(number, 0, column, DK, DV, BK, BV)
    memory = tl.load(state + where, mask=held, other=0.0)
    i = tl.arange(0, BK)
    j = column + tl.arange(0, BV)
    key = tl.load(k + number * DK + i, mask=i < DK, other=0.0).to(tl.float32)
    query = tl.load(q + number * DK + i, mask=i < DK, other=0.0).to(tl.float32)
    value = tl.load(v + number * DV + j, mask=j < DV, other=0.0).to(tl.float32)
    if HAS_DECAY:
        memory *= tl.exp(tl.load(log_decay + number).to(tl.float32))
    write = tl.load(beta + number).to(tl.float32) * (value - tl.sum(key[:, None] * memory, 0))
    memory += key[:, None] * write[None, :]
    output = scale * tl.sum(query[:, None] * memory, 0)
    tl.store(new_state + where, memory, mask=held)
    tl.store(y + number * DV + j, output.to(y.dtype.element_ty), mask=j < DV)


def _precision(x: Tensor) -> str:
    if interpreting():
        return "ieee"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _chunk_starts(cu_seqlens: Tensor, chunk: int) -> Tensor:
    """The number of the first chunk of each sequence as `chunk_indices` counts them, [N] of int64."""
    chunks = (cu_seqlens[1:] - cu_seqlens[:-1] + chunk - 1) // chunk
    return (chunks.cumsum(0) - chunks).long()


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))


class _Call:
    """What every launch of one forward or backward shares: contiguous inputs, grids and scratch."""

    def __init__(self, q, k, v, beta, log_decay, scale, initial_state, cu_seqlens):
        self.q, self.k, self.v, self.beta = q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous()
        self.log_decay = None if log_decay is None else log_decay.contiguous()
        self.initial_state = None if initial_state is None else initial_state.contiguous()
        self.scale = scale
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.value_dim = v.shape[3]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.capability = capability_of(q.device)
        self.size = _padded(self.key_dim)
        # float32 takes twice the room of what the tables are made for: the smallest tiles there are.
        self.entry = self.size if q.dtype != torch.float32 or interpreting() else MAX_HEAD_DIM
        self.chunk = PREPARE.lookup(self.entry, self.capability).blocks["BT"]
        self.cu_seqlens, self.chunks, self.starts = cu_seqlens, None, None
        if cu_seqlens is None:
            self.chunk_count = self.batch * triton.cdiv(self.length, self.chunk)
        else:
            self.chunks = chunk_indices(cu_seqlens, self.length, self.chunk)
            self.starts = _chunk_starts(cu_seqlens, self.chunk)
            self.chunk_count = self.chunks.shape[0]
        self.flags = {
            "HAS_DECAY": log_decay is not None,
            "VARLEN": cu_seqlens is not None,
            "PRECISION": _precision(q),
            "BT": self.chunk,
        }

    def launch(self, table: LaunchTable) -> tuple[dict[str, object], int, int]:
        """(options, tiles of Dk, tiles of Dv) of a kernel: its table's entry, tiles no larger than the padded head dimensions."""
        launch = table.lookup(self.entry, self.capability)
        blocks = {"BK": self.size, **launch.blocks}
        blocks["BK"] = min(blocks["BK"], self.size)
        blocks["BV"] = min(blocks.get("BV", 16), _padded(self.value_dim))
        options = {**self.flags, **launch.options(), **blocks, "DK": self.key_dim, "DV": self.value_dim}
        return options, triton.cdiv(self.key_dim, blocks["BK"]), triton.cdiv(self.value_dim, blocks["BV"])

    def per_pair(self) -> Tensor:
        """Scratch for one number for each two tokens of a chunk."""
        return self.q.new_empty(self.batch, self.length, self.heads, self.chunk)

    def prepare(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """(running sums of log-decays or None, Phi, P)."""
        cumulative = None if self.log_decay is None else torch.empty_like(self.beta, dtype=torch.float64)
        phi, reads = self.per_pair(), self.per_pair()
        options, _, _ = self.launch(PREPARE)
        del options["BV"], options["DV"]
        _prepare_kernel[(self.chunk_count * self.heads,)](
            self.q, self.k, self.beta, self.log_decay, cumulative, phi, reads, self.cu_seqlens, self.chunks, self.length,
            self.heads, self.scale, **options,
        )  # fmt: skip
        return cumulative, phi, reads

    def states(self) -> Tensor:
        return self.q.new_empty(self.chunk_count, self.heads, self.key_dim, self.value_dim)

    def sweep(self, scratch, y, final_state, states, errors) -> None:
        options, _, tiles = self.launch(SWEEP)
        _sweep_kernel[(self.sequences * self.heads * tiles,)](
            self.q, self.k, self.v, self.beta, *scratch, self.initial_state, y, final_state, states, errors,
            self.cu_seqlens, self.starts, self.length, self.heads, self.scale,
            HAS_STATE=self.initial_state is not None, HAS_FINAL=final_state is not None, KEEP=states is not None, **options,
        )  # fmt: skip


@torch.library.custom_op("memzoo::delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(output, final state); the second is empty when it is not asked for."""
    call = _Call(q, k, v, beta, log_decay, scale, initial_state, cu_seqlens)
    y = torch.empty_like(call.v)
    shape = (call.sequences, call.heads, call.key_dim, call.value_dim) if output_final_state else (0,)
    final_state = q.new_empty(shape, dtype=torch.float32)
    call.sweep(call.prepare(), y, final_state if output_final_state else None, None, None)
    return y, final_state


@_forward.register_fake
def _(q, k, v, beta, log_decay, scale, initial_state, output_final_state, cu_seqlens):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    return torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("memzoo::delta_rule_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbeta, dlog_decay, dinitial_state); the last two are empty when there is no such input."""
    call = _Call(q, k, v, beta, log_decay, scale, initial_state, cu_seqlens)
    dy = dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    cumulative, phi, reads = call.prepare()
    states, dstates = call.states(), call.states()
    errors, x, dv = torch.empty_like(call.v), torch.empty_like(call.v), torch.empty_like(call.v)
    call.sweep((cumulative, phi, reads), None, None, states, errors)
    dinitial = q.new_empty(0) if initial_state is None else torch.empty_like(call.initial_state)
    options, _, tiles = call.launch(REVERSE)
    _reverse_kernel[(call.sequences * call.heads * tiles,)](
        call.q, call.k, call.beta, cumulative, phi, reads, dy, dfinal, dstates, x, dv, dinitial,
        cu_seqlens, call.starts, call.length, call.heads, scale,
        HAS_DFINAL=dfinal is not None, HAS_STATE=initial_state is not None, **options,
    )  # fmt: skip

    own, dbeta = (torch.empty_like(call.beta, dtype=torch.float32) for _ in range(2))
    asked, erased = phi, reads  # their last reader has run
    options, _, _ = call.launch(PAIRS)
    del options["BK"], options["DK"]
    _pairs_kernel[(call.chunk_count * call.heads,)](
        call.beta, cumulative, dy, errors, x, asked, erased, own, dbeta, cu_seqlens, call.chunks, call.length, call.heads, scale,
        **options,
    )  # fmt: skip

    dq, dk = torch.empty_like(call.q), torch.empty_like(call.k)
    options, tiles, _ = call.launch(INPUTS)
    ddecay = None if log_decay is None else q.new_empty(tiles, *beta.shape, dtype=torch.float32)
    _inputs_kernel[(call.chunk_count * call.heads * tiles,)](
        call.q, call.k, call.beta, cumulative, dy, errors, x, asked, erased, own, states, dstates, dq, dk, ddecay,
        cu_seqlens, call.chunks, call.length, call.heads, scale, call.batch * call.length, **options,
    )  # fmt: skip
    ddecay = q.new_empty(0) if log_decay is None else ddecay.sum(0).to(log_decay.dtype)
    return dq, dk, dv, dbeta.to(beta.dtype), ddecay, dinitial


@_backward.register_fake
def _(dy, dfinal, q, k, v, beta, log_decay, scale, initial_state, cu_seqlens):
    def like(x):
        return q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(beta), like(log_decay), like(initial_state)


def _setup_context(ctx, inputs, output):
    q, k, v, beta, log_decay, scale, initial_state, output_final_state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, beta, log_decay, initial_state, cu_seqlens)
    ctx.scale, ctx.output_final_state = scale, output_final_state


def _autograd(ctx, dy, dfinal):
    q, k, v, beta, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    dfinal = dfinal if ctx.output_final_state else None
    dq, dk, dv, dbeta, ddecay, dinitial = _backward(dy, dfinal, q, k, v, beta, log_decay, ctx.scale, initial_state, cu_seqlens)
    ddecay = None if log_decay is None else ddecay
    return dq, dk, dv, dbeta, ddecay, None, None if initial_state is None else dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("memzoo::delta_rule_step", mutates_args=())
def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v, beta, state = (t.contiguous() for t in (q, k, v, beta, state))
    log_decay = None if log_decay is None else log_decay.contiguous()
    batch, _, heads, key_dim = q.shape
    value_dim = v.shape[3]
    y, new_state = torch.empty_like(v), torch.empty_like(state)
    launch = STEP.lookup(_padded(key_dim), capability_of(q.device))
    options = {**launch.options(), "BV": min(launch.blocks["BV"], _padded(value_dim))}
    _step_kernel[(batch * heads * triton.cdiv(value_dim, options["BV"]),)](
        q, k, v, beta, log_decay, state, y, new_state, scale,
        DK=key_dim, DV=value_dim, HAS_DECAY=log_decay is not None, BK=_padded(key_dim), **options,
    )  # fmt: skip
    return y, new_state


@_step.register_fake
def _(q, k, v, beta, log_decay, scale, state):
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        torch.empty_like(state, memory_format=torch.contiguous_format),
    )


def delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    y, state = _forward(q, k, v, beta, log_decay, scale, initial_state, output_final_state, cu_seqlens)
    return y, state if output_final_state else None


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The decode step: T = 1 with a state, no gradient."""
    return _step(q, k, v, beta, log_decay, scale, state)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability, in bf16, packed, with decay and states (the most registers)."""
    flags = {"HAS_DECAY": True, "VARLEN": True, "PRECISION": "tf32"}
    inputs = dict.fromkeys(("q", "k", "v", "beta", "log_decay"), "*bf16")
    scratch = {"cumulative": "*fp64", "phi": "*bf16", "reads": "*bf16"}
    common = {**inputs, **scratch, "cu_seqlens": "*i64", "T": "i32", "H": "i32", "scale": "fp32"}
    per_chunk, per_sequence = {**common, "chunks": "*i32"}, {**common, "starts": "*i64"}

    def specs(name, kernel, table, signature, constants=flags):
        for size in sorted({size for size, _ in table.entries}):
            launch = table.lookup(size, capability)
            sizes = {"DK": size, "DV": size, "BK": size, "BT": PREPARE.lookup(size, capability).blocks["BT"]}
            given = {**constants, **sizes, **launch.blocks}
            yield CompileSpec(
                f"delta_rule {name} {size}", kernel, signature, {n: given[n] for n in kernel.arg_names if n in given},
                launch.num_warps, launch.num_stages, ("H", "rows"),
            )  # fmt: skip

    yield from specs("prepare", _prepare_kernel, PREPARE, per_chunk)
    tensors = {**per_sequence, "initial_state": "*fp32", "y": "*bf16", "final_state": "*fp32"}
    constants = {**flags, "HAS_STATE": True, "HAS_FINAL": True, "KEEP": False, "states": None, "errors": None}
    yield from specs("sweep", _sweep_kernel, SWEEP, tensors, constants)
    tensors = {**per_sequence, "initial_state": "*fp32", "states": "*bf16", "errors": "*bf16"}
    constants = {**flags, "HAS_STATE": True, "HAS_FINAL": False, "KEEP": True, "y": None, "final_state": None}
    yield from specs("sweep for the backward", _sweep_kernel, SWEEP, tensors, constants)
    grads = {"dy": "*bf16", "dfinal": "*fp32", "dstates": "*bf16", "x": "*bf16", "dv": "*bf16", "dinitial": "*fp32"}
    constants = {**flags, "HAS_DFINAL": True, "HAS_STATE": True}
    yield from specs("reverse", _reverse_kernel, REVERSE, {**per_sequence, **grads}, constants)
    kept = {"dy": "*bf16", "errors": "*bf16", "x": "*bf16", "asked": "*bf16", "erased": "*bf16", "own": "*fp32"}
    yield from specs("pairs", _pairs_kernel, PAIRS, {**per_chunk, **kept, "dbeta": "*fp32"})
    grads = {"states": "*bf16", "dstates": "*bf16", "dq": "*bf16", "dk": "*bf16", "ddecay": "*fp32", "rows": "i32"}
    yield from specs("inputs", _inputs_kernel, INPUTS, {**per_chunk, **kept, **grads})
    tensors = {**inputs, "state": "*fp32", "y": "*bf16", "new_state": "*fp32", "scale": "fp32"}
    yield from specs("step", _step_kernel, STEP, tensors)
