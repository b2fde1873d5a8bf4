"""The definition of linear attention: one sequence and one token at a time, decay, write, read."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

NORMALIZER_EPSILON = 1e-6


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    normalize: bool,
    scale: float,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    heads, key_dim, value_dim = q.shape[2], q.shape[3], v.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if cu_seqlens is None:
        rows = [(b, range(q.shape[1])) for b in range(q.shape[0])]
    else:
        rows = [(0, range(a, b)) for a, b in pairwise(cu_seqlens.tolist())]
    outputs, states, norms = [], [], []
    for n, (b, tokens) in enumerate(rows):
        S = q.new_zeros(heads, key_dim, value_dim, dtype=dtype) if initial_state is None else initial_state[n]
        z = q.new_zeros(heads, key_dim, dtype=dtype) if initial_norm is None else initial_norm[n]
        for t in tokens:
            q_t, k_t, v_t = scale * q[b, t].to(dtype), k[b, t].to(dtype), v[b, t].to(dtype)
            if log_decay is not None:
                S = log_decay[b, t].exp()[:, None, None] * S
                z = log_decay[b, t].exp()[:, None] * z
            S = S + k_t[:, :, None] * v_t[:, None, :]
            z = z + k_t
            y = (q_t[:, :, None] * S).sum(1)
            if normalize:
                y = y / ((q_t * z).sum(1) + NORMALIZER_EPSILON)[:, None]
            outputs.append(y)
        states.append(S)
        norms.append(z)
    output = torch.stack(outputs).view(v.shape).to(q.dtype)
    if not output_final_state:
        return output, None, None
    return output, torch.stack(states), torch.stack(norms) if normalize else None
