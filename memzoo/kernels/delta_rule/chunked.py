"""The delta rule chunk by chunk in plain torch: what a CPU runs, forward and backward.

Inside a chunk that starts from state S, with G the running sum of log-decays and e_ij = exp(G_i - G_j) for j <= i, the writes are
`D_i = beta_i (v_i - exp(G_i) S^T k_i - sum_{j<i} e_ij <k_i, k_j> D_j)`: a unit lower-triangular system with the solution `D = U - W S`.
Then `y = scale (exp(G) Q S + (e . Q K^T) D)`, and the next state is `(exp(G_C) I - K_C^T W) S + K_C^T U` with `K_C = exp(G_C - G) K`:
one matrix product a chunk is all that runs in sequence. Every exponent is at most 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import pack, unpack

CHUNK = 32


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    total, output_dtype = q.shape[1], q.dtype
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    log_decay = None if log_decay is None else log_decay.to(dtype)
    if cu_seqlens is not None:  # zero keys, betas and log-decays after a sequence's end leave its state as it is
        q, k, v, beta = (unpack(x, cu_seqlens) for x in (q, k, v, beta))
        log_decay = None if log_decay is None else unpack(log_decay, cu_seqlens)
    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    run = _one_token if q.shape[1] == 1 else _chunks
    output, state = run(q, k, v, beta, log_decay, scale, initial_state)
    if cu_seqlens is not None:
        output = pack(output, cu_seqlens, total)
    return output.to(output_dtype), state if output_final_state else None


def _one_token(q, k, v, beta, log_decay, scale, state):
    if log_decay is not None:
        state = log_decay[:, 0, :, None, None].exp() * state
    error = v.transpose(1, 2) - k.transpose(1, 2) @ state
    state = state + (beta[:, 0, :, None] * k[:, 0])[..., None] * error
    return scale * (q.transpose(1, 2) @ state).transpose(1, 2), state


def _chunks(q, k, v, beta, log_decay, scale, state):
    batch, length, heads, _ = q.shape
    size = CHUNK
    count = (length + size - 1) // size

    def split(x: Tensor) -> Tensor:  # [B, T, H, ...] to [B, H, chunks, C, ...]
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, count * size - length))
        return x.unflatten(1, (count, size)).movedim(3, 1)

    q, k, v, beta = split(q), split(k), split(v), split(beta)[..., None]
    kk, qk = k @ k.mT, (scale * q) @ k.mT
    read, key = scale * q, k
    if log_decay is not None:
        # In float64, a difference of running sums loses nothing to strong decays earlier in the chunk.
        g = split(log_decay).double().cumsum(-1)
        lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
        decay = (g[..., :, None] - g[..., None, :]).to(q.dtype).masked_fill(~lower, float("-inf")).exp()
        kk, qk = kk * decay, qk * decay
        since_start, to_end = g.to(q.dtype).exp()[..., None], (g[..., -1:] - g).to(q.dtype).exp()[..., None]
        read, key, last = read * since_start, k * to_end, since_start[..., -1:, :]
        k = k * since_start
    system = (beta * kk).tril(-1)
    solved = torch.linalg.solve_triangular(system, beta * torch.cat((v, k), -1), upper=False, unitriangular=True)
    u, w = solved.split((v.shape[-1], k.shape[-1]), -1)
    identity = torch.eye(k.shape[-1], dtype=q.dtype, device=q.device)
    step = (identity if log_decay is None else last * identity) - key.mT @ w
    write = key.mT @ u
    states = []
    state = state.flatten(0, 1)
    for a, b in zip(step.flatten(0, 1).unbind(1), write.flatten(0, 1).unbind(1)):
        states.append(state)
        state = torch.baddbmm(b, a, state)
    before = torch.stack(states, 1).unflatten(0, (batch, heads))
    output = read @ before + qk.tril() @ (u - w @ before)
    return output.movedim(1, 3).flatten(1, 2)[:, :length], state.unflatten(0, (batch, heads))
