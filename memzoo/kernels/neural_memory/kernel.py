"""Triton form of the neural memory: ops with their gradients, memory plan and limits; its kernels are in gates.py, matrix.py and mlp.py.

One program carries the state of a (sequence, head) from chunk to chunk. The forward for training stores W and S at every m-th chunk's start
only (`boundaries`); the backward goes super-chunk by super-chunk from the last, rebuilds the states of its chunks in scratch, and consumes
them. At most PROGRAMS programs run, each taking one (sequence, head) after another, so that scratch does not grow with the batch: with n
chunks in all and P programs, boundaries hold H n / m states and scratch P m, which is least at m = sqrt(H n / P). No weight copy a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from ..common.checks import sequence_count
from ..common.dispatch import interpreting
from ..common.launch import CompileSpec, capability_of
from .gates import prepare, prepare_backward
from .matrix import matrix_backward, matrix_forward, matrix_specs, matrix_step, matrix_window
from .mlp import mlp_backward, mlp_forward, mlp_specs, mlp_step
from .reference import NeuralMemoryState

OP = "neural_memory"
CHUNK_SIZES = (16, 32, 64, 128)
MAX_DIM, MAX_HIDDEN, HIDDEN_STEP = 128, 512, 16
PROGRAMS = 264  # two for each of an H200's multiprocessors


def check_triton(q: Tensor, v: Tensor, weights: Sequence[Tensor], chunk_size: int) -> None:
    """Raise ValueError for a size that the Triton kernels do not take; the other implementations take it."""
    hidden = weights[0].shape[-1] if len(weights) == 2 else None
    for fits, have in (
        (len(weights) <= 2, f"{len(weights)} layers"),
        (chunk_size in CHUNK_SIZES, f"chunk_size {chunk_size}"),
        (q.shape[3] <= MAX_DIM and v.shape[3] <= MAX_DIM, f"head dimensions {q.shape[3]} and {v.shape[3]}"),
        (hidden is None or (hidden <= MAX_HIDDEN and hidden % HIDDEN_STEP == 0), f"hidden width {hidden}"),
    ):
        if not fits:
            raise ValueError(
                f"{OP}: implementation 'triton' takes 1 or 2 layers, chunk_size {', '.join(map(str, CHUNK_SIZES))}, head dimensions up "
                f"to {MAX_DIM} and a hidden width that is a multiple of {HIDDEN_STEP} up to {MAX_HIDDEN}; got {have}: use 'chunked'"
            )


class Call:
    """What every launch of one call shares.

    `memory` is the weights of each layer, [H, Din, Dout], or, with `position` [N], a state: weights, momentum and start of each layer,
    float32 [N, H, Din, Dout]. Depth 1 has one layer [D, Dv], depth 2 has [D, F] and [F, Dv].
    `every` (m above): the state before chunk m j of sequence n, j >= 1, is boundaries[slot_starts[n] + j - 1, head], laid out
    layer by layer as W then S. `programs` is a multiple of H unless there are fewer (sequence, head)s: a program keeps to one head.
    """

    def __init__(self, q, k, v, lr, momentum, decay, memory, position, cu_seqlens, chunk_size, residual, loss, max_grad_norm):
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.lr, self.momentum, self.decay = lr.contiguous(), momentum.contiguous(), decay.contiguous()
        depth = len(memory) if position is None else len(memory) // 3
        memory = [x.contiguous() for x in memory]
        self.weights = memory[:depth]
        self.state_momentum, self.state_start = (
            (None, None) if position is None else (memory[depth : 2 * depth], memory[2 * depth :])
        )
        self.position = None if position is None else position.contiguous()
        self.cu_seqlens, self.chunk = cu_seqlens, chunk_size
        self.residual, self.loss, self.max_grad_norm = residual, loss, max_grad_norm
        self.batch, self.length, self.heads, self.dim = q.shape
        self.value_dim = v.shape[3]
        self.sequences = sequence_count(cu_seqlens, self.batch)
        self.capability = capability_of(q.device)
        self.precision = _precision(q)
        self.programs, self.every, self.slots = plan(
            q, self.weights, self.sequences, position is not None, cu_seqlens is not None, chunk_size
        )
        self.layers = [tuple(w.shape[-2:]) for w in self.weights]

    def slot_starts(self) -> Tensor:
        """The slot of each sequence's first boundary, [N] of int64."""
        if self.cu_seqlens is None:
            return torch.arange(self.sequences, device=self.q.device) * (self.slots // self.sequences)
        places = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()
        if self.position is not None:
            places = torch.where(places > 0, places + self.position, 0)
        slots = (places - 1).clamp(min=0) // (self.chunk * self.every)
        return slots.cumsum(0) - slots


def plan(
    q: Tensor, weights: Sequence[Tensor], sequences: int, has_state: bool, packed: bool, chunk_size: int
) -> tuple[int, int, int]:
    """(programs, chunks between boundaries, boundary slots) from shapes alone; packed, the slots are an upper bound."""
    batch, length, heads, _ = q.shape
    opened = chunk_size - 1 if has_state else 0
    programs = min(sequences * heads, max(heads, PROGRAMS // heads * heads))
    chunks = triton.cdiv(length, chunk_size) if packed else batch * triton.cdiv(length + opened, chunk_size)
    every = max(1, math.isqrt(max(heads * chunks // programs - 1, 0)) + 1)
    if len(weights) == 1:  # its backward runs a window of chunks at once
        every = matrix_window(q, weights[0], sequences, opened, packed, chunk_size)
    if packed:
        slots = (length + sequences * opened) // (chunk_size * every)
    else:
        slots = batch * ((length + opened - 1) // (chunk_size * every))
    return programs, every, slots


def _precision(x: Tensor) -> str:
    if interpreting():
        return "ieee"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _state_shapes(memory: Sequence[Tensor], position: Tensor | None, sequences: int) -> list[tuple[int, ...]]:
    depth = len(memory) if position is None else len(memory) // 3
    return [(sequences, *w.shape[-3:]) for w in memory[:depth]] * 3


def _boundary_shape(q, memory, position, cu_seqlens, chunk_size, keep) -> tuple[int, ...]:
    if not keep:
        return (0,)
    sequences = sequence_count(cu_seqlens, q.shape[0])
    depth = len(memory) if position is None else len(memory) // 3
    _, _, slots = plan(q, memory[:depth], sequences, position is not None, cu_seqlens is not None, chunk_size)
    return (slots, q.shape[2], 2 * sum(w.shape[-2] * w.shape[-1] for w in memory[:depth]))


@torch.library.custom_op("memzoo::neural_memory", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    memory: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    residual: bool,
    loss: str,
    max_grad_norm: float | None,
    output_final_state: bool,
    keep: bool,
) -> list[Tensor]:
    """[output, boundaries (empty unless `keep`), the final state's weights, momentum and start of each layer if asked for]."""
    call = Call(q, k, v, lr, momentum, decay, memory, position, cu_seqlens, chunk_size, residual, loss, max_grad_norm)
    y = torch.empty_like(call.v)
    boundaries = q.new_empty(_boundary_shape(q, memory, position, cu_seqlens, chunk_size, keep), dtype=torch.float32)
    shapes = _state_shapes(memory, position, call.sequences) if output_final_state else []
    final = [q.new_empty(shape, dtype=torch.float32) for shape in shapes]
    mask, scalars, _ = prepare(call.momentum, call.decay, call.position, cu_seqlens, chunk_size)
    run = matrix_forward if len(call.weights) == 1 else mlp_forward
    run(call, mask, scalars, y, final or None, boundaries if keep else None)
    return [y, boundaries, *final]


@_forward.register_fake
def _(
    q, k, v, lr, momentum, decay, memory, position, cu_seqlens, chunk_size, residual, loss, max_grad_norm, output_final_state, keep
):
    shapes = _state_shapes(memory, position, sequence_count(cu_seqlens, q.shape[0])) if output_final_state else []
    shapes = [_boundary_shape(q, memory, position, cu_seqlens, chunk_size, keep), *shapes]
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    return [y, *(q.new_empty(shape, dtype=torch.float32) for shape in shapes)]


@torch.library.custom_op("memzoo::neural_memory_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal: Sequence[Tensor],
    boundaries: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    memory: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    residual: bool,
    loss: str,
    max_grad_norm: float | None,
) -> list[Tensor]:
    """[dq, dk, dv, dlr, dmomentum, ddecay, a gradient for each tensor of `memory`]."""
    call = Call(q, k, v, lr, momentum, decay, memory, position, cu_seqlens, chunk_size, residual, loss, max_grad_norm)
    prepared = prepare(call.momentum, call.decay, call.position, cu_seqlens, chunk_size, keep_products=True)
    mask, scalars, _ = prepared
    dmask, dscalars = torch.empty_like(mask), torch.empty_like(scalars)
    dq, dk, dv = torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v)
    dlr = torch.empty_like(call.lr, dtype=torch.float32)
    dy = dy.contiguous()
    dfinal = [x.contiguous() for x in dfinal]
    run = matrix_backward if len(call.weights) == 1 else mlp_backward
    dmemory = run(call, mask, scalars, boundaries, dy, dfinal or None, dq, dk, dv, dlr, dmask, dscalars)
    dmomentum, ddecay = prepare_backward(
        call.momentum, call.decay, call.position, cu_seqlens, chunk_size, prepared, dmask, dscalars
    )
    dmemory = [g.to(x.dtype) for g, x in zip(dmemory, memory)]
    return [dq, dk, dv, dlr.to(lr.dtype), dmomentum.to(momentum.dtype), ddecay.to(decay.dtype), *dmemory]


@_backward.register_fake
def _(
    dy, dfinal, boundaries, q, k, v, lr, momentum, decay, memory, position, cu_seqlens, chunk_size, residual, loss, max_grad_norm
):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, lr, momentum, decay, *memory)]


def _setup_context(ctx, inputs, output):
    *tensors, memory, position, cu_seqlens, chunk_size, residual, loss, max_grad_norm, output_final_state, _ = inputs
    ctx.save_for_backward(output[1], *tensors, *memory, position, cu_seqlens)
    ctx.options = (chunk_size, residual, loss, max_grad_norm)
    ctx.outputs = [(x.shape, x.dtype, x.device) for x in output]
    ctx.set_materialize_grads(False)  # zeros for `boundaries` would be large


def _autograd(ctx, grads):
    boundaries, q, k, v, lr, momentum, decay, *memory, position, cu_seqlens = ctx.saved_tensors
    dy, _, *dfinal = (
        torch.zeros(shape, dtype=dtype, device=device) if g is None and i != 1 else g
        for i, (g, (shape, dtype, device)) in enumerate(zip(grads, ctx.outputs))
    )
    found = _backward(dy, dfinal, boundaries, q, k, v, lr, momentum, decay, memory, position, cu_seqlens, *ctx.options)
    return *found[:6], found[6:], *(None,) * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)


def neural_memory_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    weights: tuple[Tensor, ...],
    chunk_size: int,
    residual: bool,
    loss: str,
    max_grad_norm: float | None,
    initial_state: NeuralMemoryState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, NeuralMemoryState | None]:
    check_triton(q, v, weights, chunk_size)
    memory, position = list(weights), None
    if initial_state is not None:
        memory, position = [x for part in initial_state[:3] for x in part], initial_state.position
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, lr, momentum, decay, *memory))
    options = (chunk_size, residual, loss, max_grad_norm)
    y, _, *final = _forward(q, k, v, lr, momentum, decay, memory, position, cu_seqlens, *options, output_final_state, keep)
    if not output_final_state:
        return y, None
    if cu_seqlens is None:
        places = torch.full((q.shape[0],), q.shape[1], device=q.device)
    else:
        places = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    if position is not None:
        places = places + position
    depth = len(weights)
    parts = (tuple(final[i * depth : (i + 1) * depth]) for i in range(3))
    return y, NeuralMemoryState(*parts, places % chunk_size)


@torch.library.custom_op("memzoo::neural_memory_step", mutates_args=())
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    memory: Sequence[Tensor],
    position: Tensor,
    chunk_size: int,
    residual: bool,
    loss: str,
    max_grad_norm: float | None,
) -> list[Tensor]:
    """[output, the new state's weights, momentum and start of each layer]."""
    call = Call(q, k, v, lr, momentum, decay, memory, position, None, chunk_size, residual, loss, max_grad_norm)
    y = torch.empty_like(call.v)
    final = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in memory]
    run = matrix_step if len(call.weights) == 1 else mlp_step
    run(call, y, final)
    return [y, *final]


@_step.register_fake
def _(q, k, v, lr, momentum, decay, memory, position, chunk_size, residual, loss, max_grad_norm):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, *memory)]


def neural_memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    chunk_size: int,
    residual: bool,
    loss: str,
    max_grad_norm: float | None,
    state: NeuralMemoryState,
) -> tuple[Tensor, NeuralMemoryState]:
    """The decode step: T = 1 with a state, no gradient."""
    check_triton(q, v, state.weights, chunk_size)
    memory, depth = [x for part in state[:3] for x in part], len(state.weights)
    options = (chunk_size, residual, loss, max_grad_norm)
    y, *final = _step(q, k, v, lr, momentum, decay, memory, state.position, *options)
    parts = (tuple(final[i * depth : (i + 1) * depth]) for i in range(3))
    return y, NeuralMemoryState(*parts, (state.position + 1) % chunk_size)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability, in bf16, packed, with a clamp and states (the most registers)."""
    yield from matrix_specs(capability)
    yield from mlp_specs(capability)
