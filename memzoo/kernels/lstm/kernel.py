"""Triton kernels of the LSTM: one persistent program a head and tile of sequences, forward and backward; checked against the definition.

`forward` holds the head's four recurrent weights (8 D^2 bytes in bf16, in shared memory) and walks forward in time: four products
[16, D] x [D, D], gates, one store of h (or the output gate) and one of c. Loads run two steps ahead. The backward saves
inputs, outputs and cells. One batched product over all tokens gives every `a_t = x_t + h_{t-1} W` again; `backward` holds the transposed
weights, walks back and writes the gradients of a over a itself; one batched product gives the weight's gradient. Carrying that gradient
in the walk, or both the weights and their transposes, would not fit.

For each token and head in bf16, in brackets at D = 64:
    forward   12 D bytes (768; all of them compulsory: x 8 D, h, c 2 D)        8 D^2 operations (33 k)
    backward  68 D bytes (4,352; compulsory 22 D: x, dx 8 D, h, c, dh 2 D)     24 D^2 operations (98 k)
At 4.3 TB/s and 790 TFLOP/s bytes decide: 0.18 ns forward, 1.0 ns backward (compulsory 0.33). An exponential and a reciprocal in each of
five functions come close: 10 D at 16 a clock and multiprocessor, 0.17 ns. With few sequences that floor is out of reach: each step waits
for the one before it through a product, an exchange among warps and those functions (1.4 to 3.2 us a step in published fused kernels
on an H100 at D = 16 to 128), however few rows its tile has. What fills the chip is sequences: the segments of a memory that restarts
multiply the rows and divide the steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch, LaunchTable
from ..common.recurrent import before
from ..common.recurrent_kernel import (
    Call,
    at_state,
    at_time,
    by_head,
    check_fits,
    load_weight,
    rows,
    sigmoid,
    tanh,
    unknown,
    weight_gradient,
)

# Keyed by the padded D, twice that in float32. BN: rows of a tile; STAGES: steps in flight, as many as shared memory has room for beside
# the weights. More warps than D / 8 would compute the same columns twice.
FORWARD = LaunchTable({
    (16, 80): Launch(num_warps=1, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
    (32, 80): Launch(num_warps=2, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BN": 16, "STAGES": 4}),
    (128, 80): Launch(num_warps=8, num_stages=1, blocks={"BN": 16, "STAGES": 2}),
    (128, 90): Launch(num_warps=8, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
})  # fmt: skip
BACKWARD = LaunchTable({
    (16, 80): Launch(num_warps=1, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
    (32, 80): Launch(num_warps=2, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
    (128, 80): Launch(num_warps=8, num_stages=1, blocks={"BN": 16, "STAGES": 1}),
    (128, 90): Launch(num_warps=8, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
})  # fmt: skip


@triton.jit
def _gates(a, t, first, length, head, H, D: tl.constexpr, BD: tl.constexpr):
    """The tile's i, f, g, o at time t, in the type they are held in."""
    at, inside = at_time(t, first, length, head, H, D, BD, 4)
    i = tl.load(a + at, mask=inside, other=0.0)
    f = tl.load(a + at + D, mask=inside, other=0.0)
    g = tl.load(a + at + 2 * D, mask=inside, other=0.0)
    o = tl.load(a + at + 3 * D, mask=inside, other=0.0)
    return i, f, g, o


@triton.jit(do_not_specialize=["N", "T"])
def _forward_kernel(
    x, weight, initial_h, initial_c, y, c, final_h, final_c, cu_seqlens, N, T, H,
    D: tl.constexpr, CELLS: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """h (or the output gate, with CELLS) and c of every token, and both after the last."""
    head, n, first, length = rows(cu_seqlens, N, T, H, VARLEN, BN)
    w_i = load_weight(weight, head, 0, 4, D, BD, False)
    w_f = load_weight(weight, head, 1, 4, D, BD, False)
    w_g = load_weight(weight, head, 2, 4, D, BD, False)
    w_o = load_weight(weight, head, 3, 4, D, BD, False)
    at, held = at_state(n, N, head, H, D, BD)
    h = tl.load(initial_h + at, mask=held, other=0.0)
    cell = tl.load(initial_c + at, mask=held, other=0.0)
    steps = tl.max(length)
    for t in tl.range(0, steps, num_stages=STAGES):
        a_i, a_f, a_g, a_o = _gates(x, t, first, length, head, H, D, BD)
        last = h.to(w_i.dtype)
        i = sigmoid(tl.dot(last, w_i, acc=a_i.to(tl.float32), input_precision=PRECISION))
        g = tanh(tl.dot(last, w_g, acc=a_g.to(tl.float32), input_precision=PRECISION))
        f = sigmoid(tl.dot(last, w_f, acc=a_f.to(tl.float32), input_precision=PRECISION))
        o = sigmoid(tl.dot(last, w_o, acc=a_o.to(tl.float32), input_precision=PRECISION))
        token, inside = at_time(t, first, length, head, H, D, BD, 1)
        cell = tl.where(inside, f * cell + i * g, cell)
        h = tl.where(inside, o * tanh(cell), h)
        tl.store(y + token, (o if CELLS else h).to(y.dtype.element_ty), mask=inside)
        tl.store(c + token, cell.to(c.dtype.element_ty), mask=inside)
    at, held = at_state(unknown(n, steps), N, head, H, D, BD)
    tl.store(final_h + at, h, mask=held)
    tl.store(final_c + at, cell, mask=held)


@triton.jit
def _load(x, t, first, length, head, H, D: tl.constexpr, BD: tl.constexpr):
    """The tile's tokens at time t of [.., H, D], zeros before the first and after the last."""
    at, inside = at_time(t, first, length, head, H, D, BD, 1)
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["N", "T"])
def _backward_kernel(
    a, weight, initial_c, c, dy, dc_given, dfinal_h, dfinal_c, dinitial_h, dinitial_c, cu_seqlens, N, T, H,
    D: tl.constexpr, CELLS: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates, over the gates themselves, and of the initial states."""
    head, n, first, length = rows(cu_seqlens, N, T, H, VARLEN, BN)
    w_i = load_weight(weight, head, 0, 4, D, BD, True)
    w_f = load_weight(weight, head, 1, 4, D, BD, True)
    w_g = load_weight(weight, head, 2, 4, D, BD, True)
    w_o = load_weight(weight, head, 3, 4, D, BD, True)
    at, held = at_state(n, N, head, H, D, BD)
    dh = tl.load(dfinal_h + at, mask=held, other=0.0)
    dc = tl.load(dfinal_c + at, mask=held, other=0.0)
    oldest = tl.load(initial_c + at, mask=held, other=0.0)
    steps = tl.max(length)
    for step in tl.range(0, steps, num_stages=STAGES):
        t = steps - 1 - step
        a_i, a_f, a_g, a_o = _gates(a, t, first, length, head, H, D, BD)
        bent = tanh(_load(c, t, first, length, head, H, D, BD).to(tl.float32))
        earlier = tl.where(t == 0, oldest, _load(c, t - 1, first, length, head, H, D, BD).to(tl.float32))
        outer = _load(dy, t, first, length, head, H, D, BD).to(tl.float32)
        i, f = sigmoid(a_i.to(tl.float32)), sigmoid(a_f.to(tl.float32))
        g, o = tanh(a_g.to(tl.float32)), sigmoid(a_o.to(tl.float32))
        if CELLS:
            outer_c = _load(dc_given, t, first, length, head, H, D, BD).to(tl.float32)
            total_o = outer + dh * bent
            total_c = dc + outer_c + dh * o * (1 - bent * bent)
        else:
            total_o = (outer + dh) * bent
            total_c = dc + (outer + dh) * o * (1 - bent * bent)
        d_i = (total_c * g * i * (1 - i)).to(w_i.dtype)
        d_f = (total_c * earlier * f * (1 - f)).to(w_i.dtype)
        d_g = (total_c * i * (1 - g * g)).to(w_i.dtype)
        d_o = (total_o * o * (1 - o)).to(w_i.dtype)
        token, inside = at_time(t, first, length, head, H, D, BD, 4)
        tl.store(a + token, d_i, mask=inside)
        tl.store(a + token + D, d_f, mask=inside)
        tl.store(a + token + 2 * D, d_g, mask=inside)
        tl.store(a + token + 3 * D, d_o, mask=inside)
        back = tl.dot(d_i, w_i, input_precision=PRECISION)
        back = tl.dot(d_f, w_f, acc=back, input_precision=PRECISION)
        back = tl.dot(d_g, w_g, acc=back, input_precision=PRECISION)
        back = tl.dot(d_o, w_o, acc=back, input_precision=PRECISION)
        dh = tl.where(inside, back, dh)
        dc = tl.where(inside, total_c * f, dc)
    at, held = at_state(unknown(n, steps), N, head, H, D, BD)
    tl.store(dinitial_h + at, dh, mask=held)
    tl.store(dinitial_c + at, dc, mask=held)


@torch.library.custom_op("memzoo::lstm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, initial_h: Tensor, initial_c: Tensor, cells: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h, or with `cells` the output gate; c; final h; final c)."""
    x, weight, initial_h, initial_c = (t.contiguous() for t in (x, weight, initial_h, initial_c))
    y, c = (x.new_empty(*x.shape[:3], x.shape[4]) for _ in range(2))
    final_h, final_c = torch.empty_like(initial_h), torch.empty_like(initial_c)
    call = Call(x, initial_h, cu_seqlens)
    grid, options = call.launch(FORWARD)
    _forward_kernel[grid](
        x,
        weight,
        initial_h,
        initial_c,
        y,
        c,
        final_h,
        final_c,
        cu_seqlens,
        call.count,
        x.shape[1],
        call.heads,
        CELLS=cells,
        **options,
    )
    return y, c, final_h, final_c


@_forward.register_fake
def _(x, weight, initial_h, initial_c, cells, cu_seqlens):
    y, c = (x.new_empty(*x.shape[:3], x.shape[4]) for _ in range(2))
    return y, c, initial_h.new_empty(initial_h.shape), initial_c.new_empty(initial_c.shape)


@torch.library.custom_op("memzoo::lstm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dc: Tensor | None,
    dfinal_h: Tensor,
    dfinal_c: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    y: Tensor,
    c: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dinitial_h, dinitial_c); with a gradient of c, y is the output gate, else h."""
    dy, dfinal_h, dfinal_c, weight, initial_c = (t.contiguous() for t in (dy, dfinal_h, dfinal_c, weight, initial_c))
    cells = dc is not None
    dc = dc.contiguous() if cells else None
    h = (y.float() * c.float().tanh()).to(y.dtype) if cells else y
    h_before = before(h, initial_h, cu_seqlens)
    a = x.clone(memory_format=torch.contiguous_format)
    by_head(a).baddbmm_(by_head(h_before), weight.flatten(2))
    dinitial_h, dinitial_c = torch.empty_like(dfinal_h), torch.empty_like(dfinal_c)
    call = Call(x, initial_c, cu_seqlens)
    grid, options = call.launch(BACKWARD)
    _backward_kernel[grid](
        a, weight, initial_c, c, dy, dc, dfinal_h, dfinal_c, dinitial_h, dinitial_c, cu_seqlens, call.count, x.shape[1], call.heads,
        CELLS=cells, **options,
    )  # fmt: skip
    return a, weight_gradient(h_before, a), dinitial_h, dinitial_c


@_backward.register_fake
def _(dy, dc, dfinal_h, dfinal_c, x, weight, initial_h, initial_c, y, c, cu_seqlens):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, initial_h, initial_c))


def _setup_context(ctx, inputs, output):
    x, weight, initial_h, initial_c, cells, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, initial_h, initial_c, output[0], output[1], cu_seqlens)
    ctx.cells = cells
    ctx.set_materialize_grads(False)  # zeros for c would be large


def _autograd(ctx, dy, dc, dfinal_h, dfinal_c):
    x, weight, initial_h, initial_c, y, c, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dc = (torch.zeros_like(c) if dc is None else dc) if ctx.cells else None
    dfinal_h, dfinal_c = (torch.zeros_like(initial_h) if d is None else d for d in (dfinal_h, dfinal_c))
    return *_backward(dy, dc, dfinal_h, dfinal_c, x, weight, initial_h, initial_c, y, c, cu_seqlens), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def lstm_triton(
    x: Tensor, weight: Tensor, initial_h: Tensor, initial_c: Tensor, return_cells: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor | tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    check_fits("lstm", x)
    y, c, final_h, final_c = _forward(x, weight, initial_h, initial_c, return_cells, cu_seqlens)
    return (y, c) if return_cells else y, (final_h, final_c)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability, packed and with the cells' gradients (the most registers), in bf16 and float32.

    In float32 the assembler may spill a few values, which and how many depends on its version; in bf16 none.
    """
    states = dict.fromkeys(
        ("initial_h", "initial_c", "final_h", "final_c", "dfinal_h", "dfinal_c", "dinitial_h", "dinitial_c"), "*fp32"
    )
    sizes = {"cu_seqlens": "*i64", "N": "i32", "T": "i32", "H": "i32"}
    for name, kernel, table in (("forward", _forward_kernel, FORWARD), ("backward", _backward_kernel, BACKWARD)):
        for kind, width, precision in (("bf16", 1, "tf32"), ("fp32", 2, "tf32x3")):
            tensors = dict.fromkeys(("x", "a", "weight", "y", "c", "dy", "dc_given"), f"*{kind}")
            for size in sorted({size // width for size, _ in table.entries if size // width >= 16}):
                launch = table.lookup(size * width, capability)
                constants = {"D": size, "BD": size, "CELLS": True, "VARLEN": True, "PRECISION": precision, **launch.blocks}
                yield CompileSpec(
                    f"lstm {name} {size}, {kind}", kernel, {**tensors, **states, **sizes}, constants,
                    launch.num_warps, launch.num_stages, spill_limit=0 if kind == "bf16" else 32,
                )  # fmt: skip
