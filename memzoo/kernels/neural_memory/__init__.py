"""The neural memory of Titans: a matrix or an MLP that learns while it reads, by gradient steps with momentum and decay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import (
    check_cu_seqlens,
    check_device,
    check_dim,
    check_float,
    check_head_dim,
    check_same,
    check_shape,
    check_tensor,
    check_tokens,
    sequence_count,
)
from ..common.dispatch import resolve_implementation
from .chunked import neural_memory_chunked
from .reference import NeuralMemoryState, neural_memory_reference, read_memory

__all__ = ["NeuralMemoryState", "check_neural_memory", "check_neural_memory_state", "neural_memory", "read_memory"]

OP = "neural_memory"
LOSSES = ("l2", "dot")


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    weights: Sequence[Tensor],
    *,
    chunk_size: int,
    residual: bool | None = None,
    loss: str = "l2",
    max_grad_norm: float | None = None,
    initial_state: NeuralMemoryState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, NeuralMemoryState | None]:
    """`S_t = eta_t S_{t-1} - theta_t grad l(M_c; k_t, v_t)`, `M_t = (1 - alpha_t) M_{t-1} + S_t`, `y_t = M_t(q_t)`.

    M_c are the weights at the start of t's chunk, which lets the tokens of a chunk be written at once; the chunk's length is part of the
    model. The read sees token t's own write. Source: Behrouz et al. 2025, "Titans", Eq. 10 to 18, per-token gates.

    Args:
        q: queries, [B, T, H, D]; D a multiple of 8 from 16 to 256.
        k: keys, [B, T, H, D]. The caller normalises them: a gradient step grows with `||k||^2`.
        v: values, [B, T, H, Dv].
        lr: step sizes theta >= 0, [B, T, H].
        momentum: what the momentum keeps, eta from 0 to 1, [B, T, H]; None for 0.
        decay: what the weights lose, alpha from 0 to 1, [B, T, H]; None for 0.
        weights: M_0, the weights before the first token, one [H, Din, Dout] a layer: one is a matrix memory, two or more an MLP with
            GELU (erf form) between its layers. The first Din is D, the last Dout is Dv.
        chunk_size: tokens whose gradients are taken at the same weights, counted from each sequence's start.
        residual: M(x) = x + MLP(x), which needs Dv = D; None for yes with two layers or more.
        loss: "l2", `1/2 ||M(k) - v||^2`, or "dot", `-<M(k), v>` (deep linear attention).
        max_grad_norm: theta_t is lowered where the gradient of one token (all layers of one head) has a larger norm than this, above 0.
        initial_state: a NeuralMemoryState, as a call returned it; takes the place of `weights`, which then give the shapes only.
        output_final_state: also return the state after the last token.
        cu_seqlens: boundaries of packed sequences, [N + 1], with B = 1; sequences may be empty.
        implementation: "triton" (one or two layers), "chunked", "reference", or None for the one that fits the device.

    Returns:
        (output [B, T, H, Dv] in q's dtype, NeuralMemoryState in float32, float64 for float64 input, or None). Every tensor argument but
        cu_seqlens and the state's position has a gradient.

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    weights, momentum, decay, residual = check_neural_memory(
        OP, q, k, v, lr, momentum, decay, weights, chunk_size, residual, loss, max_grad_norm
    )
    batch, length = q.shape[:2]
    check_cu_seqlens(OP, cu_seqlens, batch, length)
    check_device(OP, "q", q, cu_seqlens=cu_seqlens)
    if initial_state is not None:
        initial_state = check_neural_memory_state(
            OP, initial_state, weights, sequence_count(cu_seqlens, batch), chunk_size, "initial_state", q
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    held = ()
    if initial_state is not None:
        held = [w for part in initial_state[:3] for w in part]
        parts = (tuple(w.to(dtype) for w in part) for part in initial_state[:3])
        initial_state = NeuralMemoryState(*parts, initial_state.position.to(q.device, torch.int64))

    chosen = resolve_implementation(OP, implementation, q)
    options = (chunk_size, bool(residual), loss, None if max_grad_norm is None else float(max_grad_norm))
    arguments = (q, k, v, lr, momentum, decay, weights, *options, initial_state, output_final_state, cu_seqlens)
    if chosen == "reference":
        return neural_memory_reference(*arguments)
    if chosen == "chunked":
        return neural_memory_chunked(*arguments)
    from .kernel import neural_memory_step, neural_memory_triton

    if length == 1 and cu_seqlens is None and initial_state is not None and output_final_state:
        inputs = (q, k, v, lr, momentum, decay, *held)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
            return neural_memory_step(q, k, v, lr, momentum, decay, *options, initial_state)
    return neural_memory_triton(*arguments)


def check_neural_memory(
    op: str, q, k, v, lr, momentum, decay, weights, chunk_size, residual, loss, max_grad_norm
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, bool]:
    """(weights, momentum and decay with zeros for None, whether M(x) = x + MLP(x)); raises what `neural_memory` documents."""
    check_dim(op, "q", q, 4, "[B, T, H, D]")
    check_tokens(op, "q", q)
    batch, length, heads, dim = q.shape
    check_shape(op, "k", k, (batch, length, heads, dim), "[B, T, H, D]")
    check_dim(op, "v", v, 4, "[B, T, H, Dv]")
    value_dim = v.shape[3]
    check_shape(op, "v", v, (batch, length, heads, value_dim), "[B, T, H, Dv]")
    check_head_dim(op, "q", dim)
    check_head_dim(op, "v", value_dim)
    weights = _check_weights(op, weights, heads, dim, value_dim)
    momentum, decay = (torch.zeros_like(lr) if gate is None else gate for gate in (momentum, decay))
    for name, gate in (("lr", lr), ("momentum", momentum), ("decay", decay)):
        check_shape(op, name, gate, (batch, length, heads), "[B, T, H]")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size!r}, needs an integer of at least 1")
    if residual is None:
        residual = len(weights) > 1
    if residual and value_dim != dim:
        raise ValueError(f"{op}: residual needs Dv = D, got {value_dim} and {dim}; pass residual=False")
    if loss not in LOSSES:
        raise ValueError(f"{op}: loss is {loss!r}, needs one of {', '.join(LOSSES)}")
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and 0 < max_grad_norm < math.inf):
        raise ValueError(f"{op}: max_grad_norm is {max_grad_norm!r}, needs a number above 0, or None")
    layers = {f"weights[{i}]": w for i, w in enumerate(weights)}
    check_float(op, q=q, k=k, v=v, lr=lr, momentum=momentum, decay=decay, **layers)
    check_same(op, "q", q, k=k, v=v)
    check_device(op, "q", q, lr=lr, momentum=momentum, decay=decay, **layers)
    return weights, momentum, decay, bool(residual)


def _check_weights(op: str, weights: Sequence[Tensor], heads: int, dim: int, value_dim: int) -> tuple[Tensor, ...]:
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence) or not weights:
        raise TypeError(f"{op}: weights must be a sequence of tensors [H, Din, Dout], got {type(weights).__name__}")
    have = dim
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        check_dim(op, name, weight, 3, "[H, Din, Dout]")
        out = value_dim if i == len(weights) - 1 else weight.shape[2]
        check_shape(op, name, weight, (heads, have, out), "[H, Din, Dout]")
        if out == 0:
            raise ValueError(f"{op}: {name} has shape {list(weight.shape)}: Dout must be at least 1")
        have = out
    return tuple(weights)


def check_neural_memory_state(
    op: str, state: NeuralMemoryState, weights: tuple[Tensor, ...], count: int, chunk_size: int, argument: str, q: Tensor
) -> NeuralMemoryState:
    """The state of `count` sequences; raises, naming `argument`, unless it fits these weights."""
    if not isinstance(state, tuple) or len(state) != len(NeuralMemoryState._fields):
        raise TypeError(f"{op}: {argument} must be a NeuralMemoryState, got {type(state).__name__}")
    state = NeuralMemoryState(*state)
    for name, part in zip(NeuralMemoryState._fields, state[:3]):
        if len(part) != len(weights):
            raise ValueError(f"{op}: {argument}.{name} has {len(part)} layers, needs {len(weights)}")
        for i, (have, weight) in enumerate(zip(part, weights)):
            check_shape(op, f"{argument}.{name}[{i}]", have, (count, *weight.shape), "[N, H, Din, Dout]")
            check_float(op, **{f"{argument}.{name}[{i}]": have})
            check_device(op, "q", q, **{f"{argument}.{name}[{i}]": have})
    check_tensor(op, f"{argument}.position", state.position)
    check_shape(op, f"{argument}.position", state.position, (count,), "[N]")
    if state.position.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {argument}.position has dtype {state.position.dtype}, needs int64")
    if state.position.device.type == "cpu" and not torch.compiler.is_compiling():  # where reading the values costs nothing
        places = state.position.tolist()
        if not all(0 <= place < chunk_size for place in places):
            raise ValueError(f"{op}: {argument}.position is {places[:8]}, needs 0 to chunk_size - 1 = {chunk_size - 1}")
    return state
