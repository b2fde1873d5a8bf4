"""The definition of the delta rule: one sequence and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule_reference(
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
    heads, key_dim, value_dim = q.shape[2], q.shape[3], v.shape[3]
    if cu_seqlens is None:
        rows = [(n, slice(None)) for n in range(q.shape[0])]
    else:
        rows = [(0, slice(a, b)) for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
    outputs, states = [], []
    for n, (row, tokens) in enumerate(rows):
        state = q.new_zeros(heads, key_dim, value_dim, dtype=dtype) if initial_state is None else initial_state[n]
        for t in range(q.shape[1])[tokens]:
            query, key, value = (x[row, t].to(dtype) for x in (q, k, v))  # [H, D]
            if log_decay is not None:
                state = log_decay[row, t].to(dtype).exp()[:, None, None] * state
            error = value - torch.einsum("hkv,hk->hv", state, key)
            state = state + beta[row, t].to(dtype)[:, None, None] * key[:, :, None] * error[:, None, :]
            outputs.append(scale * torch.einsum("hkv,hk->hv", state, query))
        states.append(state)
    return torch.stack(outputs).view_as(v).to(q.dtype), torch.stack(states) if output_final_state else None
