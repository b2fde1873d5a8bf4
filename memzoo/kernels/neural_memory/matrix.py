"""Triton kernels of the neural memory of depth 1, a matrix: forward sweep, backward, and one decode step.

With A, beta, c, e and E's last row from `gates`, W and S the weights and their momentum before the chunk, B the weights that its gradients
are taken at (W, unless the call began inside the chunk), R = K B - V (or -V; + K with a residual), g = s R and N = A * (Q K^T):

    Y = beta Q W + c Q S - N g (+ Q);   W' = beta_L W + c_L S - (A[L] K)^T g;   S' = e_L S - (E[L] K)^T g
    s = theta, or with a clamp theta min(1, m / |K||R|) row by row
    backward, from dW', dS' and dY:   dg = -A[L] (K dW') - E[L] (K dS') - N^T dY;   dtheta = dg . R;   dR = s dg;   dV = -dR
    dW = beta_L dW' + Q^T (beta dY) + K^T dR;   dS = c_L dW' + e_L dS' + Q^T (c dY)
    with M = A * (dY g^T):   dQ = beta dY W^T + c dY S^T - M K (+ dY);   dK = dR B^T (+ dR) - A[L] (g dW'^T) - E[L] (g dS'^T) - M^T Q
    dA = -(dY g^T) * (Q K^T), its last row also -(g dW'^T) . K;   dE[L] = -(g dS'^T) . K;   dbeta = Q . dY W^T;   dc = Q . dY S^T, and at
    the last row dbeta += <W, dW'>, dc += <S, dW'>, de = <S, dS'>
    with a clamp, where it binds, w = -s (dg . R) / |K|^2 |R|^2:   dR += w |K|^2 R;   dK += w |R|^2 K;   dtheta = m / |K||R| (dg . R)

Kernels: `scores` (rows of a chunk a program) writes N; `sweep` (a sequence, head and tile of Dv a program) carries W and S in registers;
its chain is two products a chunk, K W and K^T g. The backward goes window by window from the last (`matrix_window`): `sweep` again, from
the window's saved state, now writing W, S and R of its chunks; `reverse` carries dW and dS back and writes them, dV and dtheta; `pairs`
writes M and dA; `inputs` (a chunk a program) the rest. A clamp needs the norm over all columns: one program then takes the tiles in turn,
with the state in memory that stays in L2 (32 D^2 bytes a chunk and pass), several times slower where few sequences and heads run.

For each token and head in bf16, Dk = Dv = D, chunk b, in brackets at D = 128, b = 64; without the mask's own 4 b written in `gates`:
    forward    12 D + 10 b bytes (2,176; compulsory 8 D = 1,024)                      10 D^2 + 4 b D operations (197 k)
    backward   30 D + 22 b + 16 D^2 / b bytes (9,344; compulsory 1,792)               26 D^2 + 14 b D (541 k)
At 4.3 TB/s and 790 TFLOP/s bytes decide: 0.51 ns forward (0.25 for the least) and 2.2 ns backward. A step moves W, S and the chunk's start
once each way, 24 D^2 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dispatch import interpreting
from ..common.launch import CompileSpec, Launch, LaunchTable, next_power_of_2
from .gates import _chunk, _chunk_of, _chunks, chunk_table

if TYPE_CHECKING:
    from .kernel import Call

SCRATCH_BYTES = 2**30  # of states held at once in the backward

# By the chunk's length, up to 64 or up to 128, then keyed by the padded larger head dimension in units of two bytes: float32 counts double.
SCORES = {
    64: LaunchTable({(256, 80): Launch(num_warps=4, num_stages=2, blocks={"BR": 64, "BK": 64})}),
    128: LaunchTable({(256, 80): Launch(num_warps=8, num_stages=2, blocks={"BR": 64, "BK": 64})}),
}
SWEEP = {
    64: LaunchTable({
        (64, 80): Launch(num_warps=4, num_stages=2, blocks={"BV": 16}),
        (64, 90): Launch(num_warps=4, num_stages=2, blocks={"BV": 32}),
        (128, 80): Launch(num_warps=4, num_stages=2, blocks={"BV": 16}),
        (128, 90): Launch(num_warps=4, num_stages=2, blocks={"BV": 32}),
        (128, 100): Launch(num_warps=8, num_stages=2, blocks={"BV": 32}),
        (256, 80): Launch(num_warps=8, num_stages=1, blocks={"BV": 16}),
    }),
    128: LaunchTable({
        (64, 80): Launch(num_warps=8, num_stages=1, blocks={"BV": 32}),
        (256, 80): Launch(num_warps=8, num_stages=1, blocks={"BV": 16}),
    }),
}  # fmt: skip
REVERSE = {
    64: LaunchTable({
        (64, 80): Launch(num_warps=4, num_stages=2, blocks={"BV": 16}),
        (64, 90): Launch(num_warps=4, num_stages=2, blocks={"BV": 32}),
        (128, 80): Launch(num_warps=4, num_stages=1, blocks={"BV": 16}),
        (128, 90): Launch(num_warps=4, num_stages=2, blocks={"BV": 32}),
        (128, 100): Launch(num_warps=8, num_stages=2, blocks={"BV": 32}),
        (256, 80): Launch(num_warps=8, num_stages=1, blocks={"BV": 16}),
    }),
    128: LaunchTable({
        (64, 80): Launch(num_warps=8, num_stages=1, blocks={"BV": 16}),
        (64, 90): Launch(num_warps=8, num_stages=1, blocks={"BV": 32}),
        (256, 80): Launch(num_warps=8, num_stages=1, blocks={"BV": 16}),
    }),
}  # fmt: skip
CLAMPED = {  # both sweeps, where one program takes the tiles of columns in turn
    64: LaunchTable({
        (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BV": 16}),
        (64, 90): Launch(num_warps=4, num_stages=1, blocks={"BV": 32}),
        (256, 80): Launch(num_warps=8, num_stages=1, blocks={"BV": 16}),
    }),
    128: LaunchTable({
        (64, 80): Launch(num_warps=8, num_stages=1, blocks={"BV": 16}),
        (256, 80): Launch(num_warps=8, num_stages=2, blocks={"BV": 16}),
    }),
}  # fmt: skip
PAIRS = {
    64: LaunchTable({(256, 80): Launch(num_warps=4, num_stages=1, blocks={"BR": 64, "BK": 32, "BV": 32})}),
    128: LaunchTable({(256, 80): Launch(num_warps=8, num_stages=1, blocks={"BR": 64, "BK": 64, "BV": 32})}),
}
INPUTS = {
    64: LaunchTable({(256, 80): Launch(num_warps=4, num_stages=1, blocks={"BK": 32, "BV": 32})}),
    128: LaunchTable({(256, 80): Launch(num_warps=8, num_stages=1, blocks={"BK": 16, "BV": 64})}),
}
STEP = LaunchTable({
    (64, 80): Launch(num_warps=2, num_stages=1, blocks={"BV": 32}),
    (128, 80): Launch(num_warps=4, num_stages=1, blocks={"BV": 32}),
})  # fmt: skip


@triton.jit
def _tile(i, head, H, column, D: tl.constexpr, front, end, BD: tl.constexpr):
    """Offsets and mask of columns [column, column + BD) of a chunk's rows i of a [.., H, D] tensor."""
    j = column + tl.arange(0, BD)
    inside = ((i >= front) & (i < end))[:, None]
    if D % BD != 0:
        inside = inside & (j < D)[None, :]
    return head * D + i[:, None] * (H * D) + j[None, :], inside


@triton.jit
def _load(x, i, row, head, H, column, D: tl.constexpr, front, end, BD: tl.constexpr):
    offsets, inside = _tile(i, head, H, column, D, front, end, BD)
    return tl.load(x + row * H * D + offsets, mask=inside, other=0.0)


@triton.jit
def _store(x, value, i, row, head, H, column, D: tl.constexpr, front, end, BD: tl.constexpr):
    offsets, inside = _tile(i, head, H, column, D, front, end, BD)
    tl.store(x + row * H * D + offsets, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _numbers(x, i, row, head, H, SIZE: tl.constexpr, which: tl.constexpr, front, end):
    """Number `which` of the SIZE that each token has, 0 where there is no token."""
    return tl.load(x + (row * H + head) * SIZE + which + i * (H * SIZE), mask=(i >= front) & (i < end), other=0.0).to(tl.float32)


@triton.jit
def _put_numbers(x, value, i, row, head, H, SIZE: tl.constexpr, which: tl.constexpr, front, end):
    tl.store(x + (row * H + head) * SIZE + which + i * (H * SIZE), value, mask=(i >= front) & (i < end))


@triton.jit
def _matrix(column, value_column, fresh, D: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Offsets and mask of a [BK, BV] tile of a matrix."""
    rows = column + (tl.arange(0, BK) ^ fresh)
    columns = value_column + tl.arange(0, BV)
    inside = (rows >= 0)[:, None]
    if D % BK != 0:
        inside = inside & (rows < D)[:, None]
    if DV % BV != 0:
        inside = inside & (columns < DV)[None, :]
    return rows[:, None] * DV + columns[None, :], inside


@triton.jit
def _only(held, condition):
    """A mask, all of it only where a condition on the whole program holds."""
    return held & (tl.zeros((1, 1), tl.int32) + condition.to(tl.int32) > 0)


@triton.jit
def _slot(n, starts, step):
    """Where sequence n's first entry stands in scratch that several sequences share."""
    if starts is not None:
        slot = tl.load(starts + n).to(tl.int64)
    else:
        slot = n.to(tl.int64) * step
    return slot


@triton.jit(do_not_specialize=["T"])
def _scores_kernel(
    q, k, mask, reads, position, cu_seqlens, chunks, T,
    H: tl.constexpr, D: tl.constexpr, HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A * (Q K^T) of BR rows of one chunk, in [B, T, H, BT]."""
    blocks: tl.constexpr = BT // BR
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % H
    number = tl.program_id(0) // (blocks * H)
    row, front, end = _chunk_of(number, position, cu_seqlens, chunks, T, BT, HAS_POSITION, VARLEN)
    if end <= front:
        return
    r = block * BR + tl.arange(0, BR)
    i = tl.arange(0, BT)
    scores = tl.zeros((BR, BT), tl.float32)
    for column in range(0, D, BK):
        query = _load(q, r, row, head, H, column, D, front, end, BK)
        key = _load(k, i, row, head, H, column, D, front, end, BK)
        scores += tl.dot(query, tl.trans(key), input_precision=PRECISION)
    scores *= _load(mask, r, row, head, H, 0, BT, front, end, BT)
    _store(reads, scores, r, row, head, H, 0, BT, front, end, BT)


@triton.jit
def _square(x, i, row, head, H, D: tl.constexpr, front, end, BT: tl.constexpr):
    """Each row's sum of squares."""
    square = tl.zeros((BT,), tl.float32)
    for column in range(0, D, 16):
        wide = _load(x, i, row, head, H, column, D, front, end, 16).to(tl.float32)
        square += tl.sum(wide * wide, 1)
    return square


@triton.jit
def _surprise(
    k, v, taken_at, i, row, head, H, column, front, end,
    D: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The loss's gradient at the output of each token, for a tile of columns, at the weights `taken_at`."""
    error = -_load(v, i, row, head, H, column, DV, front, end, BV).to(tl.float32)
    if L2:
        key = _load(k, i, row, head, H, 0, D, front, end, BK)
        if RESIDUAL:
            error += _load(k, i, row, head, H, column, D, front, end, BV).to(tl.float32)
        error += tl.dot(key, taken_at.to(key.dtype), input_precision=PRECISION)
    return error


@triton.jit
def _read(
    memory, momentum, error, rate, q, scalars, reads, y, i, row, head, H, column, front, end,
    D: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, a tile of columns."""
    query = _load(q, i, row, head, H, 0, D, front, end, BK)
    carried = _numbers(scalars, i, row, head, H, 4, 1, front, end)
    output = tl.dot(query, momentum.to(query.dtype), input_precision=PRECISION) * carried[:, None]
    kept = _numbers(scalars, i, row, head, H, 4, 0, front, end)
    output += tl.dot(query, memory.to(query.dtype), input_precision=PRECISION) * kept[:, None]
    read = _load(reads, i, row, head, H, 0, BT, front, end, BT)
    output -= tl.dot(read, (rate[:, None] * error).to(query.dtype), input_precision=PRECISION)
    if RESIDUAL:
        output += _load(q, i, row, head, H, column, D, front, end, BV).to(tl.float32)
    _store(y, output, i, row, head, H, column, DV, front, end, BV)


@triton.jit
def _advance(
    memory, momentum, error, rate, k, mask, scalars, saved_weights, saved_momentum, states, momenta, slot, save,
    i, row, head, H, column, front, end, opens, fresh,
    D: tl.constexpr, DV: tl.constexpr, KEEP: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Weights and momentum after one chunk, a tile of columns; those before it go where KEEP and SAVE say."""
    where, held = _matrix(0, column, fresh, D, DV, BK, BV)
    if SAVE:
        at = save * (2 * D * DV)
        tl.store(saved_weights + at + where, memory, mask=_only(held, opens > 0))
        tl.store(saved_momentum + at + where, momentum, mask=_only(held, opens > 0))
    kind = k.dtype.element_ty
    if KEEP:
        at = slot * (D * DV)
        tl.store(states + at + where, memory.to(kind), mask=held)
        tl.store(momenta + at + where, momentum.to(kind), mask=held)
    write = rate[:, None] * error
    key = _load(k, i, row, head, H, 0, D, front, end, BK)
    last = (row + end - 1) * H + head
    memory = tl.load(scalars + last * 4) * memory + tl.load(scalars + last * 4 + 1) * momentum
    momentum *= tl.load(scalars + last * 4 + 2)
    to_weights = -tl.load(mask + last * BT + i).to(tl.float32)
    memory += tl.dot(tl.trans(key), (to_weights[:, None] * write).to(kind), input_precision=PRECISION)
    to_momentum = -_numbers(scalars, i, row, head, H, 4, 3, front, end)
    momentum += tl.dot(tl.trans(key), (to_momentum[:, None] * write).to(kind), input_precision=PRECISION)
    return memory, momentum


@triton.jit(do_not_specialize=["T", "begin", "window", "origin_step", "origin_offset", "origin_width", "save_step"])
def _sweep_kernel(
    q, k, v, lr, mask, scalars, reads, weights, momenta_before, start, position, y, final_weights, final_momentum, final_start,
    saved_weights, saved_momentum, states, momenta, errors, strength, cu_seqlens, origins, slots, saves,
    T, begin, window, origin_step, origin_offset, origin_width, save_step, max_norm,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr, KEEP: tl.constexpr,
    SAVE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_FINAL: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Chunks of one sequence and head: outputs and the last state; or (KEEP) of one window, states and errors.

    A program carries a tile of Dv's columns in registers. With a clamp it takes all tiles, chunk after chunk, since a token's norm is over
    all of them; the state is then held in final_weights and final_momentum (scratch, unless HAS_FINAL) from chunk to chunk. SAVE: the state
    at each window's start but the first goes to saved_*.
    """
    tiles: tl.constexpr = (DV + BV - 1) // BV
    own_tiles: tl.constexpr = tiles if CLAMP else 1
    column = (tl.program_id(0) * own_tiles) % tiles * BV
    number = tl.program_id(0) * own_tiles // tiles
    head = number % H
    n = number // H
    count = _chunks(n, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
    stop = count
    if KEEP:
        stop = tl.minimum(count, begin + window)
        if begin >= count:
            return
    slot = _slot(n, slots, window)
    save = _slot(n, saves, save_step)
    origin = ((_slot(n, origins, origin_step) + origin_offset) * H + head) * origin_width * (D * DV)
    base = number.to(tl.int64) * (D * DV)
    memory = tl.zeros((BK, BV), tl.float32)
    momentum = tl.zeros((BK, BV), tl.float32)
    for tile in range(own_tiles):
        where, held = _matrix(0, column + tile * BV, tile >> 31, D, DV, BK, BV)
        memory = tl.load(weights + origin + where, mask=held, other=0.0).to(tl.float32)
        if HAS_MOMENTUM:
            momentum = tl.load(momenta_before + origin + where, mask=held, other=0.0)
        if CLAMP:
            tl.store(final_weights + base + where, memory, mask=held)
            tl.store(final_momentum + base + where, momentum, mask=held)
    for step in range(stop - begin):
        c = begin + step
        row, front, end = _chunk(n, c, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
        # Always 0, but not to the compiler, which would otherwise hold every address of a chunk in registers throughout.
        fresh = c >> 31
        i = tl.arange(0, BT) ^ fresh
        rate = _numbers(lr, i, row, head, H, 1, 0, front, end)
        state_at = (slot + c - begin) * H + head
        save_at = (save + c // window - 1) * H + head
        opens = tl.where(c % window == 0, c, 0)  # not 0 where a window but the first opens
        if CLAMP:
            source = final_weights
            if HAS_POSITION:
                source = tl.where(front > 0, start, final_weights)
            tl.debug_barrier()
            square = tl.zeros((BT,), tl.float32)
            for tile in range(own_tiles):
                fresh = (c + tile) >> 31
                i = tl.arange(0, BT) ^ fresh
                where, held = _matrix(0, tile * BV, fresh, D, DV, BK, BV)
                taken_at = tl.load(source + base + where, mask=held, other=0.0)
                error = _surprise(
                    k, v, taken_at, i, row, head, H, tile * BV, front, end, D, DV, RESIDUAL, L2, PRECISION, BK, BV
                )  # fmt: skip
                square += tl.sum(error * error, 1)
                if HAS_FINAL:
                    tl.store(final_start + base + where, taken_at, mask=_only(held, (count - 1 == c) & (end < BT)))
                _store(errors, error, i, row, head, H, tile * BV, DV, front, end, BV)
            square *= _square(k, i, row, head, H, D, front, end, BT)
            rate *= max_norm * tl.rsqrt(tl.maximum(square, max_norm * max_norm))
            if KEEP:
                _put_numbers(strength, rate, i, row, head, H, 1, 0, front, end)
            tl.debug_barrier()
            if not KEEP:
                for tile in range(own_tiles):
                    fresh = (c + tile) >> 31
                    i = tl.arange(0, BT) ^ fresh
                    where, held = _matrix(0, tile * BV, fresh, D, DV, BK, BV)
                    held_weights = tl.load(final_weights + base + where, mask=held, other=0.0)
                    held_momentum = tl.load(final_momentum + base + where, mask=held, other=0.0)
                    error = _load(errors, i, row, head, H, tile * BV, DV, front, end, BV).to(tl.float32)
                    _read(
                        held_weights, held_momentum, error, rate, q, scalars, reads, y, i, row, head, H, tile * BV, front, end,
                        D, DV, RESIDUAL, PRECISION, BT, BK, BV,
                    )  # fmt: skip
            for tile in range(own_tiles):
                fresh = (c + tile) >> 31
                i = tl.arange(0, BT) ^ fresh
                where, held = _matrix(0, tile * BV, fresh, D, DV, BK, BV)
                held_weights = tl.load(final_weights + base + where, mask=held, other=0.0)
                held_momentum = tl.load(final_momentum + base + where, mask=held, other=0.0)
                error = _load(errors, i, row, head, H, tile * BV, DV, front, end, BV).to(tl.float32)
                new_weights, new_momentum = _advance(
                    held_weights, held_momentum, error, rate, k, mask, scalars, saved_weights, saved_momentum, states, momenta,
                    state_at, save_at, i, row, head, H, tile * BV, front, end, opens, fresh,
                    D, DV, KEEP, SAVE, PRECISION, BT, BK, BV,
                )  # fmt: skip
                tl.debug_barrier()
                tl.store(final_weights + base + where, new_weights, mask=held)
                tl.store(final_momentum + base + where, new_momentum, mask=held)
        else:
            taken_at = memory
            where, held = _matrix(0, column, fresh, D, DV, BK, BV)
            if HAS_POSITION:
                opened = tl.load(start + base + where, mask=_only(held, front > 0), other=0.0)
                taken_at = tl.where(front > 0, opened, memory)
            if HAS_FINAL:  # of a chunk that stays open, the weights at its start
                tl.store(final_start + base + where, taken_at, mask=_only(held, (count - 1 == c) & (end < BT)))
            error = _surprise(k, v, taken_at, i, row, head, H, column, front, end, D, DV, RESIDUAL, L2, PRECISION, BK, BV)
            if KEEP:
                _store(errors, error, i, row, head, H, column, DV, front, end, BV)
            else:
                _read(
                    memory, momentum, error, rate, q, scalars, reads, y, i, row, head, H, column, front, end,
                    D, DV, RESIDUAL, PRECISION, BT, BK, BV,
                )  # fmt: skip
            memory, momentum = _advance(
                memory, momentum, error, rate, k, mask, scalars, saved_weights, saved_momentum, states, momenta,
                state_at, save_at, i, row, head, H, column, front, end, opens, fresh,
                D, DV, KEEP, SAVE, PRECISION, BT, BK, BV,
            )  # fmt: skip
    if HAS_FINAL:
        if CLAMP:
            tl.debug_barrier()
        _unused, front, filled = _chunk(n, tl.maximum(count - 1, 0), position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
        for tile in range(own_tiles):
            where, held = _matrix(0, column + tile * BV, tile >> 31, D, DV, BK, BV)
            if CLAMP:
                memory = tl.load(final_weights + base + where, mask=held, other=0.0)
            else:
                tl.store(final_weights + base + where, memory, mask=held)
                tl.store(final_momentum + base + where, momentum, mask=held)
            tl.store(final_start + base + where, memory, mask=_only(held, filled % BT == 0))
            if HAS_POSITION:
                idle = _only(held, (count == 0) & (front > 0))
                tl.store(final_start + base + where, tl.load(start + base + where, mask=idle, other=0.0), mask=idle)


@triton.jit
def _output_grad(
    k, mask, scalars, reads, dy, after, after_momentum, i, row, head, H, column, front, end,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of each token's write, a tile of columns."""
    kind = k.dtype.element_ty
    key = _load(k, i, row, head, H, 0, D, front, end, BK)
    to_weights = -tl.load(mask + ((row + end - 1) * H + head) * BT + i).to(tl.float32)
    grad = tl.dot(key, after.to(kind), input_precision=PRECISION) * to_weights[:, None]
    to_momentum = _numbers(scalars, i, row, head, H, 4, 3, front, end)
    grad -= tl.dot(key, after_momentum.to(kind), input_precision=PRECISION) * to_momentum[:, None]
    read = _load(reads, i, row, head, H, 0, BT, front, end, BT)
    given = _load(dy, i, row, head, H, column, DV, front, end, BV)
    return grad - tl.dot(tl.trans(read), given, input_precision=PRECISION)


@triton.jit
def _retreat(
    dmemory, dmomentum, grad, q, k, scalars, dy, given_start, dstart, dstates, dmomenta, dv, number, slot,
    i, row, head, H, column, front, end, last_chunk,
    D: tl.constexpr, DV: tl.constexpr, L2: tl.constexpr, HAS_POSITION: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, fresh,
):  # fmt: skip
    """From the gradient at the outputs of a chunk's writes, a tile: dv, and the gradients of the state before the chunk."""
    kind = k.dtype.element_ty
    where, held = _matrix(0, column, fresh, D, DV, BK, BV)
    at = slot * (D * DV)
    tl.store(dstates + at + where, dmemory.to(kind), mask=held)
    tl.store(dmomenta + at + where, dmomentum.to(kind), mask=held)
    _store(dv, -grad, i, row, head, H, column, DV, front, end, BV)
    last = ((row + end - 1) * H + head) * 4
    dmomentum = tl.load(scalars + last + 1) * dmemory + tl.load(scalars + last + 2) * dmomentum
    dmemory *= tl.load(scalars + last)
    query = _load(q, i, row, head, H, 0, D, front, end, BK)
    given = _load(dy, i, row, head, H, column, DV, front, end, BV).to(tl.float32)
    kept = _numbers(scalars, i, row, head, H, 4, 0, front, end)
    dmemory += tl.dot(tl.trans(query), (kept[:, None] * given).to(kind), input_precision=PRECISION)
    carried = _numbers(scalars, i, row, head, H, 4, 1, front, end)
    dmomentum += tl.dot(tl.trans(query), (carried[:, None] * given).to(kind), input_precision=PRECISION)
    # What the gradients were taken at: the state's `start` if the chunk was open when the call began, else the weights.
    if L2:
        key = _load(k, i, row, head, H, 0, D, front, end, BK)
        dbase = tl.dot(tl.trans(key), grad.to(kind), input_precision=PRECISION)
    else:
        dbase = tl.zeros((BK, BV), tl.float32)
    base = number.to(tl.int64) * (D * DV)
    if given_start is not None:
        dbase += tl.load(given_start + base + where, mask=_only(held, last_chunk & (end < BT)), other=0.0)
    if HAS_POSITION:
        tl.store(dstart + base + where, dbase, mask=_only(held, front > 0))
        dbase = tl.where(front > 0, 0.0, dbase)
    return dmemory + dbase, dmomentum


@triton.jit(do_not_specialize=["T", "begin", "window", "tokens"])
def _reverse_kernel(
    q, k, lr, strength, mask, scalars, reads, position, dy, errors, given_weights, given_momentum, given_start,
    dweights, dmomentum, dstart, dstates, dmomenta, dv, dlr, curvature, cu_seqlens, slots, T, begin, window, tokens, max_norm,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr, CONTINUES: tl.constexpr,
    HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Chunks of one window, sequence and head from the last: the gradients of the state after each, of v and of lr.

    Tiles as in the sweep. The state's gradient comes from given_*, or (CONTINUES) from the window after this one, and ends in dweights,
    dmomentum, dstart. dlr is a tile's share, [tiles, B, T, H]; `curvature` is what a clamped token's key has in its gradient, over the key.
    """
    tiles: tl.constexpr = (DV + BV - 1) // BV
    own_tiles: tl.constexpr = tiles if CLAMP else 1
    first_tile = (tl.program_id(0) * own_tiles) % tiles
    column = first_tile * BV
    number = tl.program_id(0) * own_tiles // tiles
    head = number % H
    n = number // H
    count = _chunks(n, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
    stop = tl.minimum(count, begin + window)
    if CONTINUES:  # noqa: SIM102  known when it is compiled
        if begin >= count:
            return
    base = number.to(tl.int64) * (D * DV)
    left = tl.zeros((BK, BV), tl.float32)
    left_momentum = tl.zeros((BK, BV), tl.float32)
    for tile in range(own_tiles):
        where, held = _matrix(0, column + tile * BV, tile >> 31, D, DV, BK, BV)
        if CONTINUES:
            if not CLAMP:
                left = tl.load(dweights + base + where, mask=held, other=0.0)
                left_momentum = tl.load(dmomentum + base + where, mask=held, other=0.0)
        elif given_start is not None:
            left = tl.load(given_weights + base + where, mask=held, other=0.0)
            left_momentum = tl.load(given_momentum + base + where, mask=held, other=0.0)
            # With no chunk open, the weights themselves were given out as the start of the next.
            _unused, front, filled = _chunk(n, tl.maximum(count - 1, 0), position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
            left += tl.load(given_start + base + where, mask=_only(held, filled % BT == 0), other=0.0)
            if HAS_POSITION:
                idle = _only(held, (count == 0) & (front > 0))
                tl.store(dstart + base + where, tl.load(given_start + base + where, mask=idle, other=0.0), mask=idle)
        if CLAMP and not CONTINUES:
            tl.store(dweights + base + where, left, mask=held)
            tl.store(dmomentum + base + where, left_momentum, mask=held)
    slot = _slot(n, slots, window)
    for step in range(stop - begin):
        c = stop - 1 - step
        row, front, end = _chunk(n, c, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
        fresh = c >> 31
        i = tl.arange(0, BT) ^ fresh
        state_at = (slot + c - begin) * H + head
        if CLAMP:
            tl.debug_barrier()
            slope = tl.zeros((BT,), tl.float32)
            error_square = tl.zeros((BT,), tl.float32)
            for tile in range(own_tiles):
                fresh = (c + tile) >> 31
                i = tl.arange(0, BT) ^ fresh
                where, held = _matrix(0, tile * BV, fresh, D, DV, BK, BV)
                after = tl.load(dweights + base + where, mask=held, other=0.0)
                after_momentum = tl.load(dmomentum + base + where, mask=held, other=0.0)
                grad = _output_grad(
                    k, mask, scalars, reads, dy, after, after_momentum, i, row, head, H, tile * BV, front, end,
                    D, DV, PRECISION, BT, BK, BV,
                )  # fmt: skip
                error = _load(errors, i, row, head, H, tile * BV, DV, front, end, BV).to(tl.float32)
                slope += tl.sum(grad * error, 1)
                error_square += tl.sum(error * error, 1)
            rate = _numbers(strength, i, row, head, H, 1, 0, front, end)
            key_square = _square(k, i, row, head, H, D, front, end, BT)
            most = max_norm * max_norm
            square = tl.maximum(key_square * error_square, most)
            turn = tl.where(key_square * error_square > most, -rate * slope / square, 0.0)
            _put_numbers(dlr, slope * max_norm * tl.rsqrt(square), i, row, head, H, 1, 0, front, end)
            _put_numbers(curvature, turn * error_square, i, row, head, H, 1, 0, front, end)
            tl.debug_barrier()
            for tile in range(own_tiles):
                fresh = (c + tile) >> 31
                i = tl.arange(0, BT) ^ fresh
                where, held = _matrix(0, tile * BV, fresh, D, DV, BK, BV)
                after = tl.load(dweights + base + where, mask=held, other=0.0)
                after_momentum = tl.load(dmomentum + base + where, mask=held, other=0.0)
                grad = _output_grad(
                    k, mask, scalars, reads, dy, after, after_momentum, i, row, head, H, tile * BV, front, end,
                    D, DV, PRECISION, BT, BK, BV,
                )  # fmt: skip
                error = _load(errors, i, row, head, H, tile * BV, DV, front, end, BV).to(tl.float32)
                grad = rate[:, None] * grad + (turn * key_square)[:, None] * error
                tl.debug_barrier()  # keeps what follows out of the registers until then
                after = tl.load(dweights + base + where, mask=held, other=0.0)
                after_momentum = tl.load(dmomentum + base + where, mask=held, other=0.0)
                before, before_momentum = _retreat(
                    after, after_momentum, grad, q, k, scalars, dy, given_start, dstart, dstates, dmomenta, dv, number, state_at,
                    i, row, head, H, tile * BV, front, end, count - 1 == c,
                    D, DV, L2, HAS_POSITION, PRECISION, BT, BK, BV, fresh,
                )  # fmt: skip
                tl.debug_barrier()
                tl.store(dweights + base + where, before, mask=held)
                tl.store(dmomentum + base + where, before_momentum, mask=held)
        else:
            grad = _output_grad(
                k, mask, scalars, reads, dy, left, left_momentum, i, row, head, H, column, front, end,
                D, DV, PRECISION, BT, BK, BV,
            )  # fmt: skip
            error = _load(errors, i, row, head, H, column, DV, front, end, BV).to(tl.float32)
            slope = tl.sum(grad * error, 1)
            _put_numbers(dlr, slope, i, first_tile.to(tl.int64) * tokens + row, head, H, 1, 0, front, end)
            grad *= _numbers(lr, i, row, head, H, 1, 0, front, end)[:, None]
            left, left_momentum = _retreat(
                left, left_momentum, grad, q, k, scalars, dy, given_start, dstart, dstates, dmomenta, dv, number, state_at,
                i, row, head, H, column, front, end, count - 1 == c,
                D, DV, L2, HAS_POSITION, PRECISION, BT, BK, BV, fresh,
            )  # fmt: skip
    if not CLAMP:
        where, held = _matrix(0, column, 0, D, DV, BK, BV)
        tl.store(dweights + base + where, left, mask=held)
        tl.store(dmomentum + base + where, left_momentum, mask=held)


@triton.jit
def _place(
    number, chunks, position, cu_seqlens, T, begin, window, BT: tl.constexpr, HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr
):
    """(sequence, its row of place 0, front, end) of the chunk in slot `number` of a window; end <= front if there is none."""
    if VARLEN:
        n = tl.load(chunks + number * 2)
        c = tl.load(chunks + number * 2 + 1)
    else:
        n = number // window
        c = begin + number % window
    row, front, end = _chunk(tl.maximum(n, 0), c, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
    return n, row, front, tl.where(n < 0, 0, end)


@triton.jit(do_not_specialize=["T", "begin", "window"])
def _pairs_kernel(
    q, k, lr, mask, position, dy, errors, matched, dmask, cu_seqlens, chunks, T, begin, window,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of BR rows of one chunk: `A * (dY g^T)`, in [B, T, H, BT], and the mask's gradient from the reads, `-(dY g^T) * (Q K^T)`."""
    blocks: tl.constexpr = BT // BR
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % H
    number = tl.program_id(0) // (blocks * H)
    _n, row, front, end = _place(number, chunks, position, cu_seqlens, T, begin, window, BT, HAS_POSITION, VARLEN)
    if end <= front:
        return
    r = block * BR + tl.arange(0, BR)
    i = tl.arange(0, BT)
    kind = k.dtype.element_ty
    rate = _numbers(lr, i, row, head, H, 1, 0, front, end)[:, None]  # the clamped one, if there is a clamp
    match = tl.zeros((BR, BT), tl.float32)
    for column in range(0, DV, BV):
        given = _load(dy, r, row, head, H, column, DV, front, end, BV)
        write = (rate * _load(errors, i, row, head, H, column, DV, front, end, BV).to(tl.float32)).to(kind)
        match += tl.dot(given, tl.trans(write), input_precision=PRECISION)
    weight = _load(mask, r, row, head, H, 0, BT, front, end, BT).to(tl.float32)
    _store(matched, match * weight, r, row, head, H, 0, BT, front, end, BT)
    scores = tl.zeros((BR, BT), tl.float32)
    for column in range(0, D, BK):
        query = _load(q, r, row, head, H, column, D, front, end, BK)
        key = _load(k, i, row, head, H, column, D, front, end, BK)
        scores += tl.dot(query, tl.trans(key), input_precision=PRECISION)
    _store(dmask, tl.where(r[:, None] >= i[None, :], -scores * match, 0.0), r, row, head, H, 0, BT, front, end, BT)


@triton.jit(do_not_specialize=["T", "begin", "window"])
def _inputs_kernel(
    q, k, lr, mask, scalars, start, position, dy, errors, dv, curvature, matched, states, momenta, dstates, dmomenta,
    dq, dk, dmask, dscalars, cu_seqlens, chunks, T, begin, window,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr,
    HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: the gradients of q, k, the scalars, and the mask's last row, whose share from the reads is there already."""
    head = tl.program_id(0) % H
    number = tl.program_id(0) // H
    n, row, front, end = _place(number, chunks, position, cu_seqlens, T, begin, window, BT, HAS_POSITION, VARLEN)
    if end <= front:
        return
    kind = k.dtype.element_ty
    at = (number.to(tl.int64) * H + head) * (D * DV)
    base = (n.to(tl.int64) * H + head) * (D * DV)
    dkept = tl.zeros((BT,), tl.float32)
    dcarried = tl.zeros((BT,), tl.float32)
    dto_weights = tl.zeros((BT,), tl.float32)
    dto_momentum = tl.zeros((BT,), tl.float32)
    state_after = tl.zeros((BK,), tl.float32)
    momentum_after = tl.zeros((BK,), tl.float32)
    momentum_twice = tl.zeros((BK,), tl.float32)
    for column in range(0, D, BK):
        by_state = tl.zeros((BT, BK), tl.float32)
        by_momentum = tl.zeros((BT, BK), tl.float32)
        into_state = tl.zeros((BT, BK), tl.float32)
        into_momentum = tl.zeros((BT, BK), tl.float32)
        by_base = tl.zeros((BT, BK), tl.float32)
        for value_column in range(0, DV, BV):
            fresh = value_column >> 31
            i = tl.arange(0, BT) ^ fresh
            where, held = _matrix(column, value_column, fresh, D, DV, BK, BV)
            given = _load(dy, i, row, head, H, value_column, DV, front, end, BV)
            state = tl.load(states + at + where, mask=held, other=0.0)
            momentum = tl.load(momenta + at + where, mask=held, other=0.0)
            by_state += tl.dot(given, tl.trans(state), input_precision=PRECISION)
            by_momentum += tl.dot(given, tl.trans(momentum), input_precision=PRECISION)
            rate = _numbers(lr, i, row, head, H, 1, 0, front, end)[:, None]  # the clamped one, if there is a clamp
            write = (rate * _load(errors, i, row, head, H, value_column, DV, front, end, BV).to(tl.float32)).to(kind)
            after = tl.load(dstates + at + where, mask=held, other=0.0)
            after_momentum = tl.load(dmomenta + at + where, mask=held, other=0.0)
            into_state += tl.dot(write, tl.trans(after), input_precision=PRECISION)
            into_momentum += tl.dot(write, tl.trans(after_momentum), input_precision=PRECISION)
            state_after += tl.sum(state.to(tl.float32) * after.to(tl.float32), 1)
            momentum_after += tl.sum(momentum.to(tl.float32) * after.to(tl.float32), 1)
            momentum_twice += tl.sum(momentum.to(tl.float32) * after_momentum.to(tl.float32), 1)
            if L2:
                taken_at = state
                if HAS_POSITION:
                    opened = tl.load(start + base + where, mask=_only(held, front > 0), other=0.0)
                    taken_at = tl.where(front > 0, opened.to(kind), taken_at)
                grad = _load(dv, i, row, head, H, value_column, DV, front, end, BV)
                by_base += tl.dot(grad, tl.trans(taken_at), input_precision=PRECISION)
        i = tl.arange(0, BT) ^ (column >> 31)
        query = _load(q, i, row, head, H, column, D, front, end, BK)
        key = _load(k, i, row, head, H, column, D, front, end, BK)
        match = _load(matched, i, row, head, H, 0, BT, front, end, BT)
        wide_query = query.to(tl.float32)
        dkept += tl.sum(wide_query * by_state, 1)
        dcarried += tl.sum(wide_query * by_momentum, 1)
        kept = _numbers(scalars, i, row, head, H, 4, 0, front, end)
        carried = _numbers(scalars, i, row, head, H, 4, 1, front, end)
        grad_q = kept[:, None] * by_state + carried[:, None] * by_momentum
        grad_q -= tl.dot(match, key, input_precision=PRECISION)
        if RESIDUAL:
            grad_q += _load(dy, i, row, head, H, column, D, front, end, BK).to(tl.float32)
        _store(dq, grad_q, i, row, head, H, column, D, front, end, BK)
        wide_key = key.to(tl.float32)
        dto_weights += tl.sum(wide_key * into_state, 1)
        dto_momentum += tl.sum(wide_key * into_momentum, 1)
        to_weights = tl.load(mask + ((row + end - 1) * H + head) * BT + i).to(tl.float32)
        to_momentum = _numbers(scalars, i, row, head, H, 4, 3, front, end)
        grad_k = -to_weights[:, None] * into_state - to_momentum[:, None] * into_momentum - by_base
        grad_k -= tl.dot(tl.trans(match), query, input_precision=PRECISION)
        if CLAMP:
            grad_k += _numbers(curvature, i, row, head, H, 1, 0, front, end)[:, None] * wide_key
        if RESIDUAL and L2:
            grad_k -= _load(dv, i, row, head, H, column, D, front, end, BK).to(tl.float32)
        _store(dk, grad_k, i, row, head, H, column, D, front, end, BK)
    i = tl.arange(0, BT)
    last_row = dmask + ((row + end - 1) * H + head) * BT + i
    tl.store(last_row, tl.load(last_row) - dto_weights)
    at_end = i == end - 1
    _put_numbers(dscalars, dkept + tl.where(at_end, tl.sum(state_after, 0), 0.0), i, row, head, H, 4, 0, front, end)
    _put_numbers(dscalars, dcarried + tl.where(at_end, tl.sum(momentum_after, 0), 0.0), i, row, head, H, 4, 1, front, end)
    _put_numbers(dscalars, tl.where(at_end, tl.sum(momentum_twice, 0), 0.0), i, row, head, H, 4, 2, front, end)
    _put_numbers(dscalars, -dto_momentum, i, row, head, H, 4, 3, front, end)


@triton.jit
def _error(
    k, v, number, key, weights, start, place, base, where, held, column,
    D: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient at the output of one token, for a tile of columns."""
    j = column + tl.arange(0, BV)
    error = -tl.load(v + number * DV + j, mask=j < DV, other=0.0).to(tl.float32)
    if L2:
        taken_at = tl.load(weights + base + where, mask=_only(held, place == 0), other=0.0)
        taken_at += tl.load(start + base + where, mask=_only(held, place != 0), other=0.0)
        error += tl.sum(key[:, None] * taken_at, 0)
        if RESIDUAL:
            error += tl.load(k + number * D + j, mask=j < D, other=0.0).to(tl.float32)
    return error


@triton.jit
def _step_kernel(
    q, k, v, lr, momentum_gate, decay, weights, momentum, start, position, y, new_weights, new_momentum, new_start, H, max_norm,
    D: tl.constexpr, DV: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr, CLAMP: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one sequence, head and tile of Dv: the state is read once and written once."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    tile = tl.program_id(0) % tiles
    number = (tl.program_id(0) // tiles).to(tl.int64)
    base = number * (D * DV)
    place = tl.load(position + number // H)
    i = tl.arange(0, BK)
    key = tl.load(k + number * D + i, mask=i < D, other=0.0).to(tl.float32)
    query = tl.load(q + number * D + i, mask=i < D, other=0.0).to(tl.float32)
    rate = tl.load(lr + number).to(tl.float32)
    if CLAMP:
        # The norm needs every column: the other tiles' share is formed again rather than waited for.
        square = tl.sum(tl.zeros((BV,), tl.float32), 0)
        for other in range(tiles):
            where, held = _matrix(0, other * BV, 0, D, DV, BK, BV)
            error = _error(k, v, number, key, weights, start, place, base, where, held, other * BV, D, DV, RESIDUAL, L2, BV)
            square += tl.sum(error * error, 0)
        square *= tl.sum(key * key, 0)
        rate *= max_norm * tl.rsqrt(tl.maximum(square, max_norm * max_norm))
    column = tile * BV
    j = column + tl.arange(0, BV)
    where, held = _matrix(0, column, 0, D, DV, BK, BV)
    error = _error(k, v, number, key, weights, start, place, base, where, held, column, D, DV, RESIDUAL, L2, BV)
    memory = tl.load(weights + base + where, mask=held, other=0.0)
    surprise = tl.load(momentum_gate + number).to(tl.float32) * tl.load(momentum + base + where, mask=held, other=0.0)
    surprise -= key[:, None] * (rate * error)[None, :]
    tl.store(new_momentum + base + where, surprise, mask=held)
    written = (1.0 - tl.load(decay + number).to(tl.float32)) * memory + surprise
    tl.store(new_weights + base + where, written, mask=held)
    output = tl.sum(query[:, None] * written, 0)
    if RESIDUAL:
        output += tl.load(q + number * D + j, mask=j < D, other=0.0).to(tl.float32)
    tl.store(y + number * DV + j, output.to(y.dtype.element_ty), mask=j < DV)
    kept = tl.load(start + base + where, mask=_only(held, place != 0), other=0.0)
    opened = tl.where(place == BT - 1, written, tl.where(place == 0, memory, kept))  # the chunk's own weights once it closes
    tl.store(new_start + base + where, opened, mask=held)


def matrix_window(q: Tensor, weights: Tensor, sequences: int, opened: int, packed: bool, chunk_size: int) -> int:
    """Chunks of a sequence whose states are held at once: what SCRATCH_BYTES allow, and at least the square root of their number.

    Fewer windows mean fewer launches; the square root is where boundaries and scratch together are smallest. `opened` is how many places
    of a first chunk may be taken already.
    """
    length, heads = q.shape[1:3]
    longest = triton.cdiv(length + opened, chunk_size)
    fit = SCRATCH_BYTES // (4 * heads * weights.shape[-2] * weights.shape[-1] * q.element_size())
    if _most_chunks(sequences, length, longest, opened, packed, chunk_size) <= fit:
        return longest
    return min(longest, max(math.isqrt(longest - 1) + 1, fit // sequences))


def _most_chunks(sequences: int, length: int, longest: int, opened: int, packed: bool, chunk_size: int) -> int:
    """A bound on the number of chunks in one call."""
    if not packed:
        return sequences * longest
    return min(sequences * longest, (length + sequences * (opened + chunk_size - 1)) // chunk_size)


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))


class _Launches:
    """What every launch of one call shares: options, and which chunks the windows hold."""

    def __init__(self, call: Call, mask: Tensor, scalars: Tensor):
        self.call, self.mask, self.scalars = call, mask, scalars
        self.clamped = call.max_grad_norm is not None
        self.max_norm = call.max_grad_norm or 0.0
        opened = 0 if call.position is None else call.chunk - 1  # places of a first chunk that may be taken already
        self.longest = triton.cdiv(call.length + opened, call.chunk)
        self.windows = triton.cdiv(self.longest, call.every)
        packed = call.cu_seqlens is not None
        most = _most_chunks(call.sequences, call.length, self.longest, opened, packed, call.chunk)
        self.slots = min(call.sequences * call.every, most)  # states of one window
        self.chunks = None
        if packed:
            lengths = (call.cu_seqlens[1:] - call.cu_seqlens[:-1]).long()
            places = lengths if call.position is None else lengths + call.position
            self.chunks = torch.where(lengths > 0, (places + call.chunk - 1) // call.chunk, 0)
        self.momentum = None if call.state_momentum is None else call.state_momentum[0]
        self.start = None if call.state_start is None else call.state_start[0]
        self.reads = mask.new_empty(mask.shape, dtype=call.q.dtype)
        table, programs = None, call.batch * self.longest
        if call.cu_seqlens is not None:
            table = chunk_table(call.position, call.cu_seqlens, call.length, call.chunk)
            programs = table.shape[0]
        options, _ = self.options(SCORES, "D")
        _scores_kernel[(programs * call.heads * (call.chunk // options["BR"]),)](
            call.q, call.k, mask, self.reads, call.position, call.cu_seqlens, table, call.length, **options
        )  # fmt: skip

    def options(self, tables: dict[int, LaunchTable], *names: str) -> tuple[dict[str, object], int]:
        """(options, tiles of Dv) of a kernel: the named flags and its table's entry, tiles no larger than what they cut."""
        call = self.call
        dim, value_dim = _padded(call.dim), _padded(call.value_dim)
        # float32 takes twice the room of what the tables are made for.
        size = max(dim, value_dim) * (2 if call.q.dtype == torch.float32 and not interpreting() else 1)
        launch = tables[64 if call.chunk <= 64 else 128].lookup(size, call.capability)
        most = {"BK": dim, "BV": value_dim, "BR": call.chunk}
        blocks = {"BK": dim, **{name: min(block, most[name]) for name, block in launch.blocks.items()}}
        flags = {
            "D": call.dim, "DV": call.value_dim, "RESIDUAL": call.residual, "L2": call.loss == "l2", "CLAMP": self.clamped,
        }  # fmt: skip
        flags = {name: flags[name] for name in names}
        flags |= {"HAS_POSITION": call.position is not None, "VARLEN": call.cu_seqlens is not None}
        flags |= {"PRECISION": call.precision, "BT": call.chunk, "H": call.heads}
        return {**flags, **launch.options(), **blocks}, triton.cdiv(call.value_dim, blocks.get("BV", value_dim))

    def window(self, u: int) -> tuple[Tensor | None, Tensor | None]:
        """(each sequence's first slot, the (sequence, chunk) of each slot, -1 where idle) of window u; None unless packed."""
        if self.chunks is None:
            return None, None
        count, every = self.call.sequences, self.call.every
        local = (self.chunks - u * every).clamp(0, every)
        ends = local.cumsum(0)
        slots = torch.arange(self.slots, device=ends.device)
        sequence = torch.searchsorted(ends, slots, right=True)
        inside = sequence < count
        chunk = slots - (ends - local)[sequence.clamp(max=count - 1)] + u * every
        return ends - local, torch.stack((torch.where(inside, sequence, -1), torch.where(inside, chunk, 0)), 1).to(torch.int32)

    def sweep(self, y, final, boundaries, kept, u, slots) -> None:
        """The whole forward, or with `kept` (states, momenta, errors and clamped rates) those of window u again."""
        call = self.call
        options, tiles = self.options(CLAMPED if self.clamped else SWEEP, "D", "DV", "RESIDUAL", "L2", "CLAMP")
        tiles = 1 if self.clamped else tiles
        halves, saves = (None, None), None
        if boundaries is not None and boundaries.numel():
            halves = boundaries.view(*boundaries.shape[:2], 2, -1).unbind(2)
            saves = None if call.cu_seqlens is None else call.slot_starts()
        given, origin = (call.weights[0], self.momentum), (int(call.position is not None), 0, 1)
        if u:
            given, origin = halves, (self.windows - 1, u - 1, 2)
        saved = (None, None) if kept else halves
        held = final or (None,) * 3
        if self.clamped and final is None:
            shape = (call.sequences, call.heads, call.dim, call.value_dim)
            held = (*(call.q.new_empty(shape, dtype=torch.float32) for _ in range(2)), None)
        stores = kept or (None, None, torch.empty_like(call.v) if self.clamped else None, None)
        _sweep_kernel[(call.sequences * call.heads * tiles,)](
            call.q, call.k, call.v, call.lr, self.mask, self.scalars, self.reads, *given, self.start, call.position, y, *held, *saved,
            *stores, call.cu_seqlens, saves if u else None, slots, saves, call.length, u * call.every,
            call.every, *origin, self.windows - 1, self.max_norm, KEEP=kept is not None, SAVE=saved[0] is not None,
            HAS_MOMENTUM=given[1] is not None, HAS_FINAL=final is not None, **options,
        )  # fmt: skip


def matrix_forward(
    call: Call, mask: Tensor, scalars: Tensor, y: Tensor, final: list[Tensor] | None, boundaries: Tensor | None
) -> None:
    """Writes y, the final state (weights, momentum, start) and the boundaries where they are asked for."""
    _Launches(call, mask, scalars).sweep(y, final, boundaries, None, 0, None)


def matrix_backward(
    call: Call,
    mask: Tensor,
    scalars: Tensor,
    boundaries: Tensor,
    dy: Tensor,
    dfinal: list[Tensor] | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlr: Tensor,
    dmask: Tensor,
    dscalars: Tensor,
) -> list[Tensor]:
    """Writes the gradients of the inputs; returns those of the weights, or of the state's weights, momentum and start."""
    launches = _Launches(call, mask, scalars)
    q, k, reads, clamped = call.q, call.k, launches.reads, launches.clamped
    shape = (call.sequences, call.heads, call.dim, call.value_dim)
    dweights, dmomentum = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    dstart = None if call.position is None else q.new_zeros(shape, dtype=torch.float32)
    errors = torch.empty_like(call.v)
    strength = torch.empty_like(dlr) if clamped else None  # the clamped rates
    curvature = torch.empty_like(dlr) if clamped else None
    rates = strength if clamped else call.lr
    states = [q.new_empty(launches.slots, *shape[1:]) for _ in range(4)]  # weights, momentum, and their gradients
    reverse, tiles = launches.options(CLAMPED if clamped else REVERSE, "D", "DV", "L2", "CLAMP")
    tiles = 1 if clamped else tiles
    pairs, _ = launches.options(PAIRS, "D", "DV")
    inputs, _ = launches.options(INPUTS, "D", "DV", "RESIDUAL", "L2", "CLAMP")
    parts = q.new_empty(tiles, *dlr.shape, dtype=torch.float32)
    for u in reversed(range(launches.windows)):
        slots, chunks = launches.window(u)
        launches.sweep(None, None, boundaries, (*states[:2], errors, strength), u, slots)
        where = (call.length, u * call.every, call.every)
        _reverse_kernel[(call.sequences * call.heads * tiles,)](
            q, k, call.lr, strength, mask, scalars, reads, call.position, dy, errors, *(dfinal or (None,) * 3), dweights,
            dmomentum, dstart, *states[2:], dv, parts, curvature, call.cu_seqlens, slots, *where, call.batch * call.length,
            launches.max_norm, CONTINUES=u < launches.windows - 1, **reverse,
        )  # fmt: skip
        matched = reads  # the reverse sweep was its last reader in this window
        _pairs_kernel[(launches.slots * call.heads * (call.chunk // pairs["BR"]),)](
            q, k, rates, mask, call.position, dy, errors, matched, dmask, call.cu_seqlens, chunks, *where, **pairs,
        )  # fmt: skip
        _inputs_kernel[(launches.slots * call.heads,)](
            q, k, rates, mask, scalars, launches.start, call.position, dy, errors, dv, curvature, matched, *states, dq, dk, dmask,
            dscalars, call.cu_seqlens, chunks, *where, **inputs,
        )  # fmt: skip
    torch.sum(parts, 0, out=dlr)
    return [dweights.sum(0)] if call.position is None else [dweights, dmomentum, dstart]


def matrix_step(call: Call, y: Tensor, final: list[Tensor]) -> None:
    """Writes y and the state (weights, momentum, start) after one token."""
    launch = STEP.lookup(_padded(call.dim), call.capability)
    value_dim = _padded(call.value_dim)
    options = {**launch.options(), "BV": min(launch.blocks["BV"], value_dim), "BK": _padded(call.dim)}
    _step_kernel[(call.batch * call.heads * triton.cdiv(call.value_dim, options["BV"]),)](
        call.q, call.k, call.v, call.lr, call.momentum, call.decay, call.weights[0], call.state_momentum[0], call.state_start[0],
        call.position, y, *final, call.heads, call.max_grad_norm or 0.0, D=call.dim, DV=call.value_dim, RESIDUAL=call.residual,
        L2=call.loss == "l2", CLAMP=call.max_grad_norm is not None, BT=call.chunk, **options,
    )  # fmt: skip


def matrix_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry of depth 1, packed, with states and the l2 loss (the most registers)."""
    tokens = (
        "q",
        "k",
        "v",
        "lr",
        "y",
        "errors",
        "dy",
        "dv",
        "dq",
        "dk",
        "reads",
        "matched",
        "states",
        "momenta",
        "dstates",
        "dmomenta",
    )
    single = ("mask", "scalars", "weights", "momenta_before", "start", "strength", "dmask", "dscalars", "dlr", "curvature")
    single += ("final_weights", "final_momentum", "final_start", "saved_weights", "saved_momentum")
    single += ("given_weights", "given_momentum", "given_start", "dweights", "dmomentum", "dstart")
    integers = ("T", "begin", "window", "origin_step", "origin_offset", "origin_width", "save_step", "tokens")
    types = {**dict.fromkeys(single, "*fp32"), **dict.fromkeys(integers, "i32"), "max_norm": "fp32", "chunks": "*i32"}
    types |= dict.fromkeys(("position", "cu_seqlens", "origins", "slots", "saves"), "*i64")

    def specs(name, kernel, tables, clamp=False, **constants):
        for chunk, table in tables.items():
            for size in sorted({size for size, _ in table.entries}):
                launch = table.lookup(size, capability)
                width = min(size, 128)
                given = {
                    "H": 16,
                    "D": width,
                    "DV": width,
                    "RESIDUAL": True,
                    "L2": True,
                    "CLAMP": clamp,
                    "HAS_POSITION": True,
                    "VARLEN": True,
                }
                given |= {"PRECISION": "tf32", "BT": chunk, "BK": width, **launch.blocks, **constants}
                if not clamp:
                    given |= {"curvature": None, "strength": None}
                title = f"neural_memory matrix {name} {width}, chunk {chunk}" + ", float32's tiles" * (
                    size == 256 and len(table.entries) > 2
                )
                yield CompileSpec(
                    title, kernel, {**types, **dict.fromkeys(tokens, "*bf16")},
                    {n: given[n] for n in kernel.arg_names if n in given}, launch.num_warps, launch.num_stages,
                )  # fmt: skip

    yield from specs("scores", _scores_kernel, SCORES)
    kept = dict.fromkeys(("states", "momenta", "strength", "origins", "slots"))
    finals = dict.fromkeys(("y", "final_start", "saved_weights", "saved_momentum"))
    for clamp in (False, True):
        flags = {"KEEP": False, "SAVE": True, "HAS_MOMENTUM": True, "HAS_FINAL": True}
        name, sweep, reverse = ("clamped ", CLAMPED, CLAMPED) if clamp else ("", SWEEP, REVERSE)
        kept |= {} if clamp else {"errors": None}
        yield from specs(name + "sweep", _sweep_kernel, sweep, clamp, **flags, **kept)
        kept.pop("errors", None)
        flags = {"KEEP": True, "SAVE": False, "HAS_MOMENTUM": True, "HAS_FINAL": False}
        yield from specs(name + "sweep for the backward", _sweep_kernel, sweep, clamp, **flags, **finals)
        yield from specs(name + "reverse", _reverse_kernel, reverse, clamp, CONTINUES=False)
    yield from specs("pairs", _pairs_kernel, PAIRS)
    yield from specs("inputs", _inputs_kernel, INPUTS, True)
    types |= {"y": "*bf16", "H": "i32", **dict.fromkeys(("momentum_gate", "decay"), "*bf16")}
    types |= dict.fromkeys(("momentum", "new_weights", "new_momentum", "new_start"), "*fp32")
    for size, _ in STEP.entries:
        launch = STEP.lookup(size, capability)
        given = {"D": size, "DV": size, "RESIDUAL": True, "L2": True, "CLAMP": True, "BT": 64, "BK": size, **launch.blocks}
        signature = {**types, **dict.fromkeys(("q", "k", "v", "lr"), "*bf16")}
        name = f"neural_memory matrix step {size}"
        yield CompileSpec(name, _step_kernel, signature, given, launch.num_warps, launch.num_stages)
