"""Triton kernels of the decode step: the scores of the cached memories of each sequence, and the read of those that were chosen.

States lie as [N, S, H, ...]: S slots a sequence, of which the first `count` hold a memory. Nothing is copied, grown or waited for, so the
step can be captured in a CUDA graph; slots beyond `count` and ids of -1 cost no bytes.

Bytes a sequence and head, with n cached memories and K chosen: scores read 4 R n (mean), 4 B R n (submax, B sub-blocks) or 4 R^2 n
(energy); the read moves 4 K Dk Dv. Two operations for each number read: bound by memory. At 128 x 128 a chosen memory is 64 KiB, 15 ns at
4.3 TB/s; 64 descriptors are 32 KiB (mean), 7.6 ns, or 4 MiB (energy), 0.98 microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_dim, check_shape
from ..common.launch import CompileSpec, Launch, LaunchTable, capability_of, next_power_of_2

# Keyed by the padded R: BE slots a program, or for energy one slot in tiles of BR rows. A read, keyed by the padded Dk, takes BE
# memories' rows at a time in BC columns.
SCORES = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BE": 64}),
    (128, 80): Launch(num_warps=4, num_stages=1, blocks={"BE": 32}),
    (256, 80): Launch(num_warps=4, num_stages=1, blocks={"BE": 16}),
})  # fmt: skip
ENERGY = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BR": 64}),
    (128, 80): Launch(num_warps=4, num_stages=1, blocks={"BR": 64}),
    (256, 80): Launch(num_warps=4, num_stages=1, blocks={"BR": 32}),
})  # fmt: skip
READ = LaunchTable({
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BE": 4, "BC": 32}),
    (128, 80): Launch(num_warps=4, num_stages=1, blocks={"BE": 2, "BC": 32}),
    (256, 80): Launch(num_warps=4, num_stages=1, blocks={"BE": 1, "BC": 32}),
})  # fmt: skip


@triton.jit(do_not_specialize=["S"])
def _scores_kernel(
    u, descriptors, count, out, S, H: tl.constexpr, B: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr
):
    """BE slots of one sequence and head: the largest u . d over a slot's B sub-blocks."""
    blocks = tl.cdiv(S, BE)
    slot = (tl.program_id(0) % blocks) * BE + tl.arange(0, BE)
    nh = tl.program_id(0) // blocks
    n = (nh // H).to(tl.int64)
    h = nh % H
    r = tl.arange(0, BR)
    cached = slot < tl.load(count + n)
    query = tl.load(u + nh.to(tl.int64) * R + r, mask=r < R, other=0.0).to(tl.float32)
    at = ((n * S + slot) * H + h) * (B * R)
    score = tl.full((BE,), -float("inf"), tl.float32)
    for b in range(B):
        d = tl.load(descriptors + (at + b * R)[:, None] + r[None, :], mask=cached[:, None] & (r < R)[None, :], other=0.0)
        score = tl.maximum(score, tl.sum(d * query[None, :], 1))
    tl.store(out + nh.to(tl.int64) * S + slot, tl.where(cached, score, -float("inf")), mask=slot < S)


@triton.jit(do_not_specialize=["S"])
def _energy_kernel(u, descriptors, count, out, S, H: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):
    """One slot of one sequence and head: u^T C u."""
    slot = tl.program_id(0) % S
    nh = (tl.program_id(0) // S).to(tl.int64)
    n = nh // H
    columns = tl.arange(0, BC)
    cached = slot < tl.load(count + n)
    query = tl.load(u + nh * R + columns, mask=columns < R, other=0.0).to(tl.float32)
    at = ((n * S + slot) * H + nh % H) * (R * R)
    total = tl.zeros((BC,), tl.float32)
    for start in range(0, tl.where(cached, R, 0), BR):
        rows = start + tl.arange(0, BR)
        mask = (rows < R)[:, None] & (columns < R)[None, :]
        c = tl.load(descriptors + at + (rows[:, None] * R + columns[None, :]), mask=mask, other=0.0)
        total += tl.sum(c * tl.load(u + nh * R + rows, mask=rows < R, other=0.0).to(tl.float32)[:, None], 0)
    tl.store(out + nh * S + slot, tl.where(cached, tl.sum(total * query, 0), -float("inf")))


@triton.jit(do_not_specialize=["S", "K"])
def _read_kernel(
    q, weights, ids, bank, online, online_weight, y, S, K,
    H: tl.constexpr, DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One sequence and head and a tile of columns: BE chosen memories at a time, their rows side by side."""
    TILES: tl.constexpr = (DC + BC - 1) // BC
    c = (tl.program_id(0) % TILES) * BC + tl.arange(0, BC)
    nh = (tl.program_id(0) // TILES).to(tl.int64)
    n = nh // H
    a = tl.arange(0, BE * BA) % BA
    query = tl.load(q + nh * DA + a, mask=a < DA, other=0.0).to(tl.float32)
    total = tl.zeros((BE * BA, BC), tl.float32)
    for start in range(0, K, BE):
        j = start + tl.arange(0, BE * BA) // BA
        slot = tl.load(ids + nh * K + j, mask=j < K, other=-1)
        chosen = (slot >= 0) & (a < DA)
        weight = tl.load(weights + nh * K + j, mask=chosen, other=0.0)
        at = ((n * S + slot) * H + nh % H) * (DA * DC) + a * DC
        memory = tl.load(bank + at[:, None] + c[None, :], mask=chosen[:, None] & (c < DC)[None, :], other=0.0)
        total += memory * (query * weight)[:, None]
    own = tl.load(online + nh * DC + c, mask=c < DC, other=0.0).to(tl.float32) * tl.load(online_weight + nh)
    tl.store(y + nh * DC + c, (own + tl.sum(total, 0)).to(y.dtype.element_ty), mask=c < DC)


@torch.library.custom_op("memzoo::memory_caching_step_scores", mutates_args=())
def _scores(u: Tensor, descriptors: Tensor, count: Tensor, routing: str) -> Tensor:
    u, descriptors, count = u.contiguous(), descriptors.contiguous(), count.contiguous()
    sequences, slots, heads = descriptors.shape[:3]
    size = u.shape[2]
    out = u.new_empty(sequences, heads, slots, dtype=torch.float32)
    padded = max(16, next_power_of_2(size))
    launch = (ENERGY if routing == "energy" else SCORES).lookup(padded, capability_of(u.device))
    if routing == "energy":
        _energy_kernel[(sequences * heads * slots,)](
            u, descriptors, count, out, slots, H=heads, R=size, BC=padded, **launch.options()
        )
    else:
        _scores_kernel[(sequences * heads * triton.cdiv(slots, launch.blocks["BE"]),)](
            u, descriptors, count, out, slots,
            H=heads, B=descriptors.shape[3] if routing == "submax" else 1, R=size, BR=padded, **launch.options(),
        )  # fmt: skip
    return out


@_scores.register_fake
def _(u, descriptors, count, routing):
    sequences, slots, heads = descriptors.shape[:3]
    return u.new_empty(sequences, heads, slots, dtype=torch.float32)


@torch.library.custom_op("memzoo::memory_caching_step_read", mutates_args=())
def _read(q: Tensor, weights: Tensor, ids: Tensor, bank: Tensor, online: Tensor, online_weight: Tensor) -> Tensor:
    arguments = [t.contiguous() for t in (q, weights, ids, bank, online, online_weight)]
    _, slots, heads, rows, columns = bank.shape
    y = q.new_empty(*q.shape[:2], columns)
    padded = max(16, next_power_of_2(rows))
    launch = READ.lookup(padded, capability_of(q.device))
    _read_kernel[(q.shape[0] * heads * triton.cdiv(columns, launch.blocks["BC"]),)](
        *arguments, y, slots, ids.shape[2], H=heads, DA=rows, DC=columns, BA=padded, **launch.options()
    )
    return y


@_read.register_fake
def _(q, weights, ids, bank, online, online_weight):
    return q.new_empty(*q.shape[:2], bank.shape[4])


DESCRIPTORS = {"mean": "[N, S, H, R]", "submax": "[N, S, H, B, R]", "energy": "[N, S, H, R, R]"}


def step_scores(u: Tensor, descriptors: Tensor, count: Tensor, routing: str) -> Tensor:
    """The score of each cached memory for the step's one token; no gradient.

    Arguments:
        u: [N, H, R], R up to 256.
        descriptors: float32, [N, S, H, R] for "mean", [N, S, H, B, R] for "submax", [N, S, H, R, R] for "energy".
        count: [N] int64: slot s of sequence n is cached if s < count[n].
        routing: "mean" (u . d), "submax" (the largest u . d over B sub-blocks) or "energy" (u^T C u).

    Returns:
        [N, H, S] float32, -inf where nothing is cached.

    Raises:
        ValueError: an unknown routing, or a shape that does not fit.
    """
    op = "step_scores"
    check_dim(op, "u", u, 3, "[N, H, R]")
    if routing not in DESCRIPTORS:
        raise ValueError(f"{op}: routing is {routing!r}, needs one of {', '.join(DESCRIPTORS)}")
    sequences, heads, size = u.shape
    check_dim(op, "descriptors", descriptors, 4 if routing == "mean" else 5, DESCRIPTORS[routing])
    inner = {"mean": (), "submax": descriptors.shape[3:4], "energy": (size,)}[routing]
    check_shape(op, "descriptors", descriptors, (sequences, descriptors.shape[1], heads, *inner, size), DESCRIPTORS[routing])
    check_shape(op, "count", count, (sequences,), "[N]")
    return _scores(u, descriptors, count, routing)


def step_read(q: Tensor, weights: Tensor, ids: Tensor, bank: Tensor, online: Tensor, online_weight: Tensor) -> Tensor:
    """y = online_weight * online + sum_j weights_j q M[ids_j], reading the chosen memories only; no gradient.

    Arguments:
        q: [N, H, Dk], Dk up to 256.
        weights, ids: [N, H, K] float32, and int64 slots of the token's own sequence, -1 for none.
        bank: [N, S, H, Dk, Dv] float32.
        online, online_weight: [N, H, Dv], [N, H] float32.

    Returns:
        [N, H, Dv] of q's dtype.

    Raises:
        ValueError: a shape that does not fit.
    """
    op = "step_read"
    check_dim(op, "q", q, 3, "[N, H, Dk]")
    check_dim(op, "ids", ids, 3, "[N, H, K]")
    check_dim(op, "bank", bank, 5, "[N, S, H, Dk, Dv]")
    sequences, heads, rows = q.shape
    check_shape(op, "bank", bank, (sequences, bank.shape[1], heads, rows, bank.shape[4]), "[N, S, H, Dk, Dv]")
    check_shape(op, "ids", ids, (sequences, heads, ids.shape[2]), "[N, H, K]")
    check_shape(op, "weights", weights, ids.shape, "[N, H, K]")
    check_shape(op, "online", online, (sequences, heads, bank.shape[4]), "[N, H, Dv]")
    check_shape(op, "online_weight", online_weight, (sequences, heads), "[N, H]")
    return _read(q, weights, ids, bank, online, online_weight)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability."""
    scores = {"u": "*bf16", "descriptors": "*fp32", "count": "*i64", "out": "*fp32", "S": "i32"}
    reads = {
        "q": "*bf16",
        "weights": "*fp32",
        "ids": "*i64",
        "bank": "*fp32",
        "online": "*bf16",
        "online_weight": "*fp32",
        "y": "*bf16",
    }
    for size in (64, 128, 256):
        launch = SCORES.lookup(size, capability)
        yield CompileSpec(
            f"memory_caching step scores {size}", _scores_kernel, scores, {"H": 16, "B": 16, "R": size, "BR": size, **launch.blocks},
            launch.num_warps, launch.num_stages,
        )  # fmt: skip
        launch = ENERGY.lookup(size, capability)
        yield CompileSpec(
            f"memory_caching step energy {size}", _energy_kernel, scores, {"H": 16, "R": size, "BC": size, **launch.blocks},
            launch.num_warps, launch.num_stages,
        )  # fmt: skip
        launch = READ.lookup(size, capability)
        yield CompileSpec(
            f"memory_caching step read {size}", _read_kernel, {**reads, "S": "i32", "K": "i32"},
            {"H": 16, "DA": size, "DC": size, "BA": size, **launch.blocks}, launch.num_warps, launch.num_stages,
        )  # fmt: skip
