"""The definition of attention and of its temporal-link reads: one sequence, one token and one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read_modes: Tensor | None,
    scale: float,
    window: int | None,
    prefix: int,
    key_strength: Tensor | None,
    log_retention: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor] | None,
) -> Tensor:
    group = q.shape[2] // k.shape[2]
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    none = v.new_zeros(1, v.shape[3])
    outputs = []
    for b, asked, held in _sequences(q, k, cu_seqlens):
        offset = (held.stop - held.start) - (asked.stop - asked.start)  # the position of the first query
        for row in range(asked.start, asked.stop):
            t = offset + row - asked.start
            seen = [i for i in range(t + 1) if window is None or i > t - window or i < prefix]
            heads = []
            for h in range(q.shape[2]):
                keys, values = k[b, held, h // group], v[b, held, h // group]
                logits = scale * (keys[seen] @ q[b, row, h])
                if key_strength is not None:
                    logits = key_strength[b, row, h] * logits
                if log_retention is not None:
                    # Entry i is the sum of log_retention over i + 1, ..., t.
                    after = torch.cat((log_retention[b, held, h][1 : t + 1], log_retention.new_zeros(1)))
                    logits = logits + after.flip(0).cumsum(0).flip(0)[seen]
                weights = torch.softmax(logits, dim=0)
                if read_modes is None:
                    heads.append(weights @ values[seen])
                    continue
                backward = torch.cat((none, values[:t]))  # entry i is v_{i-1}, 0 before the sequence
                forward = torch.cat((values[1 : t + 1], none))  # entry i is v_{i+1}, 0 after the query
                modes = read_modes[b, row, h]
                heads.append(
                    modes[0] * (weights @ backward[seen])
                    + modes[1] * (weights @ values[seen])
                    + modes[2] * (weights @ forward[seen])
                )
            outputs.append(torch.stack(heads))
    return torch.stack(outputs).view(*q.shape[:3], v.shape[3]).to(dtype)


def _sequences(q: Tensor, k: Tensor, cu_seqlens: tuple[Tensor, Tensor] | None):
    """(batch row, its queries, its keys) of each sequence."""
    if cu_seqlens is None:
        for b in range(q.shape[0]):
            yield b, slice(0, q.shape[1]), slice(0, k.shape[1])
        return
    of_queries, of_keys = (cu.tolist() for cu in cu_seqlens)
    for n in range(len(of_queries) - 1):
        yield 0, slice(of_queries[n], of_queries[n + 1]), slice(of_keys[n], of_keys[n + 1])
