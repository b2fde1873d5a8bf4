"""A Triton kernel that picks the cached memories of highest score for every token; the scores themselves never reach memory.

A program takes a block of one piece's tokens and one head and goes through the memories that they may read, BE at a time. It keeps the
best K so far in registers as 64-bit keys, a score's bits above the memory's complement, so that larger is better and among equals earlier
is better; K times it moves the largest of the kept and the new keys over to the new best K.

Operations a token and head with n memories: scores take 2 n B R (mean with B = 1, submax with B sub-blocks) in tf32 or 2 n R^2 (energy) in
the inputs' type, the choice some 8 K n on the ordinary units. At n = 31.5, R = 128 and K = 4 that is 8 kFLOP, 0.02 ns at half of
790 TFLOP/s, for mean; 1.03 MFLOP, 1.3 ns, for energy; the choice 1 k instructions, 0.03 ns. Bytes: 2 R for u and 8 K for ids, 288,
0.07 ns at 4.3 TB/s: mean is bound by memory. Descriptors come from L2 once a block of tokens: for energy in bf16 512 bytes a token and
memory, 16 KB, 2.9 ns at some 5.5 TB/s, which bounds it; 128 tokens a block would halve that and do not fit the registers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_device, check_dim, check_shape
from ..common.dispatch import interpreting
from ..common.launch import CompileSpec, Launch, LaunchTable, capability_of, next_power_of_2
from ..common.packing import chunk_indices

MAX_TOP_K = 16
MAX_BLOCKS = 16  # sub-blocks of a segment
ROUTINGS = {"mean": "[M, H, R]", "submax": "[M, H, B, R]", "energy": "[M, H, R, R]"}

# BT tokens; BD rows of descriptors (mean, submax) or BE memories (energy) between two choices; products in tiles of BR. Keyed by R. The
# first table of a pair is for products of half precision (energies of bf16; rows in tf32), the second for float32 (energies of float16).
ANY = 2**31
ROWS = (
    LaunchTable({
        (ANY, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BD": 32, "BR": 64}),
        (ANY, 100): Launch(num_warps=8, num_stages=2, blocks={"BT": 64, "BD": 32, "BR": 64}),
    }),
    LaunchTable({(ANY, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 64, "BD": 32, "BR": 32})}),
)  # fmt: skip
ENERGY = (
    LaunchTable({
        (64, 80): Launch(num_warps=8, num_stages=2, blocks={"BT": 128, "BE": 16, "BR": 64}),
        (128, 80): Launch(num_warps=8, num_stages=2, blocks={"BT": 64, "BE": 16, "BR": 128}),
        (256, 80): Launch(num_warps=8, num_stages=2, blocks={"BT": 128, "BE": 16, "BR": 64}),
    }),
    LaunchTable({(ANY, 80): Launch(num_warps=8, num_stages=2, blocks={"BT": 64, "BE": 16, "BR": 32})}),
)  # fmt: skip

NONE = tl.constexpr(-(2**63))
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _tile(u, origin, r, columns, inside, H: tl.constexpr, R: tl.constexpr):
    """Rows r after row-and-head `origin` of u [tokens, H, R], zero outside; float16 is widened, since a descriptor may be a long sum."""
    value = tl.load(
        u + origin * R + (r[:, None] * (H * R) + columns[None, :]), mask=inside[:, None] & (columns < R)[None, :], other=0.0
    )
    if value.dtype == tl.float16:
        value = value.to(tl.float32)
    return value


@triton.jit
def _keys(scores, memory, n):
    """Keys of scores [BT, BE] of the memories [BE], NONE from the n-th on."""
    bits = tl.where(scores == 0, 0.0, scores).to(
        tl.int32, bitcast=True
    )  # a product of nothing but -0 may be -0, which is as good as 0
    ordered = (bits ^ ((bits >> 31) & LAST)).to(tl.int64) << 32
    return tl.where((memory < n)[None, :], ordered | (memory ^ LAST).to(tl.int64)[None, :], NONE)


@triton.jit
def _merge(best, keys, K: tl.constexpr):
    """The K largest of best [BT, BK] and keys [BT, BE], descending, NONE after them."""
    column = tl.arange(0, best.shape[1])[None, :]
    merged = tl.full(best.shape, NONE, tl.int64)
    for k in range(K):
        largest = tl.maximum(tl.max(best, 1), tl.max(keys, 1))[:, None]
        merged = tl.where(column == k, largest, merged)
        best = tl.where(best == largest, NONE, best)
        keys = tl.where(keys == largest, NONE, keys)
    return merged


@triton.jit
def _select_kernel(
    u, descriptors, ids, cu_pieces, chunks, first, count,
    ENERGY: tl.constexpr, H: tl.constexpr, B: tl.constexpr, R: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BT tokens of one piece and one head; descriptors are [M, H, B, R], with ENERGY [M, H, R, R]."""
    h = tl.program_id(0) % H
    program = tl.program_id(0) // H
    p = tl.load(chunks + program * 2)
    if p < 0:
        return
    begin = tl.load(cu_pieces + p) + tl.load(chunks + program * 2 + 1).to(tl.int64) * BT
    r = tl.arange(0, BT)
    inside = begin + r < tl.load(cu_pieces + p + 1)
    origin = begin * H + h
    entry = tl.load(first + p)
    n = tl.load(count + p).to(tl.int32)
    best = tl.full((BT, BK), NONE, tl.int64)
    for start in range(0, n, BE):
        memory = start + tl.arange(0, BE)
        if ENERGY:
            scores = tl.zeros((BT, BE), tl.float32)
            for e in range(start, tl.minimum(start + BE, n)):
                matrix = descriptors + ((entry + e) * H + h) * (R * R)
                energy = tl.zeros((BT,), tl.float32)
                for c in range(0, R, BR):
                    columns = c + tl.arange(0, BR)
                    product = tl.zeros((BT, BR), tl.float32)
                    for a in range(0, R, BR):
                        rows = a + tl.arange(0, BR)
                        user = _tile(u, origin, r, rows, inside, H, R)
                        mask = (rows < R)[:, None] & (columns < R)[None, :]
                        tile = tl.load(matrix + (rows[:, None] * R + columns[None, :]), mask=mask, other=0.0)
                        product = tl.dot(user, tile.to(user.dtype), acc=product, input_precision=PRECISION)
                    energy += tl.sum(product * _tile(u, origin, r, columns, inside, H, R).to(tl.float32), 1)
                scores = tl.where((memory == e)[None, :], energy[:, None], scores)
        else:
            row = tl.arange(0, BE * B)
            place = descriptors + ((entry + start + row // B) * H + h) * (B * R) + (row % B) * R
            scores = tl.zeros((BT, BE * B), tl.float32)
            for c in range(0, R, BR):
                columns = c + tl.arange(0, BR)
                mask = (start + row // B < n)[:, None] & (columns < R)[None, :]
                d = tl.load(place[:, None] + columns[None, :], mask=mask, other=0.0)
                user = _tile(u, origin, r, columns, inside, H, R).to(tl.float32)
                scores = tl.dot(user, tl.trans(d), acc=scores, input_precision=PRECISION)
            if B > 1:
                scores = tl.max(tl.reshape(scores, (BT, BE, B)), 2)
        best = _merge(best, _keys(scores, memory, n), K)
    column = tl.arange(0, BK)[None, :]
    chosen = tl.where(best == NONE, -1, entry + (best.to(tl.int32) ^ LAST).to(tl.int64))
    tl.store(ids + origin * K + (r[:, None] * (H * K) + column), chosen, mask=inside[:, None] & (column < K))


def _precision(u: Tensor) -> str:
    if interpreting():
        return "ieee"
    return "tf32x3" if u.dtype == torch.float32 else "tf32"


@torch.library.custom_op("memzoo::memory_caching_select", mutates_args=())
def _select(u: Tensor, descriptors: Tensor, cu_pieces: Tensor, first: Tensor, count: Tensor, top_k: int, routing: str) -> Tensor:
    _, total, heads, size = u.shape
    u, descriptors, cu_pieces, first, count = (t.contiguous() for t in (u, descriptors, cu_pieces, first, count))
    blocks = descriptors.shape[2] if routing == "submax" else 1
    if routing == "energy":
        half = u.dtype == torch.bfloat16
        descriptors = descriptors.to(u.dtype) if half else descriptors  # each is read many times
        options = ENERGY[not half].lookup(size, capability_of(u.device)).options()
    else:
        options = ROWS[u.dtype == torch.float32].lookup(size, capability_of(u.device)).options()
        options["BE"] = options.pop("BD") // blocks
    options["BR"] = min(options["BR"], max(16, next_power_of_2(size)))
    chunks = chunk_indices(cu_pieces, total, options["BT"])
    ids = torch.empty(1, total, heads, top_k, dtype=torch.int64, device=u.device)
    _select_kernel[(chunks.shape[0] * heads,)](
        u, descriptors, ids, cu_pieces, chunks, first, count,
        ENERGY=routing == "energy", H=heads, B=blocks, R=size, K=top_k, PRECISION=_precision(u), BK=next_power_of_2(top_k), **options,
    )  # fmt: skip
    return ids


@_select.register_fake
def _(u, descriptors, cu_pieces, first, count, top_k, routing):
    return torch.empty(*u.shape[:3], top_k, dtype=torch.int64, device=u.device)


def select_top_k(
    u: Tensor, descriptors: Tensor, cu_pieces: Tensor, first: Tensor, count: Tensor, top_k: int, routing: str
) -> Tensor:
    """The cached memories of highest score for every token and head; no gradient.

    Arguments:
        u: [1, total, H, R] float32, bfloat16 or float16, R a multiple of 8 from 16 to 256.
        descriptors: float32, [M, H, R] for "mean", [M, H, B, R] for "submax" with B a power of two up to 16, [M, H, R, R] for "energy".
        cu_pieces: [P + 1] int64, the token boundaries of the pieces.
        first, count: [P] int64: a token of piece p may read the memories first[p] to first[p] + count[p] - 1.
        top_k: how many to choose, 1 to 16.
        routing: "mean" (u . d), "submax" (the largest u . d over B sub-blocks) or "energy" (u^T C u).

    Returns:
        Indices into the M memories, [1, total, H, top_k] int64, highest score first, the earlier memory first among equals; -1 where a
        token may read fewer.

    Raises:
        TypeError, ValueError: a dtype, shape, device or number that does not fit.
    """
    op = "select_top_k"
    check_dim(op, "u", u, 4, "[1, total, H, R]")
    if u.dtype not in (torch.float32, torch.bfloat16, torch.float16) or descriptors.dtype != torch.float32:
        raise TypeError(
            f"{op}: u and descriptors have dtypes {u.dtype} and {descriptors.dtype}, need float32 or a half type, and float32"
        )
    if routing not in ROUTINGS:
        raise ValueError(f"{op}: routing is {routing!r}, needs one of {', '.join(ROUTINGS)}")
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"{op}: top_k is {top_k}, needs 1 to {MAX_TOP_K}")
    batch, total, heads, size = u.shape
    if batch != 1 or total == 0:
        raise ValueError(f"{op}: u has shape {list(u.shape)}, needs [1, total, H, R] with at least one token")
    if not 16 <= size <= 256 or size % 8:
        raise ValueError(f"{op}: u has dimension {size}, needs a multiple of 8 from 16 to 256")
    check_dim(op, "descriptors", descriptors, 3 if routing == "mean" else 4, ROUTINGS[routing])
    inner = {"mean": (), "submax": descriptors.shape[2:3], "energy": (size,)}[routing]
    check_shape(op, "descriptors", descriptors, (descriptors.shape[0], heads, *inner, size), ROUTINGS[routing])
    if routing == "submax" and inner[0] not in (1, 2, 4, 8, MAX_BLOCKS):
        raise ValueError(f"{op}: descriptors have {inner[0]} sub-blocks, need a power of two up to {MAX_BLOCKS}")
    check_dim(op, "cu_pieces", cu_pieces, 1, "[P + 1]")
    for name, tensor in (("first", first), ("count", count)):
        check_shape(op, name, tensor, (cu_pieces.shape[0] - 1,), "[P]")
    check_device(op, "u", u, descriptors=descriptors, cu_pieces=cu_pieces, first=first, count=count)
    return _select(u.detach(), descriptors.detach(), cu_pieces, first, count, top_k, routing)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability, with the longest list of choices."""
    where = {"ids": "*i64", "cu_pieces": "*i64", "chunks": "*i32", "first": "*i64", "count": "*i64"}
    shape = {"H": 16, "K": MAX_TOP_K, "BK": MAX_TOP_K}
    for index, (kind, precision) in enumerate((("bf16", "tf32"), ("fp32", "tf32x3"))):
        launch = ROWS[index].lookup(256, capability)
        blocks = dict(launch.blocks)
        rows = blocks.pop("BD")
        for routing, count in (("mean", 1), ("submax", 8)):
            yield CompileSpec(
                f"memory_caching select {routing} {kind} 256", _select_kernel, {**where, "u": f"*{kind}", "descriptors": "*fp32"},
                {"ENERGY": False, "B": count, "R": 256, "PRECISION": precision, "BE": rows // count, **shape, **blocks},
                launch.num_warps, launch.num_stages,
            )  # fmt: skip
        for size in (64, 128, 256):
            launch = ENERGY[index].lookup(size, capability)
            yield CompileSpec(
                f"memory_caching select energy {kind} {size}", _select_kernel, {**where, "u": f"*{kind}", "descriptors": f"*{kind}"},
                {"ENERGY": True, "B": 1, "R": size, "PRECISION": precision, **shape, **launch.blocks},
                launch.num_warps, launch.num_stages,
            )  # fmt: skip
