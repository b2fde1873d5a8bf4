"""Linear attention: a matrix memory that adds k v^T for each token, with an optional decay and the normaliser of Katharopoulos et al."""

from __future__ import annotations

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
    check_tokens,
    sequence_count,
)
from ..common.dispatch import resolve_implementation
from .chunked import linear_attention_chunked
from .reference import linear_attention_reference

__all__ = ["linear_attention"]

OP = "linear_attention"
State = Tensor | tuple[Tensor, Tensor]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, State | None]:
    """`S_t = exp(g_t) S_{t-1} + k_t v_t^T`, `y_t = scale S_t^T q_t`: decay, write, then read, so a token reads its own write.

    With `normalize`, also `z_t = exp(g_t) z_{t-1} + k_t` and `y_t = scale S_t^T q_t / (scale z_t . q_t + 1e-6)`. Feature maps such as
    elu + 1 are the caller's: q and k arrive with them applied. Source: Katharopoulos et al. 2020 (arXiv 2006.16236), equations 9 and
    16 to 20; the decay g is an extension.

    Args:
        q, k: queries and keys, [B, T, H, Dk].
        v: values, [B, T, H, Dv]; Dk and Dv are multiples of 8 from 16 to 256 and may differ.
        log_decay: g <= 0 for each token and head, [B, T, H], of any float type, or None for no decay. Below -100 it acts as -100.
        normalize: divide by the running sum of keys against the query.
        scale: a factor on the queries.
        initial_state: S before the first token, [N, H, Dk, Dv], or with `normalize` the pair (S, z [N, H, Dk]); zeros if None. N is B,
            or the number of packed sequences.
        output_final_state: also return the state after the last token, for the next call.
        cu_seqlens: boundaries of packed sequences, [N + 1], with B = 1; sequences may be empty.
        implementation: "triton", "chunked", "reference", or None for the one that fits the device.

    Returns:
        (output [B, T, H, Dv] in q's dtype, final state as `initial_state` in float32 (float64 for float64 input) or None).

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    check_dim(OP, "q", q, 4, "[B, T, H, Dk]")
    check_tokens(OP, "q", q)
    batch, length, heads, key_dim = q.shape
    check_shape(OP, "k", k, q.shape, "[B, T, H, Dk]")
    check_dim(OP, "v", v, 4, "[B, T, H, Dv]")
    value_dim = v.shape[3]
    check_shape(OP, "v", v, (batch, length, heads, value_dim), "[B, T, H, Dv]")
    if heads == 0:
        raise ValueError(f"{OP}: q has shape {list(q.shape)}: H must be at least 1")
    check_head_dim(OP, "q", key_dim)
    check_head_dim(OP, "v", value_dim)
    if log_decay is not None:
        check_shape(OP, "log_decay", log_decay, (batch, length, heads), "[B, T, H]")
    check_cu_seqlens(OP, cu_seqlens, batch, length)
    count = sequence_count(cu_seqlens, batch)
    state, norm = _state_parts(initial_state, normalize)
    if state is not None:
        check_shape(OP, "initial_state", state, (count, heads, key_dim, value_dim), "[N, H, Dk, Dv]")
    if norm is not None:
        check_shape(OP, "initial_state's z", norm, (count, heads, key_dim), "[N, H, Dk]")
    check_float(OP, q=q, k=k, v=v, log_decay=log_decay, initial_state=state, **{"initial_state's z": norm})
    check_same(OP, "q", q, k=k, v=v)
    check_device(OP, "q", q, log_decay=log_decay, cu_seqlens=cu_seqlens, initial_state=state, **{"initial_state's z": norm})
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{OP}: scale must be a float, got {type(scale).__name__}")

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    log_decay, state, norm = (None if t is None else t.to(dtype) for t in (log_decay, state, norm))
    chosen = resolve_implementation(OP, implementation, q)
    if chosen == "reference":
        run = linear_attention_reference
    elif chosen == "chunked":
        run = linear_attention_chunked
    else:
        from .kernel import linear_attention_step, linear_attention_triton

        run = linear_attention_triton
        if length == 1 and cu_seqlens is None and state is not None and output_final_state:
            tensors = (q, k, v, log_decay, state, norm)
            if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
                run = linear_attention_step
    output, state, norm = run(q, k, v, log_decay, normalize, float(scale), state, norm, output_final_state, cu_seqlens)
    if not output_final_state:
        return output, None
    return output, (state, norm) if normalize else state


def _state_parts(initial_state: object, normalize: bool) -> tuple[Tensor | None, Tensor | None]:
    """(S, z) of an initial state; raises TypeError unless it is a pair exactly when `normalize` is set."""
    if initial_state is None:
        return None, None
    if normalize:
        if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
            raise TypeError(f"{OP}: initial_state must be the pair (S, z) with normalize, got {type(initial_state).__name__}")
        return initial_state[0], initial_state[1]
    return initial_state, None
