"""Linear attention over chunks in plain torch: masked products inside a chunk, and a state that steps from chunk to chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import pack, unpack
from .reference import NORMALIZER_EPSILON

CHUNK = 64
MIN_LOG_DECAY = -100.0  # exp(-100) is nothing; a bound keeps differences of sums exact, and -inf from giving NaN


def linear_attention_chunked(
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
    input_dtype, total = q.dtype, q.shape[1]
    dtype = torch.float64 if input_dtype == torch.float64 else torch.float32
    q, k, v = (t.to(dtype) for t in (q, k, v))
    if cu_seqlens is not None:
        # Zeros after a sequence's end neither write nor decay, so its last state stays as it was.
        q, k, v = (unpack(t, cu_seqlens) for t in (q, k, v))
        log_decay = None if log_decay is None else unpack(log_decay, cu_seqlens)
    if log_decay is not None:
        log_decay = log_decay.clamp(min=MIN_LOG_DECAY)
    if normalize:  # the normaliser is one more value, always 1: z is the last column of the state
        v = F.pad(v, (0, 1), value=1.0)
        if initial_state is not None:
            initial_state = torch.cat((initial_state, initial_norm[..., None]), dim=-1)

    run = _step if q.shape[1] == 1 else _chunks
    y, state = run(q if scale == 1.0 else q * scale, k, v, log_decay, initial_state)

    norm = None
    if normalize:
        y = y[..., :-1] / (y[..., -1:] + NORMALIZER_EPSILON)
        state, norm = state[..., :-1], state[..., -1]
    if cu_seqlens is not None:
        y = pack(y, cu_seqlens, total)
    return y.to(input_dtype), state if output_final_state else None, norm if output_final_state else None


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token: decay, write, read."""
    written = k[:, 0, :, :, None] * v[:, 0, :, None, :]
    if state is None:
        state = written
    elif log_decay is None:
        state = state + written
    else:
        state = torch.addcmul(written, state, log_decay[:, 0, :, None, None].exp())
    return (q[:, 0, :, None, :] @ state).transpose(1, 2), state


def _chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(outputs [B, T, H, Dv], state after the last token); every exponential is of a number that is not positive."""
    length = q.shape[1]
    chunk = min(CHUNK, length)
    q, k, v = (_split(t, chunk) for t in (q, k, v))  # [B, H, chunks, chunk, D]
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-1, -2)
    if log_decay is None:
        scores = scores.masked_fill(future, 0.0)
        local = k.transpose(-1, -2) @ v
        kept = None
    else:
        since_start = _split(log_decay[..., None], chunk)[..., 0].cumsum(-1)  # [B, H, chunks, chunk]
        between = (since_start[..., :, None] - since_start[..., None, :]).masked_fill(future, -torch.inf)
        scores = scores * between.exp()
        until_end = since_start[..., -1:] - since_start
        local = k.transpose(-1, -2) @ (v * until_end.exp()[..., None])
        kept = since_start[..., -1, None, None].exp().unbind(2)
        q = q * since_start.exp()[..., None]
    last = local.new_zeros(local.shape[:2] + local.shape[3:]) if state is None else state
    starts = []
    for i, written in enumerate(local.unbind(2)):
        starts.append(last)
        last = last + written if kept is None else torch.addcmul(written, last, kept[i])
    before = torch.stack(starts, dim=2)
    y = scores @ v + q @ before
    return y.flatten(2, 3)[:, :, :length].transpose(1, 2), last


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] to [B, H, chunks, chunk, D], with zeros after the end."""
    x = x.transpose(1, 2)
    x = F.pad(x, (0, 0, 0, -x.shape[2] % chunk))
    return x.unflatten(2, (-1, chunk))
