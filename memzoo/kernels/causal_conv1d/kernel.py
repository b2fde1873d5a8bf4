"""Triton kernels of the causal convolution: forward, backward and one decode step; checked against the definition.

Bytes: forward reads x and writes y once (taps re-read neighbours from L1/L2), 4 B an element in bf16; backward reads x, dy and
writes dz, dx. All are bound by memory: at 4.3 TB/s the forward's floor is 0.93 ps an element. Operations: 2 W an element.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch, LaunchTable, capability_of
from ..common.packing import chunk_indices

# Channels take the place of the head dimension: one entry serves any number of them.
ANY = 2**31
FORWARD = LaunchTable({(ANY, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 32, "BC": 64})})
BACKWARD = LaunchTable({(ANY, 80): Launch(num_warps=4, num_stages=2, blocks={"BT": 32, "BC": 64})})
STEP = LaunchTable({(ANY, 80): Launch(num_warps=4, num_stages=1, blocks={"BC": 256})})


@triton.jit
def _locate(cu_seqlens, chunks, T, BT: tl.constexpr, VARLEN: tl.constexpr):
    """(sequence, first token of this program in its sequence, sequence's first row in memory, its length); length 0 if idle."""
    if VARLEN:
        n = tl.load(chunks + tl.program_id(0) * 2)
        chunk = tl.load(chunks + tl.program_id(0) * 2 + 1)
        first = tl.load(cu_seqlens + tl.maximum(n, 0)).to(tl.int64)
        length = (tl.load(cu_seqlens + tl.maximum(n, 0) + 1).to(tl.int64) - first).to(tl.int32)
        length = tl.where(n < 0, 0, length)
    else:
        n = tl.program_id(2)
        chunk = tl.program_id(0)
        first = n.to(tl.int64) * T
        length = T
    return n, chunk * BT, first, length


@triton.jit
def _window(x, initial_state, n, first, length, rows, columns, lag, C, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Inputs `lag` tokens before `rows` as float32: from x, before the first token from the state, else zero."""
    at = rows - lag
    inside = columns < C
    value = tl.load(
        x + (first + at[:, None]) * C + columns[None, :],
        mask=(at >= 0)[:, None] & (at < length)[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    if HAS_STATE:
        row = W - 1 + at
        value += tl.load(
            initial_state + (n.to(tl.int64) * (W - 1) + row[:, None]) * C + columns[None, :],
            mask=((at < 0) & (row >= 0) & (rows < length))[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x, weight, bias, initial_state, y, cu_seqlens, chunks, T, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, VARLEN: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, start, first, length = _locate(cu_seqlens, chunks, T, BT, VARLEN)
    if start >= length:
        return
    rows = start + tl.arange(0, BT)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = columns < C
    total = tl.zeros((BT, BC), tl.float32)
    for w in tl.static_range(W):
        tap = tl.load(weight + columns * W + w, mask=inside, other=0.0).to(tl.float32)
        total += tap[None, :] * _window(x, initial_state, n, first, length, rows, columns, W - 1 - w, C, W, HAS_STATE)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(
        y + (first + rows[:, None]) * C + columns[None, :],
        total.to(y.dtype.element_ty),
        mask=(rows < length)[:, None] & inside[None, :],
    )


@triton.jit(do_not_specialize=["T"])
def _backward_taps_kernel(
    x, weight, bias, initial_state, dy, dz, dweight, dbias, cu_seqlens, chunks, T, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, VARLEN: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dz = dy activation'(z), with z recomputed, and this program's share of dweight [program, C, W] and dbias [program, C]."""
    program = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = columns < C
    n, start, first, length = _locate(cu_seqlens, chunks, T, BT, VARLEN)
    rows = start + tl.arange(0, BT)
    mask = (rows < length)[:, None] & inside[None, :]
    grad = tl.load(dy + (first + rows[:, None]) * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = tl.zeros((BT, BC), tl.float32)
        for w in tl.static_range(W):
            tap = tl.load(weight + columns * W + w, mask=inside, other=0.0).to(tl.float32)
            z += tap[None, :] * _window(x, initial_state, n, first, length, rows, columns, W - 1 - w, C, W, HAS_STATE)
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate = tl.sigmoid(z)
        grad = grad * gate * (1.0 + z * (1.0 - gate))
        tl.store(dz + (first + rows[:, None]) * C + columns[None, :], grad, mask=mask)
    for w in tl.static_range(W):
        seen = _window(x, initial_state, n, first, length, rows, columns, W - 1 - w, C, W, HAS_STATE)
        tl.store(dweight + (program * C + columns) * W + w, tl.sum(grad * seen, 0), mask=inside)
    if HAS_BIAS:
        tl.store(dbias + program * C + columns, tl.sum(grad, 0), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _backward_input_kernel(
    dz, weight, dx, cu_seqlens, chunks, T, C,
    W: tl.constexpr, VARLEN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx[t] = sum_w weight[w] dz[t + W - 1 - w], over the tokens of the same sequence."""
    n, start, first, length = _locate(cu_seqlens, chunks, T, BT, VARLEN)
    if start >= length:
        return
    rows = start + tl.arange(0, BT)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = columns < C
    total = tl.zeros((BT, BC), tl.float32)
    for w in tl.static_range(W):
        at = rows + (W - 1 - w)
        tap = tl.load(weight + columns * W + w, mask=inside, other=0.0).to(tl.float32)
        total += tap[None, :] * tl.load(
            dz + (first + at[:, None]) * C + columns[None, :], mask=(at < length)[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
    tl.store(
        dx + (first + rows[:, None]) * C + columns[None, :],
        total.to(dx.dtype.element_ty),
        mask=(rows < length)[:, None] & inside[None, :],
    )


@triton.jit
def _step_kernel(
    x, weight, bias, state, y, new_state, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One token a sequence: read the window once, write the output and the window moved on by one."""
    n = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = columns < C
    token = tl.load(x + n * C + columns, mask=inside, other=0.0)
    total = token.to(tl.float32) * tl.load(weight + columns * W + W - 1, mask=inside, other=0.0).to(tl.float32)
    for w in tl.static_range(W - 1):
        row = tl.load(state + (n * (W - 1) + w) * C + columns, mask=inside, other=0.0)
        total += row.to(tl.float32) * tl.load(weight + columns * W + w, mask=inside, other=0.0).to(tl.float32)
        if w > 0:
            tl.store(new_state + (n * (W - 1) + w - 1) * C + columns, row, mask=inside)
    tl.store(new_state + (n * (W - 1) + W - 2) * C + columns, token, mask=inside)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(y + n * C + columns, total.to(y.dtype.element_ty), mask=inside)


def _grid(x: Tensor, cu_seqlens: Tensor | None, launch: Launch) -> tuple[tuple[int, int, int], Tensor | None]:
    batch, length, channels = x.shape
    blocks = launch.blocks
    if cu_seqlens is None:
        return (triton.cdiv(length, blocks["BT"]), triton.cdiv(channels, blocks["BC"]), batch), None
    chunks = chunk_indices(cu_seqlens, length, blocks["BT"])
    return (chunks.shape[0], triton.cdiv(channels, blocks["BC"]), 1), chunks


@torch.library.custom_op("memzoo::causal_conv1d_forward", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    y = torch.empty_like(x)
    launch = FORWARD.lookup(1, capability_of(x.device))
    grid, chunks = _grid(x, cu_seqlens, launch)
    _forward_kernel[grid](
        x, weight, bias, initial_state, y, cu_seqlens, chunks, x.shape[1], x.shape[2],
        W=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, HAS_STATE=initial_state is not None,
        VARLEN=cu_seqlens is not None, **launch.options(),
    )  # fmt: skip
    return y


@_forward.register_fake
def _(x, weight, bias, silu, initial_state, cu_seqlens):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("memzoo::causal_conv1d_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dinitial_state); the last two are empty when there is no such input."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    batch, _, channels = x.shape
    width = weight.shape[1]
    launch = BACKWARD.lookup(1, capability_of(x.device))
    grid, chunks = _grid(x, cu_seqlens, launch)
    programs = grid[0] * batch if cu_seqlens is None else grid[0]
    dz = torch.empty_like(x, dtype=torch.float32) if silu else dy
    dx = torch.empty_like(x)
    dweight = x.new_empty(programs, channels, width, dtype=torch.float32)
    dbias = x.new_empty(programs if bias is not None else 0, channels, dtype=torch.float32)
    _backward_taps_kernel[grid](
        x, weight, bias, initial_state, dy, dz, dweight, dbias, cu_seqlens, chunks, x.shape[1], channels,
        W=width, SILU=silu, HAS_BIAS=bias is not None, HAS_STATE=initial_state is not None,
        VARLEN=cu_seqlens is not None, **launch.options(),
    )  # fmt: skip
    _backward_input_kernel[grid](
        dz, weight, dx, cu_seqlens, chunks, x.shape[1], channels,
        W=width, VARLEN=cu_seqlens is not None, **launch.options(),
    )  # fmt: skip
    dbias = dbias.sum(0).to(x.dtype) if bias is not None else x.new_empty(0)
    dstate = _state_gradient(dz, weight, initial_state, cu_seqlens) if initial_state is not None else x.new_empty(0)
    return dx, dweight.sum(0).to(weight.dtype), dbias, dstate


def _state_gradient(dz: Tensor, weight: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Only the first W - 1 tokens of a sequence see the state, so this touches W - 1 rows a sequence: plain torch."""
    reach = weight.shape[1] - 1
    count = initial_state.shape[0]
    index = torch.arange(reach, device=dz.device)
    if cu_seqlens is None:
        firsts = torch.arange(count, device=dz.device) * dz.shape[1]
        lengths = torch.full_like(firsts, dz.shape[1])
    else:
        firsts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    rows = (firsts[:, None] + index).clamp(max=dz.shape[0] * dz.shape[1] - 1)
    head = dz.reshape(-1, dz.shape[2])[rows].float() * (index < lengths[:, None])[..., None]
    out = torch.zeros_like(initial_state, dtype=torch.float32)
    for row in range(reach):  # state row r is seen by token t <= r through tap r - t
        for token in range(row + 1):
            out[:, row] += head[:, token] * weight[:, row - token].float()
    return out.to(initial_state.dtype)


@_backward.register_fake
def _(dy, x, weight, bias, silu, initial_state, cu_seqlens):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        x.new_empty(0) if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, silu, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.silu = silu


def _autograd(ctx, dy):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dstate = _backward(dy, x, weight, bias, ctx.silu, initial_state, cu_seqlens)
    return dx, dweight, dbias if bias is not None else None, None, dstate if initial_state is not None else None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("memzoo::causal_conv1d_step", mutates_args=())
def _step(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, state = x.contiguous(), weight.contiguous(), state.contiguous()
    y, new_state = torch.empty_like(x), torch.empty_like(state)
    launch = STEP.lookup(1, capability_of(x.device))
    grid = (triton.cdiv(x.shape[2], launch.blocks["BC"]), x.shape[0])
    _step_kernel[grid](
        x, weight, bias, state, y, new_state, x.shape[2],
        W=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, **launch.options(),
    )  # fmt: skip
    return y, new_state


@_step.register_fake
def _(x, weight, bias, silu, state):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(state, memory_format=torch.contiguous_format),
    )


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return _forward(x, weight, bias, activation == "silu", initial_state, cu_seqlens)


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The decode step: T = 1 with a state, no gradient."""
    return _step(x, weight, bias, activation == "silu", state)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability, in bf16, with bias, state and SiLU (the most registers)."""
    flags = {"W": 4, "SILU": True, "HAS_BIAS": True, "HAS_STATE": True, "VARLEN": True}
    varlen = {"cu_seqlens": "*i64", "chunks": "*i32", "T": "i32", "C": "i32"}
    inputs = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "initial_state": "*bf16"}
    forward = FORWARD.lookup(1, capability)
    yield CompileSpec(
        "causal_conv1d forward", _forward_kernel, {**inputs, "y": "*bf16", **varlen}, {**flags, **forward.blocks},
        forward.num_warps, forward.num_stages, ("C",),
    )  # fmt: skip
    backward = BACKWARD.lookup(1, capability)
    yield CompileSpec(
        "causal_conv1d backward taps", _backward_taps_kernel,
        {**inputs, "dy": "*bf16", "dz": "*fp32", "dweight": "*fp32", "dbias": "*fp32", **varlen}, {**flags, **backward.blocks},
        backward.num_warps, backward.num_stages, ("C",),
    )  # fmt: skip
    yield CompileSpec(
        "causal_conv1d backward input", _backward_input_kernel,
        {"dz": "*fp32", "weight": "*bf16", "dx": "*bf16", **varlen}, {"W": 4, "VARLEN": True, **backward.blocks},
        backward.num_warps, backward.num_stages, ("C",),
    )  # fmt: skip
    step = STEP.lookup(1, capability)
    yield CompileSpec(
        "causal_conv1d step", _step_kernel,
        {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "state": "*bf16", "y": "*bf16", "new_state": "*bf16", "C": "i32"},
        {"W": 4, "SILU": True, "HAS_BIAS": True, **step.blocks}, step.num_warps, step.num_stages, ("C",),
    )  # fmt: skip
