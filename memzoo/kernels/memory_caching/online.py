"""Triton kernels of the online segment's score: each token's u against the mean of its segment's keys so far.

    r_t = u_t . c_t / n_t,    c_t = carried + sum_{j <= t} k_j,    n_t = carried count + tokens of the piece up to t

One program goes through a piece of one head with the running sum [R] in registers; within a block of tokens the sum over j is a product
with a triangle of ones. Backward, with w_t = dr_t / n_t, the same sweep gives du_t = w_t c_t, and one that goes from the end gives
dk_j = dsums + sum_{t >= j} w_t u_t.

Bytes a token and head in bf16: u and k once, 4 R, and 4 for r: 516 at R = 128, 0.12 ns at 4.3 TB/s; backward k and u in, du and dk out,
8 R, and twice 4 for dr: 1,032, 0.24 ns. Operations with blocks of 64 tokens: 2 x 64 R = 16 kFLOP forward and 33 backward, 0.02 and
0.04 ns at 790 TFLOP/s: bound by memory. A case of T = 16k and C = 256 has 64 programs a head; one piece that long is one program a head,
whose 256 blocks in turn, a microsecond or so each, take longer than its bytes do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dispatch import interpreting
from ..common.launch import CompileSpec, Launch, LaunchTable, capability_of, next_power_of_2

# By padded head dimension, in units of two bytes: float32 and float16, which is computed in float32, count double. BT tokens at a time.
LAUNCH = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=3, blocks={"BT": 64}),
    (128, 80): Launch(num_warps=4, num_stages=3, blocks={"BT": 32}),
    (128, 90): Launch(num_warps=8, num_stages=3, blocks={"BT": 64}),
    (256, 80): Launch(num_warps=8, num_stages=2, blocks={"BT": 32}),
    (512, 80): Launch(num_warps=8, num_stages=1, blocks={"BT": 16}),
})  # fmt: skip


@triton.jit
def _piece(cu_pieces, carried_count, H: tl.constexpr):
    """(piece, head, first token, number of tokens, tokens of the segment before them)."""
    p = tl.program_id(0) // H
    first = tl.load(cu_pieces + p).to(tl.int64)
    length = (tl.load(cu_pieces + p + 1) - first).to(tl.int32)
    before = p.to(tl.int64) * 0
    if carried_count is not None:
        before = tl.load(carried_count + p)
    return p.to(tl.int64), tl.program_id(0) % H, first, length, before


@triton.jit
def _tile(x, origin, H: tl.constexpr, r, columns, inside, R: tl.constexpr, BR: tl.constexpr):
    """Rows r after row-and-head `origin` of x [tokens, H, R], zero outside; float16 is widened, since a long sum overflows it."""
    mask = inside[:, None]
    if R % BR:
        mask = mask & (columns < R)[None, :]
    value = tl.load(x + origin * R + (r[:, None] * (H * R) + columns[None, :]), mask=mask, other=0.0)
    if value.dtype == tl.float16:
        value = value.to(tl.float32)
    return value


@triton.jit
def _forward_kernel(
    u, k, cu_pieces, carried_sum, carried_count, scores, sums,
    H: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Scores [tokens, H] of one piece and head, and the sum [P, H, R] at its end."""
    p, h, first, length, before = _piece(cu_pieces, carried_count, H)
    columns = tl.arange(0, BR)
    at = (p * H + h) * R + columns
    total = tl.zeros((BR,), tl.float32)
    if carried_sum is not None:
        total = tl.load(carried_sum + at, mask=columns < R, other=0.0)
    r = tl.arange(0, BT)
    for begin in range(0, length, BT):
        inside = begin + r < length
        origin = (first + begin) * H + h
        user = _tile(u, origin, H, r, columns, inside, R, BR)
        key = _tile(k, origin, H, r, columns, inside, R, BR)
        triangle = (r[:, None] >= r[None, :]).to(key.dtype)
        so_far = tl.dot(triangle, key, input_precision=PRECISION) + total[None, :]
        score = tl.sum(user.to(tl.float32) * so_far, 1)
        count = (before + begin + r + 1).to(tl.float32)
        tl.store(scores + origin + r * H, score / count, mask=inside)
        total += tl.sum(key.to(tl.float32), 0)
    tl.store(sums + at, total, mask=columns < R)


@triton.jit
def _backward_kernel(
    x, dscores, cu_pieces, carried, carried_count, out, last,
    REVERSE: tl.constexpr, H: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """du of one piece and head from x = k and the carried sum, or backwards in time dk from x = u and the gradient of `sums`, whose total
    is the carried sum's gradient, `last`."""
    p, h, first, length, before = _piece(cu_pieces, carried_count, H)
    columns = tl.arange(0, BR)
    at = (p * H + h) * R + columns
    total = tl.zeros((BR,), tl.float32)
    if carried is not None:
        total = tl.load(carried + at, mask=columns < R, other=0.0)
    r = tl.arange(0, BT)
    blocks = tl.cdiv(length, BT)
    for i in range(blocks):
        if REVERSE:
            begin = (blocks - 1 - i) * BT
        else:
            begin = i * BT
        inside = begin + r < length
        origin = (first + begin) * H + h
        value = _tile(x, origin, H, r, columns, inside, R, BR)
        weight = tl.load(dscores + origin + r * H, mask=inside, other=0.0) / (before + begin + r + 1).to(tl.float32)
        # Each row sums the tokens up to its own, or from its own on: a product with a triangle.
        if REVERSE:
            value = (value.to(tl.float32) * weight[:, None]).to(value.dtype)
            triangle = r[:, None] <= r[None, :]
        else:
            triangle = r[:, None] >= r[None, :]
        result = tl.dot(triangle.to(value.dtype), value, input_precision=PRECISION) + total[None, :]
        if not REVERSE:
            result *= weight[:, None]
        place = out + origin * R + (r[:, None] * (H * R) + columns[None, :])
        tl.store(place, result.to(out.dtype.element_ty), mask=inside[:, None] & (columns < R)[None, :])
        total += tl.sum(value.to(tl.float32), 0)
    if REVERSE:
        tl.store(last + at, total, mask=columns < R)


def _options(x: Tensor) -> dict[str, object]:
    """Launch options and sizes of a kernel."""
    padded = next_power_of_2(x.shape[3])
    launch = LAUNCH.lookup(padded * (1 if x.dtype == torch.bfloat16 else 2), capability_of(x.device))
    precision = "ieee" if interpreting() else "tf32x3" if x.dtype == torch.float32 else "tf32"
    return {"H": x.shape[2], "R": x.shape[3], "BR": padded, "PRECISION": precision, **launch.options()}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op("memzoo::memory_caching_online", mutates_args=())
def _forward(
    u: Tensor, k: Tensor, cu_pieces: Tensor, carried_sum: Tensor | None, carried_count: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(scores [1, total, H], sums [P, H, R])."""
    u, k, carried_sum = u.contiguous(), k.contiguous(), _contiguous(carried_sum)
    pieces, heads = cu_pieces.numel() - 1, u.shape[2]
    scores = u.new_empty(u.shape[:3], dtype=torch.float32)
    sums = u.new_empty(pieces, heads, u.shape[3], dtype=torch.float32)
    _forward_kernel[(pieces * heads,)](u, k, cu_pieces, carried_sum, carried_count, scores, sums, **_options(u))
    return scores, sums


@_forward.register_fake
def _(u, k, cu_pieces, carried_sum, carried_count):
    sums = u.new_empty(cu_pieces.shape[0] - 1, u.shape[2], u.shape[3], dtype=torch.float32)
    return u.new_empty(u.shape[:3], dtype=torch.float32), sums


@torch.library.custom_op("memzoo::memory_caching_online_backward", mutates_args=())
def _backward(
    dscores: Tensor,
    dsums: Tensor | None,
    u: Tensor,
    k: Tensor,
    cu_pieces: Tensor,
    carried_sum: Tensor | None,
    carried_count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dk, gradient of the carried sum [P, H, R])."""
    u, k, dscores = u.contiguous(), k.contiguous(), dscores.contiguous()
    carried_sum, dsums = _contiguous(carried_sum), _contiguous(dsums)
    du, dk = torch.empty_like(u), torch.empty_like(k)
    pieces, heads = cu_pieces.numel() - 1, u.shape[2]
    dcarried = u.new_empty(pieces, heads, u.shape[3], dtype=torch.float32)
    options = _options(u)
    for x, carried, out, last, reverse in ((k, carried_sum, du, None, False), (u, dsums, dk, dcarried, True)):
        _backward_kernel[(pieces * heads,)](x, dscores, cu_pieces, carried, carried_count, out, last, REVERSE=reverse, **options)
    return du, dk, dcarried


@_backward.register_fake
def _(dscores, dsums, u, k, cu_pieces, carried_sum, carried_count):
    du, dk = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, k))
    return du, dk, u.new_empty(cu_pieces.shape[0] - 1, u.shape[2], u.shape[3], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dscores, dsums):
    u, k, cu_pieces, carried_sum, carried_count = ctx.saved_tensors
    if dscores is None:
        dscores = u.new_zeros(u.shape[:3], dtype=torch.float32)
    du, dk, dcarried = _backward(dscores, dsums, u, k, cu_pieces, carried_sum, carried_count)
    return du, dk, None, None if carried_sum is None else dcarried, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def online_scores(
    u: Tensor, k: Tensor, cu_pieces: Tensor, carried_sum: Tensor | None, carried_count: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores of the segment that each token is in, by the mean of its keys up to the token (Memory Caching, arXiv 2602.24281, Eq. 10).

    Args:
        u, k: [1, total, H, R], of the same type.
        cu_pieces: [P + 1] of int64, where each piece starts; pieces may be empty, and cover all tokens. A piece is the tokens of one
            segment.
        carried_sum: [P, H, R] of float32, the sum of the segment's keys in earlier calls; zeros if None.
        carried_count: [P] of int64, how many those are; zeros if None.

    Returns:
        (scores [1, total, H], sums [P, H, R] of the segment's keys at the piece's end), both float32 and differentiable in u, k and
        carried_sum.
    """
    return _forward(u, k, cu_pieces.contiguous(), carried_sum, _contiguous(carried_count))


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability in bf16, with a carried sum; the largest in float32."""
    for dtype, size in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 256)):
        tokens = dict.fromkeys(("u", "k", "x", "out"), f"*{dtype}")
        numbers = dict.fromkeys(("scores", "dscores", "sums", "carried_sum", "carried", "last"), "*fp32")
        pointers = {**tokens, **numbers, "cu_pieces": "*i64", "carried_count": "*i64"}
        shape = {"H": 16, "R": size, "BR": size, "PRECISION": "tf32" if dtype == "bf16" else "tf32x3"}
        launch = LAUNCH.lookup(size if dtype == "bf16" else 2 * size, capability)
        parts = (
            ("forward", _forward_kernel, {}),
            ("du", _backward_kernel, {"REVERSE": False, "last": None}),
            ("dk", _backward_kernel, {"REVERSE": True}),
        )
        for name, kernel, more in parts:
            yield CompileSpec(
                f"memory_caching online {name} {size} {dtype}", kernel, pointers, {**shape, **more, **launch.blocks},
                launch.num_warps, launch.num_stages,
            )  # fmt: skip
