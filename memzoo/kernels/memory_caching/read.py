"""Triton kernels that mix what a token reads of its own segment's memory with reads of earlier segments' cached memories, by gates.

With M_i the cached matrices that a token may read, r_i their scores, and y_on, r_on the read and the score of its own segment:

    g = softmax(r_on, r_1, ..., r_n)          y = g_on y_on + sum_i g_i q M_i

Gates are formed as the sum goes (an online softmax that starts from the token's own segment), so neither they nor the reads reach
memory. Backward, with delta = dy . y and g from the saved log of the softmax's sum, one kernel goes by queries and one by memories:

    dq = sum_i g_i dy M_i^T     dr_i = g_i (q . (dy M_i^T) - delta)     dM_i = sum_t g_ti q_t dy_t^T     d descriptor_i from dr_i and u

Nothing is summed across programs, but for tiles that share out a large head dimension, whose parts are added in order afterwards.

Operations a token and head that reads n memories: 2 n Dk Dv forward and 6 n Dk Dv backward, where 4 are the gradient's own and 2 form dr
again for the descriptors' gradient; scores add 2 n S R (mean, submax) or 2 n R^2 forward and 6 backward (energy). At T = 16k, C = 256
(n = 31.5 on average) and 128 x 128 that is 1.03 MFLOP forward and 3.1 backward: 1.3 and 3.9 ns at 790 TFLOP/s, against a floor of 1.3 and
2.6; energy doubles them. Bytes: q, u and y_on in, y out, 1 KB in bf16, 0.24 ns at 4.3 TB/s: bound by operations, as far as memory goes.
L2, at some 5.5 TB/s, comes closer. A memory of 32 KB in bf16 is read once a block of 128 queries: 7.9 KB a token and head, 1.4 ns, about as
long as the forward's products take. So in the backward by queries, whose two tiles of 64 columns read half a memory each; their parts of
du add 0.5 ns. By memories, each reads q, u and dy of every token that read it: 24 KB a token and head, 4.4 ns for 2.6 ns of products: the
dearest part, which only two memories a program would make cheaper, and those do not fit the registers.
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

ROUTINGS = (None, "mean", "energy", "submax")
MAX_SUB_BLOCKS = 16
MAX_ENERGY_DIM = 128  # a memory of keys [R, R] lies beside the memory itself in shared memory, and its gradient in registers


def _table(entries: dict[tuple[int, int], tuple[int, int, int, int]]) -> LaunchTable:
    """Entries (BM tokens, BC columns, warps, stages) by (padded head dimension, capability).

    Anything but bfloat16 is computed in float32 and takes the entry of twice its dimension.
    """
    return LaunchTable({key: Launch(w, s, {"BM": bm, "BC": bc}) for key, (bm, bc, w, s) in entries.items()})


# "rows" are scores u . d against rows of descriptors, or no scores at all; "energy" are scores u C u.
ROWS, ENERGY = "rows", "energy"
FORWARD = {
    ROWS: _table({
        (64, 80): (128, 64, 4, 3), (128, 80): (64, 128, 8, 3), (256, 80): (32, 64, 8, 2), (512, 80): (16, 32, 8, 1),
        (128, 90): (128, 128, 8, 3), (256, 90): (128, 64, 8, 3),
    }),
    ENERGY: _table({
        (64, 80): (128, 64, 8, 2), (128, 80): (64, 128, 8, 3), (256, 80): (64, 128, 8, 2), (512, 80): (16, 64, 8, 1),
        (128, 90): (128, 64, 8, 3), (256, 90): (64, 128, 8, 1),
    }),
}  # fmt: skip
BACKWARD_QUERIES = {
    ROWS: _table({
        (64, 80): (128, 64, 8, 2), (128, 80): (32, 64, 8, 2), (256, 80): (16, 64, 8, 2), (512, 80): (16, 32, 8, 1),
        (128, 90): (128, 64, 8, 3),
    }),
    ENERGY: _table({
        (64, 80): (64, 64, 4, 2), (128, 80): (32, 64, 8, 2), (256, 80): (32, 64, 8, 1), (512, 80): (16, 32, 8, 1),
        (128, 90): (64, 128, 8, 2),
    }),
}  # fmt: skip
BACKWARD_BANK = {
    ROWS: _table({
        (64, 80): (32, 32, 8, 2), (128, 80): (32, 64, 8, 2), (256, 80): (16, 32, 8, 1), (512, 80): (16, 16, 8, 1),
        (64, 90): (64, 64, 4, 3), (128, 90): (64, 128, 8, 3), (64, 100): (32, 64, 4, 3),
    }),
    ENERGY: _table({
        (64, 80): (32, 32, 8, 2), (128, 80): (64, 64, 8, 2), (256, 80): (16, 32, 8, 1), (512, 80): (16, 16, 8, 1),
        (64, 90): (32, 64, 4, 2), (128, 90): (32, 128, 8, 3),
    }),
}  # fmt: skip
OWN = _table({(256, 80): (16, 256, 4, 1)})
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(x, origin, H: tl.constexpr, r, columns, inside, D: tl.constexpr, BD: tl.constexpr):
    """Rows r after row-and-head `origin` of x [tokens, H, D], zero outside."""
    mask = inside[:, None]
    if D % BD:
        mask = mask & (columns < D)[None, :]
    return tl.load(x + origin * D + (r[:, None] * (H * D) + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def _transposed(x, origin, H: tl.constexpr, r, columns, inside, D: tl.constexpr, BD: tl.constexpr):
    """The same with tokens along the columns."""
    mask = inside[None, :]
    if D % BD:
        mask = mask & (columns < D)[:, None]
    return tl.load(x + origin * D + (r[None, :] * (H * D) + columns[:, None]), mask=mask, other=0.0)


@triton.jit
def _matrix(x, rows, columns, D0: tl.constexpr, D1: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    """Rows and columns of a matrix [D0, D1], zero outside."""
    at = x + (rows[:, None] * D1 + columns[None, :])
    if D0 % B0 and D1 % B1:
        value = tl.load(at, mask=(rows < D0)[:, None] & (columns < D1)[None, :], other=0.0)
    elif D0 % B0:
        value = tl.load(at, mask=(rows < D0)[:, None], other=0.0)
    elif D1 % B1:
        value = tl.load(at, mask=(columns < D1)[None, :], other=0.0)
    else:
        value = tl.load(at)
    return value


@triton.jit
def _block(cu_pieces, chunks, first, count, blocks, BM: tl.constexpr, TILES: tl.constexpr):
    """(tile, head, first token, tokens in the block, first memory, number of memories); no tokens if idle.

    The last blocks of a sequence read the most memories, so they go first.
    """
    tile = tl.program_id(0) % TILES
    program = tl.program_id(0) // TILES
    h = program // blocks
    program = blocks - 1 - program % blocks
    p = tl.load(chunks + program * 2)
    idle = p < 0
    p = tl.maximum(p, 0)
    begin = tl.load(cu_pieces + p).to(tl.int64) + tl.load(chunks + program * 2 + 1) * BM
    length = tl.minimum(tl.load(cu_pieces + p + 1) - begin, BM).to(tl.int32)
    return tile, h, begin, tl.where(idle, 0, length), tl.load(first + p).to(tl.int64), tl.load(count + p).to(tl.int32)


@triton.jit
def _descriptors(x, entry, block, n, h, H: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """The rows [BE * S, BR] of BE memories after `block`, zero from memory n on."""
    j = tl.arange(0, BE * S)
    columns = tl.arange(0, BR)
    mask = (block + j // S < n)[:, None]
    if R % BR:
        mask = mask & (columns < R)[None, :]
    place = ((j // S) * (H * S * R) + (j % S) * R)[:, None] + columns[None, :]
    return tl.load(x + ((entry + block) * H + h) * (S * R) + place, mask=mask, other=0.0)


@triton.jit
def _row_scores(
    user, descriptors, rest, entry, block, n, h,
    H: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 of BE memories after `block` [BM, BE], and which of the S rows gave each.

    `rest` is what rounding to the products' type took off the descriptors: half their digits would shift a large score by too much.
    """
    rows = _descriptors(descriptors, entry, block, n, h, H, R, S, BR, BE)
    scores = tl.dot(user, tl.trans(rows), input_precision=PRECISION)
    if rest is not None:
        rows = _descriptors(rest, entry, block, n, h, H, R, S, BR, BE)
        scores = tl.dot(user, tl.trans(rows), scores, input_precision=PRECISION)
    scores *= LOG2E
    if S > 1:
        scores = tl.reshape(scores, (scores.shape[0], BE, S))
        scores, best = tl.max(scores, 2, return_indices=True, return_indices_tie_break_left=True)
    else:
        best = tl.zeros(scores.shape, tl.int32)
    scores = tl.where((block + tl.arange(0, BE) < n)[None, :], scores, float("-inf"))
    return scores, best


@triton.jit(do_not_specialize=["blocks"])
def _forward_kernel(
    q, u, online, online_score, bank, descriptors, rest, y, lse, cu_pieces, chunks, first, count, blocks,
    ROUTING: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """A block of one piece's tokens, one head and a tile of the values' columns; lse [tokens, H] is in base 2."""
    tile, h, begin, length, entry, n = _block(cu_pieces, chunks, first, count, blocks, BM, (DV + BC - 1) // BC)
    if length <= 0:
        return
    TYPE: tl.constexpr = bank.dtype.element_ty
    STRIDE: tl.constexpr = H * DK * DV
    r = tl.arange(0, BM)
    inside = r < length
    origin = begin * H + h
    rows = tl.arange(0, BK)
    columns = tile * BC + tl.arange(0, BC)
    query = _tile(q, origin, H, r, rows, inside, DK, BK).to(TYPE)
    acc = _tile(online, origin, H, r, columns, inside, DV, BC).to(tl.float32)
    state = bank + (entry * H + h) * (DK * DV)
    if ROUTING == "none":
        for _ in range(n):
            acc = tl.dot(query, _matrix(state, rows, columns, DK, DV, BK, BC), acc, input_precision=PRECISION)
            state += STRIDE
    else:
        user = _tile(u, origin, H, r, tl.arange(0, BR), inside, R, BR).to(TYPE)
        peak = tl.load(online_score + origin + r * H, mask=inside, other=0.0) * LOG2E
        total = tl.full((BM,), 1.0, tl.float32)
        if ROUTING == "energy":
            keys = descriptors + (entry * H + h) * (R * R)
            for _ in range(n):
                key = _matrix(keys, tl.arange(0, BR), tl.arange(0, BR), R, R, BR, BR)
                score = tl.sum(tl.dot(user, key, input_precision=PRECISION) * user.to(tl.float32), 1) * LOG2E
                higher = tl.maximum(peak, score)
                kept = tl.exp2(peak - higher)
                weight = tl.exp2(score - higher)
                total = total * kept + weight
                peak = higher
                part = tl.dot(query, _matrix(state, rows, columns, DK, DV, BK, BC), input_precision=PRECISION)
                acc = acc * kept[:, None] + part * weight[:, None]
                state += STRIDE
                keys += H * R * R
        else:
            e = tl.arange(0, BE)[None, :]
            for block in range(0, n, BE):
                scores, _ = _row_scores(user, descriptors, rest, entry, block, n, h, H, R, S, BR, BE, PRECISION)
                higher = tl.maximum(peak, tl.max(scores, 1))
                kept = tl.exp2(peak - higher)
                weights = tl.exp2(scores - higher[:, None])
                total = total * kept + tl.sum(weights, 1)
                peak = higher
                acc *= kept[:, None]
                for j in range(tl.minimum(n - block, BE)):
                    weight = tl.sum(tl.where(e == j, weights, 0.0), 1)
                    part = tl.dot(query, _matrix(state, rows, columns, DK, DV, BK, BC), input_precision=PRECISION)
                    acc += part * weight[:, None]
                    state += STRIDE
        acc = acc / total[:, None]
        tl.store(lse + origin + r * H, peak + tl.log2(total), mask=r + tile * BM < length)
    place = y + origin * DV + (r[:, None] * (H * DV) + columns[None, :])
    tl.store(place, acc.to(y.dtype.element_ty), mask=inside[:, None] & (columns < DV)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _own_kernel(
    online, online_score, y, lse, dy, delta, donline, donline_score, rows, DV: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """delta [rows], and what goes to each token's own segment, for BM of the tokens and heads."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BC)
    inside = r < rows
    place = r[:, None] * DV + columns[None, :]
    mask = inside[:, None] & (columns < DV)[None, :]
    grad = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
    slope = tl.sum(grad * tl.load(y + place, mask=mask, other=0.0).to(tl.float32), 1)
    own = tl.sum(grad * tl.load(online + place, mask=mask, other=0.0).to(tl.float32), 1)
    weight = tl.exp2(tl.load(online_score + r, mask=inside, other=0.0) * LOG2E - tl.load(lse + r, mask=inside, other=0.0))
    tl.store(delta + r, slope, mask=inside)
    tl.store(donline_score + r, weight * (own - slope), mask=inside)
    tl.store(donline + place, (grad * weight[:, None]).to(donline.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks", "tokens"])
def _backward_queries_kernel(
    q, u, bank, descriptors, rest, lse, dy, delta, dq, du, cu_pieces, chunks, first, count, blocks, tokens,
    ROUTING: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """dq for a block of one piece's tokens and a tile of its columns, and that tile's part of du [tiles, tokens, H, R]."""
    tile, h, begin, length, entry, n = _block(cu_pieces, chunks, first, count, blocks, BM, (DK + BC - 1) // BC)
    if length <= 0:
        return
    TYPE: tl.constexpr = bank.dtype.element_ty
    STRIDE: tl.constexpr = H * DK * DV
    r = tl.arange(0, BM)
    inside = r < length
    origin = begin * H + h
    rows = tile * BC + tl.arange(0, BC)
    columns = tl.arange(0, BV)
    grad = _tile(dy, origin, H, r, columns, inside, DV, BV).to(TYPE)
    result = tl.zeros((BM, BC), tl.float32)
    state = bank + (entry * H + h) * (DK * DV)
    if ROUTING == "none":
        for _ in range(n):
            value = tl.trans(_matrix(state, rows, columns, DK, DV, BC, BV))
            result = tl.dot(grad, value, result, input_precision=PRECISION)
            state += STRIDE
    else:
        norm = tl.load(lse + origin + r * H, mask=inside, other=0.0)
        # Each tile has its part of q . (dy M^T); the first takes delta off.
        slope = tl.load(delta + origin + r * H, mask=r + tile * BM < length, other=0.0)
        query = _tile(q, origin, H, r, rows, inside, DK, BC).to(TYPE)
        d = tl.arange(0, BR)
        user = _tile(u, origin, H, r, d, inside, R, BR).to(TYPE)
        user_grad = tl.zeros((BM, BR), tl.float32)
        if ROUTING == "energy":
            keys = descriptors + (entry * H + h) * (R * R)
            for _ in range(n):
                read = tl.dot(user, _matrix(keys, d, d, R, R, BR, BR), input_precision=PRECISION)
                weight = tl.exp2(tl.sum(read * user.to(tl.float32), 1) * LOG2E - norm)
                value = tl.trans(_matrix(state, rows, columns, DK, DV, BC, BV))
                part = tl.dot(grad, value, input_precision=PRECISION)
                change = weight * (tl.sum(part * query.to(tl.float32), 1) - slope)
                result += part * weight[:, None]
                user_grad += read * (2.0 * change)[:, None]
                state += STRIDE
                keys += H * R * R
        else:
            e = tl.arange(0, BE)[None, :]
            for block in range(0, n, BE):
                scores, best = _row_scores(user, descriptors, rest, entry, block, n, h, H, R, S, BR, BE, PRECISION)
                # Starts as the gates; each in turn becomes its score's gradient.
                change = tl.exp2(scores - norm[:, None])
                for j in range(tl.minimum(n - block, BE)):
                    weight = tl.sum(tl.where(e == j, change, 0.0), 1)
                    value = tl.trans(_matrix(state, rows, columns, DK, DV, BC, BV))
                    part = tl.dot(grad, value, input_precision=PRECISION)
                    result += part * weight[:, None]
                    factor = tl.sum(part * query.to(tl.float32), 1) - slope
                    change = tl.where(e == j, change * factor[:, None], change)
                    state += STRIDE
                if S > 1:
                    change = tl.where(best[:, :, None] == tl.arange(0, S)[None, None, :], change[:, :, None], 0.0)
                    change = tl.reshape(change, (BM, BE * S))
                # Read again: the shift is 0, which the compiler cannot know, so that it does not keep the rows in registers meanwhile.
                descriptor = _descriptors(descriptors, entry, block, n ^ (block >> 31), h, H, R, S, BR, BE)
                user_grad = tl.dot(change.to(TYPE), descriptor, user_grad, input_precision=PRECISION)
        place = du + (tile.to(tl.int64) * tokens * H + origin) * R + (r[:, None] * (H * R) + d[None, :])
        tl.store(place, user_grad.to(du.dtype.element_ty), mask=inside[:, None] & (d < R)[None, :])
    place = dq + origin * DK + (r[:, None] * (H * DK) + rows[None, :])
    tl.store(place, result.to(dq.dtype.element_ty), mask=inside[:, None] & (rows < DK)[None, :])


@triton.jit(do_not_specialize=["entries"])
def _backward_bank_kernel(
    q, u, bank, descriptors, rest, lse, dy, delta, dbank, ddescriptors, reader_start, reader_end, entries,
    ROUTING: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """One cached memory's gradient for one head and a tile of its columns, over all tokens that read it, and that tile's part of the
    descriptor's [tiles, M, H, ...]."""
    TILES: tl.constexpr = (DV + BC - 1) // BC
    TYPE: tl.constexpr = bank.dtype.element_ty
    SP: tl.constexpr = 16  # rows of descriptors, the least a product can have
    tile = tl.program_id(0) % TILES
    # The first memories of a sequence have the most readers: heads turn fastest.
    h = (tl.program_id(0) // TILES) % H
    entry = (tl.program_id(0) // (TILES * H)).to(tl.int64)
    start = tl.load(reader_start + entry).to(tl.int64)
    readers = (tl.load(reader_end + entry) - start).to(tl.int32)
    rows = tl.arange(0, BK)
    columns = tile * BC + tl.arange(0, BC)
    d = tl.arange(0, BR)
    s = tl.arange(0, SP)
    offset = (entry * H + h) * (DK * DV)
    # All products have tokens along their columns: what weighs a token's gradient is then ready to multiply from registers, and a tile
    # of 64 tokens is work for eight warps.
    result = tl.zeros((BC, BK), tl.float32)
    if ROUTING != "none":
        state = tl.trans(_matrix(bank + offset, rows, columns, DK, DV, BK, BC))
    if ROUTING == "energy":
        key = _matrix(descriptors + (entry * H + h) * (R * R), d, d, R, R, BR, BR)
        key_grad = tl.zeros((BR, BR), tl.float32)
    elif ROUTING != "none":
        within = (s < S)[:, None] & (d < R)[None, :]
        place = (entry * H + h) * (S * R) + (s[:, None] * R + d[None, :])
        high = tl.load(descriptors + place, mask=within, other=0.0)
        if rest is not None:
            low = tl.load(rest + place, mask=within, other=0.0)
        key_grad = tl.zeros((SP, BR), tl.float32)
    for begin in range(0, readers, BM):
        r = tl.arange(0, BM)
        inside = begin + r < readers
        origin = (start + begin) * H + h
        query = _tile(q, origin, H, r, rows, inside, DK, BK).to(TYPE)
        grad = _transposed(dy, origin, H, r, columns, inside, DV, BC).to(TYPE)
        if ROUTING != "none":
            norm = tl.load(lse + origin + r * H, mask=inside, other=0.0)
            slope = tl.load(delta + origin + r * H, mask=begin + r < tl.where(tile == 0, readers, 0), other=0.0)
            user = _tile(u, origin, H, r, d, inside, R, BR).to(TYPE)
            if ROUTING == "energy":
                key_user = tl.dot(key, tl.trans(user), input_precision=PRECISION)
                turned = _transposed(u, origin, H, r, d, inside, R, BR).to(tl.float32)
                score = tl.sum(key_user * turned, 0)
            else:
                scores = tl.dot(user, tl.trans(high), input_precision=PRECISION)
                if rest is not None:
                    scores = tl.dot(user, tl.trans(low), scores, input_precision=PRECISION)
                if S > 1:
                    scores = tl.where((s < S)[None, :], scores, float("-inf"))
                    score, best = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
                else:
                    score = tl.sum(tl.where((s == 0)[None, :], scores, 0.0), 1)
                    best = tl.zeros((BM,), tl.int32)
            weight = tl.where(inside, tl.exp2(score * LOG2E - norm), 0.0)
            part = tl.sum(tl.dot(state, tl.trans(query), input_precision=PRECISION) * grad.to(tl.float32), 0)
            change = weight * (part - slope)
            if ROUTING == "energy":
                key_grad = tl.dot((turned * change[None, :]).to(TYPE), user, key_grad, input_precision=PRECISION)
            else:
                changes = tl.where(s[:, None] == best[None, :], change[None, :], 0.0)
                key_grad = tl.dot(changes.to(TYPE), user, key_grad, input_precision=PRECISION)
            grad = (grad.to(tl.float32) * weight[None, :]).to(TYPE)
        result = tl.dot(grad, query, result, input_precision=PRECISION)
    within = (columns < DV)[:, None] & (rows < DK)[None, :]
    tl.store(dbank + offset + (rows[None, :] * DV + columns[:, None]), result, mask=within)
    if ROUTING != "none":
        at = (tile.to(tl.int64) * entries + entry) * H + h
        if ROUTING == "energy":
            tl.store(
                ddescriptors + at * (R * R) + (d[:, None] * R + d[None, :]), key_grad, mask=(d < R)[:, None] & (d < R)[None, :]
            )
        else:
            tl.store(
                ddescriptors + at * (S * R) + (s[:, None] * R + d[None, :]), key_grad, mask=(s < S)[:, None] & (d < R)[None, :]
            )


def check_routing(op: str, routing: str | None, dim: int, sub_blocks: int = 1) -> None:
    """Raise ValueError for a routing rule, a size R of u or a number of sub-blocks that these kernels do not have."""
    if routing not in ROUTINGS:
        raise ValueError(f"{op}: routing is {routing!r}, needs one of {', '.join(map(str, ROUTINGS))}")
    if routing == "energy" and dim > MAX_ENERGY_DIM:
        raise ValueError(
            f"{op}: u has head dimension {dim}, at most {MAX_ENERGY_DIM} fit the Triton kernels with routing 'energy'; "
            "use implementation 'chunked'"
        )
    if not 1 <= sub_blocks <= MAX_SUB_BLOCKS or sub_blocks & (sub_blocks - 1):
        raise ValueError(f"{op}: descriptors have {sub_blocks} sub-blocks, needs a power of two up to {MAX_SUB_BLOCKS}")


def _precision(x: Tensor) -> str:
    if interpreting():
        return "ieee"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _compute_type(x: Tensor) -> torch.dtype:
    """What products are formed in: float16 is widened, since a memory is a long sum that may overflow it."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _descriptor_sizes(descriptors: Tensor | None, routing: str | None) -> tuple[int, int]:
    """(R, S): the size of u, and the rows of a descriptor that scores are the largest of."""
    if descriptors is None:
        return 16, 1
    return descriptors.shape[-1], descriptors.shape[2] if routing == "submax" else 1


def _constants(q: Tensor, bank: Tensor, descriptors: Tensor | None, routing: str | None) -> dict[str, object]:
    """The kernels' switches and sizes."""
    dim, rows = _descriptor_sizes(descriptors, routing)
    heads, key_dim, value_dim = bank.shape[1:]
    return {
        "ROUTING": "none" if routing is None else "energy" if routing == "energy" else "rows",
        "H": heads, "DK": key_dim, "DV": value_dim, "R": dim, "S": rows, "PRECISION": _precision(q),
        "BK": next_power_of_2(key_dim), "BV": next_power_of_2(value_dim), "BR": next_power_of_2(dim), "BE": _entries(rows),
    }  # fmt: skip


def _entries(rows: int) -> int:
    """Memories whose scores are formed at a time: 16 or 32 rows of descriptors."""
    return max(16, min(8 * rows, 32)) // rows


def _launch(tables: dict[str, LaunchTable], x: Tensor, constants: dict[str, object], columns: int) -> tuple[dict[str, object], int]:
    """Launch options of a kernel that shares out `columns`, and its number of tiles."""
    size = max(64, *(constants[name] for name in ("BK", "BV", "BR")))
    table = tables[ENERGY if constants["ROUTING"] == "energy" else ROWS]
    launch = table.lookup(size * (1 if x.dtype == torch.bfloat16 else 2), capability_of(x.device))
    options = {**launch.options(), "BC": min(launch.blocks["BC"], next_power_of_2(columns))}
    return options, triton.cdiv(columns, options["BC"])


@torch.library.custom_op("memzoo::memory_caching_read", mutates_args=())
def _forward(
    q: Tensor,
    u: Tensor | None,
    online: Tensor,
    online_score: Tensor | None,
    bank: Tensor,
    descriptors: Tensor | None,
    cu_pieces: Tensor,
    first: Tensor,
    count: Tensor,
    reader_start: Tensor,
    reader_end: Tensor,
    routing: str | None,
) -> tuple[Tensor, Tensor]:
    """(y [1, total, H, Dv], log of the softmax's sum in base 2 [1, total, H], empty without a routing)."""
    q, u, online, online_score, bank, descriptors, rest = _ready(q, u, online, online_score, bank, descriptors, routing)
    total, heads = q.shape[1:3]
    y = q.new_empty(*q.shape[:3], bank.shape[3])
    lse = q.new_empty(0 if routing is None else q.shape[:3], dtype=torch.float32)
    constants = _constants(q, bank, descriptors, routing)
    options, tiles = _launch(FORWARD, q, constants, bank.shape[3])
    chunks = chunk_indices(cu_pieces, total, options["BM"])
    _forward_kernel[(chunks.shape[0] * heads * tiles,)](
        q, u, online, online_score, bank, descriptors, rest, y, lse, cu_pieces, chunks, first, count, chunks.shape[0],
        **constants, **options,
    )  # fmt: skip
    return y, lse


def _ready(q, u, online, online_score, bank, descriptors, routing) -> list[Tensor | None]:
    """Contiguous tensors, with memories and descriptors in the type that products are formed in, and what rounding took off the latter.

    What it takes off a memory of keys stays off: a second product with it would cost as much as the read.
    """
    bank, rest = bank.to(_compute_type(q)), None
    if descriptors is not None and descriptors.dtype != bank.dtype:
        rounded = descriptors.to(bank.dtype)
        rest = None if routing == "energy" else (descriptors - rounded).to(bank.dtype)
        descriptors = rounded
    return [None if t is None else t.contiguous() for t in (q, u, online, online_score, bank, descriptors, rest)]


@_forward.register_fake
def _(q, u, online, online_score, bank, descriptors, cu_pieces, first, count, reader_start, reader_end, routing):
    lse = q.new_empty(0 if routing is None else q.shape[:3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], bank.shape[3]), lse


@torch.library.custom_op("memzoo::memory_caching_read_backward", mutates_args=())
def _backward(
    dy: Tensor,
    q: Tensor,
    u: Tensor | None,
    online: Tensor,
    online_score: Tensor | None,
    bank: Tensor,
    descriptors: Tensor | None,
    cu_pieces: Tensor,
    first: Tensor,
    count: Tensor,
    reader_start: Tensor,
    reader_end: Tensor,
    routing: str | None,
    y: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, du, donline, donline_score, dbank, ddescriptors); without a routing du, donline (which is dy), donline_score and
    ddescriptors are empty."""
    entries, total, heads = bank.shape[0], q.shape[1], q.shape[2]
    dq, dbank = q.new_empty(q.shape), q.new_empty(bank.shape, dtype=torch.float32)
    du, donline, donline_score, ddescriptors = (q.new_empty(0) for _ in range(4))
    q, u, online, online_score, bank, descriptors, rest = _ready(q, u, online, online_score, bank, descriptors, routing)
    dy, constants = dy.contiguous(), _constants(q, bank, descriptors, routing)
    options, tiles = _launch(BACKWARD_QUERIES, q, constants, bank.shape[2])
    bank_options, bank_tiles = _launch(BACKWARD_BANK, q, constants, bank.shape[3])
    delta = torch.empty_like(lse)
    if routing is not None:
        own = OWN.lookup(bank.shape[3], capability_of(q.device))
        du = u.new_empty(tiles, *u.shape, dtype=u.dtype if tiles == 1 else torch.float32)
        donline, donline_score = online.new_empty(online.shape), online_score.new_empty(online_score.shape)
        ddescriptors = descriptors.new_empty(bank_tiles, *descriptors.shape, dtype=torch.float32)
        _own_kernel[(triton.cdiv(delta.numel(), own.blocks["BM"]),)](
            online, online_score, y, lse, dy, delta, donline, donline_score, delta.numel(), DV=bank.shape[3], **own.options()
        )
    chunks = chunk_indices(cu_pieces, total, options["BM"])
    _backward_queries_kernel[(chunks.shape[0] * heads * tiles,)](
        q, u, bank, descriptors, rest, lse, dy, delta, dq, du, cu_pieces, chunks, first, count, chunks.shape[0], total,
        **constants, **options,
    )  # fmt: skip
    _backward_bank_kernel[(entries * heads * bank_tiles,)](
        q, u, bank, descriptors, rest, lse, dy, delta, dbank, ddescriptors, reader_start, reader_end, entries, **constants, **bank_options,
    )  # fmt: skip
    if routing is not None:
        du = du[0] if tiles == 1 else du.sum(0).to(u.dtype)
        ddescriptors = ddescriptors[0] if bank_tiles == 1 else ddescriptors.sum(0)
    return dq, du, donline, donline_score, dbank, ddescriptors


@_backward.register_fake
def _(
    dy, q, u, online, online_score, bank, descriptors, cu_pieces, first, count, reader_start, reader_end, routing, y, lse
):  # fmt: skip
    dq, dbank = q.new_empty(q.shape), q.new_empty(bank.shape, dtype=torch.float32)
    if routing is None:
        return dq, q.new_empty(0), q.new_empty(0), q.new_empty(0), dbank, q.new_empty(0)
    rest = [t.new_empty(t.shape) for t in (u, online, online_score)]
    return dq, *rest, dbank, descriptors.new_empty(descriptors.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.routing = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 12
    *tensors, y, lse = ctx.saved_tensors
    dq, du, donline, donline_score, dbank, ddescriptors = _backward(dy, *tensors, ctx.routing, y, lse)
    places = (None,) * 6
    if ctx.routing is None:
        return dq, None, dy.to(tensors[2].dtype), None, dbank, None, *places
    return dq, du, donline, donline_score, dbank, ddescriptors, *places


_forward.register_autograd(_autograd, setup_context=_setup_context)


def gated_read(
    q: Tensor,
    u: Tensor | None,
    online: Tensor,
    online_score: Tensor | None,
    bank: Tensor,
    descriptors: Tensor | None,
    cu_pieces: Tensor,
    first: Tensor,
    count: Tensor,
    reader_start: Tensor,
    reader_end: Tensor,
    routing: str | None,
) -> Tensor:
    """Mixes each token's read of its own segment's memory with reads of cached memories (Memory Caching, arXiv 2602.24281, gated residual).

    Tokens lie in a row and are cut into P pieces that share what they read.

    Args:
        q: [1, total, H, Dk]. u: [1, total, H, R], what the descriptors are compared with.
        online: [1, total, H, Dv], the read of the token's own segment. online_score: [1, total, H], float32, its score.
        bank: [M, H, Dk, Dv], float32, the cached memories.
        descriptors: float32: of routing "mean" [M, H, R], of "energy" [M, H, R, R], symmetric, R up to 128; of "submax" [M, H, S, R],
            S a power of two up to 16.
        cu_pieces: [P + 1] of int64, where each piece starts; pieces may be empty, and cover all tokens.
        first, count: [P] of int64; a token of piece p reads bank[first[p] : first[p] + count[p]]. count may be 0.
        reader_start, reader_end: [M] of int64; exactly the tokens reader_start[e] <= t < reader_end[e] read bank[e]. None if equal.
        routing: scores are u . d with "mean", u . (C u) with "energy", the largest u . d_s with "submax". With None there are no gates,
            y = online + sum_i q M_i, and u, online_score and descriptors are None.

    Returns:
        y [1, total, H, Dv] in q's dtype, differentiable in q, u, online, online_score, bank and descriptors. Where several sub-blocks
        score the same, the first takes the gradient.

    Raises:
        ValueError: a routing rule or a size that the kernels do not have.
    """
    check_routing("gated_read", routing, *_descriptor_sizes(descriptors, routing))
    pieces = [t.contiguous() for t in (cu_pieces, first, count, reader_start, reader_end)]
    return _forward(q, u, online, online_score, bank, descriptors, *pieces, routing)[0]


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability in bf16: no gates, one and the most sub-blocks, energy."""
    places = dict.fromkeys(("cu_pieces", "first", "count", "reader_start", "reader_end"), "*i64")
    sizes = {"chunks": "*i32", "blocks": "i32", "tokens": "i64", "entries": "i64"}
    numbers = dict.fromkeys(("online_score", "lse", "delta", "donline_score", "dbank", "ddescriptors"), "*fp32")
    kernels = (
        ("forward", _forward_kernel, FORWARD),
        ("backward queries", _backward_queries_kernel, BACKWARD_QUERIES),
        ("backward memories", _backward_bank_kernel, BACKWARD_BANK),
    )
    tokens = dict.fromkeys(("q", "u", "online", "y", "dy", "dq", "du", "donline", "bank", "descriptors", "rest"), "*bf16")
    pointers = {**tokens, **numbers, **places, **sizes}
    for size in (64, 128, 256):
        for routing, rows in (("none", 1), ("rows", 1), ("rows", MAX_SUB_BLOCKS), ("energy", 1)):
            energy = routing == "energy"
            dim = min(size, MAX_ENERGY_DIM) if energy else size
            for name, kernel, tables in kernels:
                launch = tables[ENERGY if energy else ROWS].lookup(size, capability)
                label = {"none": "no gates", "rows": f"{rows} rows", "energy": "energy"}[routing]
                yield CompileSpec(
                    f"memory_caching read {name} {size}, {label}", kernel, pointers,
                    {"ROUTING": routing, "H": 16, "DK": size, "DV": size, "R": dim, "S": rows, "BE": _entries(rows), "BK": size,
                     "BV": size, "BR": dim, "PRECISION": "tf32", **launch.blocks,
                     **({} if routing == "rows" else {"rest": None})},
                    launch.num_warps, launch.num_stages,
                )  # fmt: skip
    launch = OWN.lookup(256, capability)
    yield CompileSpec(
        "memory_caching read own segment", _own_kernel, {**tokens, **numbers, "rows": "i64"},
        {"DV": 256, **launch.blocks}, launch.num_warps, launch.num_stages,
    )  # fmt: skip
