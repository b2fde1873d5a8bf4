"""The neural memory chunk by chunk in plain torch, at any depth: what a CPU runs, forward and backward.

Within a chunk all gradients are taken at the same weights, so the recurrences of momentum and weights are linear in them. With
`E[t,i] = prod_{i<m<=t} eta_m`, `D[t,i] = prod_{i<m<=t} (1 - alpha_m)` (both lower triangular), `e = prod eta`, `beta = prod (1 - alpha)`,
`A = D E` and `c = D e`, layer by layer with its input rows X for the keys, H for the queries, and its output gradients G (times theta):

    H W_t = beta_t H W + c_t H S - (A . H X^T) G                  what row t reads from this layer, without any copy of the weights
    W' = beta_b W + c_b S - (A[b] X)^T G,   S' = e_b S - (E[b] X)^T G        after the chunk's last token

Products of gates are taken as products (cumprod), which is exact for gates of 0 and 1 and has their gradients; logarithms have neither.
Only the writes run chunk after chunk; the reads of several chunks are done at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import pack, unpack
from .reference import NeuralMemoryState, read_memory

# What a layer gives [N, H, L, Dout] for its input rows [N, H, L, Din], from (layer, rows, that, the weights after the last token, the token
# [N, L] that each row belongs to).
Mix = Callable[[int, Tensor, Tensor, tuple[Tensor, ...], Tensor], Tensor]

GROUP = 16  # chunks whose states are held for one batched read


def neural_memory_chunked(
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
    mix: Mix | None = None,
) -> tuple[Tensor, NeuralMemoryState | None]:
    """See `neural_memory`; `mix` may change what each layer gives, for memories that are read together with others."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    total, output_dtype = q.shape[1], q.dtype
    tokens = [x.to(dtype) for x in (q, k, v, lr, momentum, decay)]
    lengths = None
    if cu_seqlens is not None:
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        tokens = [unpack(x, cu_seqlens) for x in tokens]
    count = tokens[0].shape[0]
    position = None if initial_state is None else initial_state.position
    if initial_state is None:
        running = tuple(w.to(dtype).expand(count, *w.shape) for w in weights)
        state = NeuralMemoryState(running, tuple(torch.zeros_like(w) for w in running), running, None)
    else:
        state = initial_state
    inner = (residual, loss, max_grad_norm)
    if total == 1 and cu_seqlens is None:
        output, state = _one_token(*tokens, state, chunk_size, *inner, mix)
    else:
        output, state = _chunks(*tokens, state, position, lengths, chunk_size, *inner, mix)
    if cu_seqlens is not None:
        output = pack(output, cu_seqlens, total)
    return output.to(output_dtype), state if output_final_state else None


def gradients(weights, k, v, theta, residual, loss, max_grad_norm) -> tuple[list[Tensor], list[Tensor]]:
    """(inputs of each layer, theta times the gradients at each layer's output) for rows k [..., T, D]; a layer's gradient is x^T g."""
    inputs, before = [k], []
    for weight in weights[:-1]:
        before.append(inputs[-1] @ weight)
        inputs.append(F.gelu(before[-1]))
    if loss == "dot":
        grads = [-v]
    else:
        read = inputs[-1] @ weights[-1]
        grads = [(read + k if residual else read) - v]
    for weight, z in zip(reversed(weights[1:]), reversed(before)):
        slope = 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        grads.insert(0, (grads[0] @ weight.mT) * slope)
    if max_grad_norm is not None:
        # Each layer's gradient has rank one, so its norm is |x| |g|. theta min(1, max / norm), without a division by 0.
        squares = sum(x.square().sum(-1, keepdim=True) * g.square().sum(-1, keepdim=True) for x, g in zip(inputs, grads))
        theta = theta * max_grad_norm * squares.clamp(min=max_grad_norm**2).rsqrt()
    return inputs, [theta * g for g in grads]


def _one_token(q, k, v, lr, momentum, decay, state, chunk_size, residual, loss, max_grad_norm, mix):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    theta, eta, alpha = (x[:, 0, :, None, None] for x in (lr, momentum, decay))
    position, start = state.position, state.start
    if position is None:
        position = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    closed = (position == 0)[:, None, None, None]
    start = tuple(torch.where(closed, w, s) for w, s in zip(state.weights, start))
    inputs, grads = gradients(start, k, v, theta, residual, loss, max_grad_norm)
    surprise = tuple(eta * s - x.mT @ g for s, x, g in zip(state.momentum, inputs, grads))
    running = tuple((1 - alpha) * w + s for w, s in zip(state.weights, surprise))
    position = (position + 1) % chunk_size
    closed = (position == 0)[:, None, None, None]
    start = tuple(torch.where(closed, w, s) for w, s in zip(running, start))
    if mix is None:
        read = read_memory(running, q, residual)
    else:
        rows, at = q, position.new_zeros(len(q), 1)
        for layer, weight in enumerate(running):
            rows = mix(layer, rows, rows @ weight, running, at)
            rows = F.gelu(rows) if layer < len(running) - 1 else rows
        read = q + rows if residual else rows
    output = read.transpose(1, 2)
    return output, NeuralMemoryState(running, surprise, start, position)


class _Spans(torch.autograd.Function):
    """P[t, i] = prod_{i<m<=t} gate_m, lower triangular, row by row: P[t] = gate_t P[t-1] + onehot(t). Exact for gates of 0, and a third of
    the passes over [size, size] that cumprod and its gradient make."""

    @staticmethod
    def forward(ctx, gates: Tensor) -> Tensor:
        size = gates.shape[-1]
        spans = torch.eye(size, dtype=gates.dtype, device=gates.device).expand(*gates.shape, size).clone()
        rows = spans.unbind(-2)
        for t in range(1, size):
            rows[t].addcmul_(gates[..., t, None], rows[t - 1])
        ctx.save_for_backward(gates, spans)
        return spans

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        gates, spans = ctx.saved_tensors
        rows, grads = spans.unbind(-2), grad.unbind(-2)
        following, changes = grads[-1], []
        for t in range(gates.shape[-1] - 1, 0, -1):
            changes.append((following * rows[t - 1]).sum(-1))
            following = torch.addcmul(grads[t - 1], gates[..., t, None], following)
        changes.append(torch.zeros_like(gates[..., 0]))  # no row has the first gate
        return torch.stack(changes[::-1], -1)


def _spans(gates: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return _Spans.apply(gates)
    # The same in few operations, which a compiler would otherwise unroll.
    size = gates.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=gates.device).tril(-1)
    return gates[..., None].expand(*(-1,) * gates.dim(), size).masked_fill(~later, 1).cumprod(-2).tril()


def _masks(eta: Tensor, keep: Tensor, real: Tensor) -> tuple[Tensor, ...]:
    """A, beta and c of every chunk, and for its last place (A[b], E[b]) and (beta_b, c_b, e_b), from gates [N, H, chunks, size]."""
    gates = torch.stack((eta, keep))
    momenta, decays = _spans(gates)
    e, beta = gates.cumprod(-1)[..., None]
    added = real[..., None].to(eta.dtype)  # a place without a token does not add the momentum to the weights
    mask, carried = decays @ (added * momenta), decays @ (added * e)
    ends = torch.stack((mask[..., -1, :], momenta[..., -1, :]), -1)[..., None]
    kept = torch.stack((beta[..., -1, :], carried[..., -1, :], e[..., -1, :]), -1)[..., None]
    return mask, beta, carried, ends, kept


def _chunks(q, k, v, lr, momentum, decay, state, position, lengths, chunk_size, residual, loss, max_grad_norm, mix):
    count, length = lr.shape[:2]
    running, surprise, opened = state.weights, state.momentum, state.start
    furthest = 0 if position is None else chunk_size - 1  # in its open chunk; more exactly where looking costs nothing
    if position is not None and position.device.type == "cpu" and not torch.compiler.is_compiling():
        furthest = int(position.max())
        position = position if furthest else None
    size = chunk_size if position is not None else min(chunk_size, length)
    chunks = -(-(length + furthest) // size)
    # Every sequence gets whole chunks of places. Places before its open chunk's first new token and after its end hold no token: there
    # theta is 0, nothing decays and no momentum is added, so that they change nothing.
    token = torch.arange(chunks * size, device=q.device)[None]
    if position is not None:
        token = token - position[:, None]
    real = (token >= 0) & (token < (length if lengths is None else lengths[:, None]))

    def lay(x: Tensor) -> Tensor:  # [N, T, H, ...] to [N, H, chunks, size, ...]
        if position is None:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, chunks * size - length))
        else:
            x = x[torch.arange(count, device=x.device)[:, None], token.clamp(0, length - 1)]
        return x.unflatten(1, (chunks, size)).movedim(3, 1)

    real = real.expand(count, -1).unflatten(1, (chunks, size))[:, None]
    q, k, v = lay(q), lay(k), lay(v)
    theta = lay(lr).masked_fill(~real, 0)[..., None]
    eta, keep = lay(momentum).masked_fill(~real, 1), (1 - lay(decay)).masked_fill(~real, 1)
    mask, beta, carried, ends, kept = _masks(eta, keep, real)
    keys = (ends * k[..., None, :]).flatten(-2)  # [..., size, 2 D]

    if position is not None:
        unopened = (position == 0)[:, None, None, None]
        open_chunk = ((position + (length if lengths is None else lengths)) // size)[:, None, None, None]
    elif lengths is not None:
        open_chunk = (lengths // chunk_size)[:, None, None, None]
    else:
        open_chunk = length // chunk_size
    # Taken apart once: the gradient of one chunk's slice would fill a tensor of all chunks.
    by_chunk = list(zip(*(x.unbind(2) for x in (k, v, theta, ends, kept, keys))))
    outputs = []
    together = GROUP if mix is None else chunks  # reads that are mixed may need the weights after the last chunk
    for first in range(0, chunks, together):
        group = range(first, min(first + together, chunks))
        held = []
        for c in group:
            start = running
            if c == 0 and position is not None:
                start = tuple(torch.where(unopened, w, s) for w, s in zip(running, opened))
            key, value, step, to_end, last, key_to_end = by_chunk[c]
            inputs, grads = gradients(start, key, value, step, residual, loss, max_grad_norm)
            held.append((running, surprise, inputs[1:], grads))
            if isinstance(open_chunk, int):
                opened = start if c == open_chunk else opened
            else:
                opened = tuple(torch.where(open_chunk == c, s, o) for s, o in zip(start, opened))
            beta_last, carried_last, since_last = last.unbind(-2)
            written = [key_to_end.mT @ grads[0]]
            written += [(to_end * x[..., None, :]).flatten(-2).mT @ g for x, g in zip(inputs[1:], grads[1:])]
            new = []
            for w, s, change in zip(running, surprise, written):
                to_weights, to_momentum = change.chunk(2, -2)
                new.append((beta_last * w + carried_last * s - to_weights, since_last * s - to_momentum))
            running, surprise = zip(*new)
        weights, momentum, inputs, grads = ([torch.stack(layer, 2) for layer in zip(*part)] for part in zip(*held))
        here = slice(group.start, group.stop)
        inputs = [k[:, :, here], *inputs]
        read = q[:, :, here]
        for layer, (x, w, s, g) in enumerate(zip(inputs, weights, momentum, grads)):
            rows = read if x is inputs[0] else F.gelu(read)
            read = beta[:, :, here] * (rows @ w) + carried[:, :, here] * (rows @ s) - (mask[:, :, here] * (rows @ x.mT)) @ g
            if mix is not None:
                at = token.expand(count, -1).clamp(0, length - 1)
                mixed = mix(layer, rows.flatten(2, 3), read.flatten(2, 3), running, at)
                read = mixed.unflatten(2, (chunks, size))
        outputs.append(q[:, :, here] + read if residual else read)
    output = torch.cat(outputs, 2).movedim(1, 3).flatten(1, 2)
    end = lengths if lengths is not None else torch.full((count,), length, device=q.device)
    if position is None:
        output = output[:, :length]
    else:
        end = position + end
        place = (position[:, None] + torch.arange(length, device=q.device)).clamp(max=chunks * size - 1)
        output = output[torch.arange(count, device=q.device)[:, None], place]
    position = end % chunk_size
    closed = (position == 0)[:, None, None, None]
    opened = tuple(torch.where(closed, w, s) for w, s in zip(running, opened))
    return output, NeuralMemoryState(running, surprise, opened, position)
