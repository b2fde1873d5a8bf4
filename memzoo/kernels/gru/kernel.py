"""Triton kernels of the GRU: one persistent program a head and tile of sequences, forward and backward; checked against the definition.

`forward` holds the head's three recurrent weights (6 D^2 bytes in bf16, in shared memory) and walks forward in time: three products
[16, D] x [D, D], gates, one store of h. Loads run two steps ahead. The backward saves inputs and h. One
batched product over all tokens gives the recurrent parts of the gates again; `backward` holds the transposed weights, walks back and
writes the gradients of x and, over the recurrent parts themselves, theirs (they differ by the reset gate in the candidate); one batched
product gives the weight's gradient and one sum the bias's.

For each token and head in bf16, in brackets at D = 64:
    forward   8 D bytes (512; all of them compulsory: x 6 D, h 2 D)            6 D^2 operations (25 k)
    backward  50 D bytes (3,200; compulsory 16 D: x, dx 6 D, h, dh 2 D)        18 D^2 operations (74 k)
At 4.3 TB/s and 790 TFLOP/s bytes decide: 0.12 ns forward, 0.74 ns backward (compulsory 0.24). As with lstm that floor is for many
sequences; with few, the chain of dependent steps decides.
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
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
    (128, 80): Launch(num_warps=8, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
})  # fmt: skip
BACKWARD = LaunchTable({
    (16, 80): Launch(num_warps=1, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
    (32, 80): Launch(num_warps=2, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
    (64, 80): Launch(num_warps=4, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
    (128, 80): Launch(num_warps=8, num_stages=1, blocks={"BN": 16, "STAGES": 2}),
    (128, 90): Launch(num_warps=8, num_stages=1, blocks={"BN": 16, "STAGES": 3}),
})  # fmt: skip


@triton.jit
def _gates(a, t, first, length, head, H, D: tl.constexpr, BD: tl.constexpr):
    """The tile's r, z, n at time t, in the type they are held in."""
    at, inside = at_time(t, first, length, head, H, D, BD, 3)
    r = tl.load(a + at, mask=inside, other=0.0)
    z = tl.load(a + at + D, mask=inside, other=0.0)
    n = tl.load(a + at + 2 * D, mask=inside, other=0.0)
    return r, z, n


@triton.jit
def _bias(bias, head, D: tl.constexpr, BD: tl.constexpr):
    i = tl.arange(0, BD)
    return tl.load(bias + head * D + i, mask=i < D, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["N", "T"])
def _forward_kernel(
    x, weight, bias, initial, y, final, cu_seqlens, N, T, H,
    D: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """h of every token, and after the last."""
    head, n, first, length = rows(cu_seqlens, N, T, H, VARLEN, BN)
    w_r = load_weight(weight, head, 0, 3, D, BD, False)
    w_z = load_weight(weight, head, 1, 3, D, BD, False)
    w_n = load_weight(weight, head, 2, 3, D, BD, False)
    shift = tl.broadcast_to(_bias(bias, head, D, BD), (BN, BD))
    at, held = at_state(n, N, head, H, D, BD)
    h = tl.load(initial + at, mask=held, other=0.0)
    steps = tl.max(length)
    for t in tl.range(0, steps, num_stages=STAGES):
        x_r, x_z, x_n = _gates(x, t, first, length, head, H, D, BD)
        last = h.to(w_r.dtype)
        r = sigmoid(tl.dot(last, w_r, acc=x_r.to(tl.float32), input_precision=PRECISION))
        z = sigmoid(tl.dot(last, w_z, acc=x_z.to(tl.float32), input_precision=PRECISION))
        new = tanh(x_n.to(tl.float32) + r * tl.dot(last, w_n, acc=shift, input_precision=PRECISION))
        token, inside = at_time(t, first, length, head, H, D, BD, 1)
        h = tl.where(inside, new + z * (h - new), h)
        tl.store(y + token, h.to(y.dtype.element_ty), mask=inside)
    at, held = at_state(unknown(n, steps), N, head, H, D, BD)
    tl.store(final + at, h, mask=held)


@triton.jit
def _load(x, t, first, length, head, H, D: tl.constexpr, BD: tl.constexpr):
    """The tile's tokens at time t of [.., H, D], zeros before the first and after the last."""
    at, inside = at_time(t, first, length, head, H, D, BD, 1)
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["N", "T"])
def _backward_kernel(
    x, recurrent, weight, bias, before, dy, dfinal, dx, dinitial, cu_seqlens, N, T, H,
    D: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of the recurrent parts of the gates (over those parts themselves), and of the initial states."""
    head, n, first, length = rows(cu_seqlens, N, T, H, VARLEN, BN)
    w_r = load_weight(weight, head, 0, 3, D, BD, True)
    w_z = load_weight(weight, head, 1, 3, D, BD, True)
    w_n = load_weight(weight, head, 2, 3, D, BD, True)
    shift = _bias(bias, head, D, BD)
    at, held = at_state(n, N, head, H, D, BD)
    dh = tl.load(dfinal + at, mask=held, other=0.0)
    steps = tl.max(length)
    for step in tl.range(0, steps, num_stages=STAGES):
        t = steps - 1 - step
        x_r, x_z, x_n = _gates(x, t, first, length, head, H, D, BD)
        a_r, a_z, a_n = _gates(recurrent, t, first, length, head, H, D, BD)
        last = _load(before, t, first, length, head, H, D, BD).to(tl.float32)
        outer = _load(dy, t, first, length, head, H, D, BD).to(tl.float32)
        r, z = sigmoid(x_r.to(tl.float32) + a_r.to(tl.float32)), sigmoid(x_z.to(tl.float32) + a_z.to(tl.float32))
        candidate = a_n.to(tl.float32) + shift
        new = tanh(x_n.to(tl.float32) + r * candidate)
        total = dh + outer
        d_new = total * (1 - z) * (1 - new * new)
        d_r = (d_new * candidate * r * (1 - r)).to(w_r.dtype)
        d_z = (total * (last - new) * z * (1 - z)).to(w_r.dtype)
        d_n = (d_new * r).to(w_r.dtype)
        token, inside = at_time(t, first, length, head, H, D, BD, 3)
        tl.store(dx + token, d_r, mask=inside)
        tl.store(dx + token + D, d_z, mask=inside)
        tl.store(dx + token + 2 * D, d_new.to(dx.dtype.element_ty), mask=inside)
        tl.store(recurrent + token, d_r, mask=inside)
        tl.store(recurrent + token + D, d_z, mask=inside)
        tl.store(recurrent + token + 2 * D, d_n, mask=inside)
        back = tl.dot(d_r, w_r, acc=total * z, input_precision=PRECISION)
        back = tl.dot(d_z, w_z, acc=back, input_precision=PRECISION)
        back = tl.dot(d_n, w_n, acc=back, input_precision=PRECISION)
        dh = tl.where(inside, back, dh)
    at, held = at_state(unknown(n, steps), N, head, H, D, BD)
    tl.store(dinitial + at, dh, mask=held)


@torch.library.custom_op("memzoo::gru", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, final h)."""
    x, weight, bias, initial = (t.contiguous() for t in (x, weight, bias, initial))
    y, final = x.new_empty(*x.shape[:3], x.shape[4]), torch.empty_like(initial)
    call = Call(x, initial, cu_seqlens)
    grid, options = call.launch(FORWARD)
    _forward_kernel[grid](x, weight, bias, initial, y, final, cu_seqlens, call.count, x.shape[1], call.heads, **options)
    return y, final


@_forward.register_fake
def _(x, weight, bias, initial, cu_seqlens):
    return x.new_empty(*x.shape[:3], x.shape[4]), initial.new_empty(initial.shape)


@torch.library.custom_op("memzoo::gru_backward", mutates_args=())
def _backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, y: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dinitial)."""
    dy, dfinal, x, weight, bias = (t.contiguous() for t in (dy, dfinal, x, weight, bias))
    h_before = before(y, initial, cu_seqlens)
    recurrent, dx, dinitial = torch.empty_like(x), torch.empty_like(x), torch.empty_like(dfinal)
    torch.bmm(by_head(h_before), weight.flatten(2), out=by_head(recurrent))
    call = Call(x, initial, cu_seqlens)
    grid, options = call.launch(BACKWARD)
    _backward_kernel[grid](
        x, recurrent, weight, bias, h_before, dy, dfinal, dx, dinitial, cu_seqlens, call.count, x.shape[1], call.heads, **options
    )
    dbias = recurrent[:, :, :, 2].sum((0, 1), dtype=torch.float32).to(bias.dtype)
    return dx, weight_gradient(h_before, recurrent), dbias, dinitial


@_backward.register_fake
def _(dy, dfinal, x, weight, bias, initial, y, cu_seqlens):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, bias, initial))


def _setup_context(ctx, inputs, output):
    x, weight, bias, initial, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, initial, output[0], cu_seqlens)


def _autograd(ctx, dy, dfinal):
    return *_backward(dy, dfinal, *ctx.saved_tensors), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def gru_triton(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    check_fits("gru", x)
    return _forward(x, weight, bias, initial, cu_seqlens)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability, packed, in bf16 and float32.

    In float32 the assembler may spill a few values, which and how many depends on its version; in bf16 none.
    """
    states = dict.fromkeys(("initial", "final", "dfinal", "dinitial"), "*fp32")
    sizes = {"cu_seqlens": "*i64", "N": "i32", "T": "i32", "H": "i32"}
    for name, kernel, table in (("forward", _forward_kernel, FORWARD), ("backward", _backward_kernel, BACKWARD)):
        for kind, width, precision in (("bf16", 1, "tf32"), ("fp32", 2, "tf32x3")):
            tensors = dict.fromkeys(("x", "recurrent", "weight", "bias", "before", "y", "dy", "dx"), f"*{kind}")
            for size in sorted({size // width for size, _ in table.entries if size // width >= 16}):
                launch = table.lookup(size * width, capability)
                constants = {"D": size, "BD": size, "VARLEN": True, "PRECISION": precision, **launch.blocks}
                yield CompileSpec(
                    f"gru {name} {size}, {kind}", kernel, {**tensors, **states, **sizes}, constants,
                    launch.num_warps, launch.num_stages, spill_limit=0 if kind == "bf16" else 32,
                )  # fmt: skip
