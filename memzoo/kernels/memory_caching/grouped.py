"""Triton kernels of the sparse read: each (token, choice) pair reads one cached memory, the pairs of a memory side by side.

A gather of a matrix for each pair would move 4 Din Dout bytes for 2 Din Dout operations. So the pairs are sorted by memory, in the order
of their tokens, and `_read_kernel` gives a program up to BLOCK pairs of one memory: it gathers their rows, multiplies them by the memory
once and scatters the results. The gradient of the rows is the same read of dy with the memories transposed, summed over a token's
choices. `_bank_kernel` sums x^T dy over the pairs of one memory, a tile of it a program, so nothing is summed across programs.

Bytes a (token, choice) pair and head in bf16, with n the pairs of a memory: the forward reads and writes 2 (Din + Dout), the sort about
70 (16-bit keys) and the memory 4 Din Dout / n, from L2 4 Din Dout / BLOCK; 580 at 128 x 128 with n large, 0.14 ns at 4.3 TB/s. Operations:
2 Din Dout, 33 k, 0.04 ns at 790 TFLOP/s: bound by memory. The backward reads dy twice and x once, 2 (Din + 2 Dout), and passes the
gradients of the rows through float32 where a token has several choices, 8 Din: 1,800 at 128 x 128, 0.42 ns, with 66 kFLOP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_device, check_dim, check_shape
from ..common.dispatch import interpreting
from ..common.launch import CompileSpec, Launch, LaunchTable, capability_of, next_power_of_2
from ..common.packing import chunk_indices

BLOCK = 128  # pairs a program of the read: what one load of a memory serves
MAX_DIM = 512

# Keyed by the larger side of a memory. A read contracts BA at a time into BC columns; a gradient is a tile of BA rows and BC columns,
# summed over BT pairs at a time. The first table is for products in bf16, the second for those in tf32.
READ = (
    LaunchTable({
        (64, 80): Launch(num_warps=4, num_stages=2, blocks={"BA": 64, "BC": 64}),
        (512, 80): Launch(num_warps=8, num_stages=2, blocks={"BA": 64, "BC": 128}),
    }),
    LaunchTable({
        (512, 80): Launch(num_warps=8, num_stages=2, blocks={"BA": 32, "BC": 64}),
        (512, 100): Launch(num_warps=4, num_stages=2, blocks={"BA": 32, "BC": 64}),
    }),
)  # fmt: skip
BANK = (
    LaunchTable({
        (64, 80): Launch(num_warps=4, num_stages=3, blocks={"BT": 64, "BA": 64, "BC": 64}),
        (512, 80): Launch(num_warps=8, num_stages=3, blocks={"BT": 64, "BA": 128, "BC": 128}),
    }),
    LaunchTable({(512, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 32, "BA": 64, "BC": 64})}),
)  # fmt: skip


class Groups(NamedTuple):
    """The (token, head, choice) pairs of a call, counted as ids [total, H, K] lie in memory, in groups of head h and memory m.

    Group h (M + 1) + m; the last of each head, m = M, holds the pairs without a memory.
    """

    order: Tensor  # [total H K] int64: pairs by group
    offsets: Tensor  # [H (M + 1) + 1] int64: where each group starts in `order`
    programs: Tensor  # [programs, 2] int32: (group, BLOCK of its pairs), -1 for none


def group_choices(ids: Tensor, memories: int) -> Groups:
    """Sort the pairs of `ids` [1, total, H, K] (-1 for none) by which of `memories` they read; waits for nothing."""
    heads, pairs, groups = ids.shape[2], ids.numel(), ids.shape[2] * (memories + 1)
    head = torch.arange(heads, device=ids.device).unsqueeze(1) * (memories + 1)
    keys = (torch.where(ids < 0, memories, ids) + head).flatten()
    keys = keys.to(torch.int16 if groups < 2**15 else torch.int32)  # the sort's passes are as many as the key has bytes
    keys, order = torch.sort(keys, stable=True)
    offsets = torch.searchsorted(keys, torch.arange(groups + 1, device=ids.device, dtype=keys.dtype))
    return Groups(order, offsets, chunk_indices(offsets, pairs, BLOCK)[:pairs])


@triton.jit(do_not_specialize=["M"])
def _read_kernel(
    x, bank, out, order, offsets, programs, M,
    H: tl.constexpr, K: tl.constexpr, DA: tl.constexpr, DC: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BT pairs of one memory and a tile of columns: out[pair] = x[pair // K] @ memory [DA, DC], which TRANSPOSED lies as [DC, DA]."""
    TILES: tl.constexpr = (DC + BC - 1) // BC
    c = (tl.program_id(0) % TILES) * BC + tl.arange(0, BC)
    p = tl.program_id(0) // TILES
    group = tl.load(programs + p * 2)
    idle = group < 0
    group = tl.maximum(group, 0)
    begin = tl.load(offsets + group) + tl.load(programs + p * 2 + 1).to(tl.int64) * BT
    end = tl.where(idle, begin, tl.load(offsets + group + 1))
    h = group // (M + 1)
    m = group % (M + 1)
    at = bank + (m.to(tl.int64) * H + h) * (DA * DC)

    place = begin + tl.arange(0, BT)
    inside = place < end
    pair = tl.load(order + place, mask=inside, other=0)
    source = x + (pair // K) * DA
    result = tl.zeros((BT, BC), tl.float32)
    for start in range(0, tl.where(idle | (m == M), 0, DA), BA):  # a pair without a memory reads zeros
        a = start + tl.arange(0, BA)
        left = tl.load(source[:, None] + a[None, :], mask=inside[:, None] & (a < DA)[None, :], other=0.0)
        if left.dtype == tl.float16:
            left = left.to(tl.float32)  # a memory is a long sum, which float16 may not hold
        if TRANSPOSED:
            right = at + (a[:, None] + c[None, :] * DA)
        else:
            right = at + (a[:, None] * DC + c[None, :])
        right = tl.load(right, mask=(a < DA)[:, None] & (c < DC)[None, :], other=0.0).to(left.dtype)
        result = tl.dot(left, right, acc=result, input_precision=PRECISION)
    target = out + (pair * DC)[:, None] + c[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside[:, None] & (c < DC)[None, :])


@triton.jit(do_not_specialize=["M"])
def _bank_kernel(
    x, dy, dbank, order, offsets, M,
    H: tl.constexpr, K: tl.constexpr, DA: tl.constexpr, DC: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile of one memory's gradient: the sum over its pairs of x[pair // K]^T dy[pair]."""
    ROWS: tl.constexpr = (DA + BA - 1) // BA
    COLUMNS: tl.constexpr = (DC + BC - 1) // BC
    tile = tl.program_id(0) % (ROWS * COLUMNS)
    a = (tile // COLUMNS) * BA + tl.arange(0, BA)
    c = (tile % COLUMNS) * BC + tl.arange(0, BC)
    mh = tl.program_id(0) // (ROWS * COLUMNS)
    group = (mh % H) * (M + 1) + mh // H
    begin = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    result = tl.zeros((BA, BC), tl.float32)
    for start in range(begin, end, BT):
        place = start + tl.arange(0, BT)
        inside = place < end
        pair = tl.load(order + place, mask=inside, other=0)
        left = tl.load(x + ((pair // K) * DA)[:, None] + a[None, :], mask=inside[:, None] & (a < DA)[None, :], other=0.0)
        right = tl.load(dy + (pair * DC)[:, None] + c[None, :], mask=inside[:, None] & (c < DC)[None, :], other=0.0)
        result = tl.dot(tl.trans(left), right, acc=result, input_precision=PRECISION)
    target = dbank + mh.to(tl.int64) * (DA * DC) + (a[:, None] * DC + c[None, :])
    tl.store(target, result, mask=(a < DA)[:, None] & (c < DC)[None, :])


def _precision(x: Tensor) -> str:
    if interpreting():
        return "ieee"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _options(table: LaunchTable, x: Tensor, a: int, c: int) -> dict[str, int]:
    """Launch options for a memory with sides a and c, with tiles no larger than those need."""
    options = table.lookup(max(a, c), capability_of(x.device)).options()
    for name, size in (("BA", a), ("BC", c)):
        options[name] = min(options[name], max(16, next_power_of_2(size)))
    return options


def _read(x: Tensor, bank: Tensor, groups: Groups, choices: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """[pairs, columns] of `dtype`: row `pair // choices` of x [rows, contracted] times the pair's memory, or its transpose."""
    memories, heads, contracted, columns = bank.shape
    if transposed:
        contracted, columns = columns, contracted
    options = _options(READ[x.dtype != torch.bfloat16], x, contracted, columns)
    out = x.new_empty(groups.order.numel(), columns, dtype=dtype)
    _read_kernel[(groups.programs.shape[0] * triton.cdiv(columns, options["BC"]),)](
        x, bank, out, *groups, memories,
        H=heads, K=choices, DA=contracted, DC=columns, TRANSPOSED=transposed, PRECISION=_precision(x), BT=BLOCK, **options,
    )  # fmt: skip
    return out


@torch.library.custom_op("memzoo::grouped_read", mutates_args=())
def _forward(x: Tensor, bank: Tensor, order: Tensor, offsets: Tensor, programs: Tensor, choices: int) -> Tensor:
    """[pairs, Dout] of x [pairs / choices, Din]."""
    return _read(x.contiguous(), bank.contiguous(), Groups(order, offsets, programs), choices, False, x.dtype)


@_forward.register_fake
def _(x, bank, order, offsets, programs, choices):
    return x.new_empty(order.shape[0], bank.shape[3])


@torch.library.custom_op("memzoo::grouped_read_input_gradient", mutates_args=())
def _input_gradient(dy: Tensor, bank: Tensor, order: Tensor, offsets: Tensor, programs: Tensor, choices: int) -> Tensor:
    dtype = dy.dtype if choices == 1 else torch.float32
    dx = _read(dy.contiguous(), bank.contiguous(), Groups(order, offsets, programs), 1, True, dtype)
    return dx if choices == 1 else dx.unflatten(0, (-1, choices)).sum(1).to(dy.dtype)


@_input_gradient.register_fake
def _(dy, bank, order, offsets, programs, choices):
    return dy.new_empty(order.shape[0] // choices, bank.shape[2])


@torch.library.custom_op("memzoo::grouped_read_bank_gradient", mutates_args=())
def _bank_gradient(x: Tensor, dy: Tensor, bank: Tensor, order: Tensor, offsets: Tensor, choices: int) -> Tensor:
    """The gradient of `bank`, of which only the shape is read."""
    memories, heads, rows, columns = bank.shape
    options = _options(BANK[x.dtype == torch.float32], x, rows, columns)
    dbank = torch.empty_like(bank, memory_format=torch.contiguous_format)
    _bank_kernel[(memories * heads * triton.cdiv(rows, options["BA"]) * triton.cdiv(columns, options["BC"]),)](
        x.contiguous(), dy.contiguous(), dbank, order, offsets, memories,
        H=heads, K=choices, DA=rows, DC=columns, PRECISION=_precision(x), **options,
    )  # fmt: skip
    return dbank


@_bank_gradient.register_fake
def _(x, dy, bank, order, offsets, choices):
    return torch.empty_like(bank, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.choices = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dy):
    x, bank, order, offsets, programs = ctx.saved_tensors
    dx = dbank = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, bank, order, offsets, programs, ctx.choices)
    if ctx.needs_input_grad[1]:
        dbank = _bank_gradient(x, dy, bank, order, offsets, ctx.choices)
    return dx, dbank, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _check(x: Tensor, ids: Tensor, bank: Tensor) -> None:
    op = "grouped_read"
    check_dim(op, "ids", ids, 4, "[1, total, H, K]")
    check_dim(op, "bank", bank, 4, "[M, H, Din, Dout]")
    if ids.dtype != torch.int64 or bank.dtype != torch.float32:
        raise TypeError(f"{op}: ids and bank have dtypes {ids.dtype} and {bank.dtype}, need torch.int64 and torch.float32")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: x has dtype {x.dtype}, needs one of float32, bfloat16, float16")
    for name, size in (("rows", bank.shape[2]), ("columns", bank.shape[3])):
        if not 16 <= size <= MAX_DIM or size % 8:
            raise ValueError(f"{op}: a memory of bank has {size} {name}, needs a multiple of 8 from 16 to {MAX_DIM}")
    if ids.shape[0] != 1 or ids.numel() == 0:
        raise ValueError(f"{op}: ids has shape {list(ids.shape)}, needs [1, total, H, K] with nothing empty")
    check_shape(op, "bank", bank, (bank.shape[0], ids.shape[2], *bank.shape[2:]), "[M, H, Din, Dout]")
    if x.dim() == 5:
        check_shape(op, "x", x, (*ids.shape, bank.shape[2]), "[1, total, H, K, Din]")
    else:
        check_shape(op, "x", x, (*ids.shape[:3], bank.shape[2]), "[1, total, H, Din]")
    check_device(op, "x", x, ids=ids, bank=bank)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not -1 <= ids.min() <= ids.max() < bank.shape[0]:
        raise ValueError(f"{op}: ids go from {ids.min()} to {ids.max()}, need -1 to {bank.shape[0] - 1}")


def grouped_read(x: Tensor, ids: Tensor, bank: Tensor, groups: Groups | None = None) -> Tensor:
    """out[t, h, j] = x[t, h] @ bank[ids[t, h, j], h], zeros where the id is -1. Differentiable in x and bank.

    Arguments:
        x: [1, total, H, Din], or [1, total, H, K, Din] where each choice has a row of its own (an MLP memory's second layer);
            float32, bfloat16 or float16.
        ids: [1, total, H, K] int64 below M, -1 for none.
        bank: [M, H, Din, Dout] float32; Din and Dout are multiples of 8 from 16 to 512.
        groups: `group_choices(ids, M)`, where several reads share it.

    Returns:
        [1, total, H, K, Dout] of x's dtype.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; on the CPU also an id outside -1 to M - 1.
    """
    _check(x, ids, bank)
    groups = group_choices(ids, bank.shape[0]) if groups is None else groups
    choices = 1 if x.dim() == 5 else ids.shape[3]
    return _forward(x.reshape(-1, x.shape[-1]), bank, *groups, choices).view(*ids.shape, bank.shape[3])


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability, at the largest memory that each serves."""
    where = {"order": "*i64", "offsets": "*i64", "M": "i32"}
    for index, (kind, precision) in enumerate((("bf16", "tf32"), ("fp32", "tf32x3"))):
        tokens = {"x": f"*{kind}", "dy": f"*{kind}"}
        for size in (64, 512):
            shape = {"H": 16, "DA": size, "DC": size, "PRECISION": precision}
            launch = READ[index].lookup(size, capability)
            for name, transposed, choices, out in (("read", False, 4, kind), ("input gradient", True, 1, "fp32")):
                yield CompileSpec(
                    f"grouped {name} {kind} {size}", _read_kernel,
                    {**tokens, **where, "bank": "*fp32", "out": f"*{out}", "programs": "*i32"},
                    {"K": choices, "TRANSPOSED": transposed, "BT": BLOCK, **shape, **launch.blocks}, launch.num_warps, launch.num_stages,
                )  # fmt: skip
            launch = BANK[index].lookup(size, capability)
            yield CompileSpec(
                f"grouped bank gradient {kind} {size}", _bank_kernel, {**tokens, **where, "dbank": "*fp32"},
                {"K": 4, **shape, **launch.blocks}, launch.num_warps, launch.num_stages,
            )  # fmt: skip
