"""Causal softmax attention with the extensions of this zoo, and attention that also reads along the DNC's temporal links."""

from __future__ import annotations

import math

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
)
from ..common.dispatch import resolve_implementation
from .chunked import attention_chunked
from .reference import attention_reference

__all__ = ["attention", "linked_attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    prefix: int = 0,
    key_strength: Tensor | None = None,
    log_retention: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`y_t = sum_i A[t, i] v_i`, `A[t] = softmax_i(scale key_strength_t <q_t, k_i> + sum_{m=i+1..t} log_retention_m)` over visible i.

    The queries are the last Tq of the Tk positions (row r is position Tk - Tq + r), so that training, prefill in pieces and decoding
    from a cache are one function. Position t sees position i if `i <= t` and, with a window, `i > t - window` or `i < prefix`.
    In the DNC's terms (Graves et al. 2016): content addressing with a key strength over a write-once memory whose rows fade by the
    free gates' retention; with the options left alone, the attention of a causal Transformer (Vaswani et al. 2017).

    Args:
        q: queries, [B, Tq, Hq, Dk], Tq <= Tk.
        k: keys, [B, Tk, Hk, Dk]; query head h reads key and value head h // (Hq // Hk).
        v: values, [B, Tk, Hk, Dv].
        scale: factor of the scores, above 0; Dk ** -0.5 if None.
        window: how many positions back a query sees, itself included; None for all.
        prefix: this many first positions stay visible whatever the window (persistent memory, attention sinks).
        key_strength: factor of the scores a query and head, [B, Tq, Hq]; 1 if None.
        log_retention: what each position keeps of all older ones, log space, finite and <= 0, [B, Tk, Hq]; 0 if None.
        cu_seqlens: packed input, B = 1: boundaries [N + 1] where Tq = Tk, or a pair (of queries, of keys) where each sequence's queries
            are its last positions. Sequences may be empty, or have keys and no queries. Window, prefix and retention count in each.
        implementation: "triton", "chunked", "reference", or None for the one that fits the device.

    Returns:
        output, [B, Tq, Hq, Dv] in q's dtype. Every tensor argument but cu_seqlens has a gradient.

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    return _run(
        "attention", q, k, v, None, scale, window, prefix, key_strength, log_retention, cu_seqlens, implementation
    )  # fmt: skip


def linked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read_modes: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    prefix: int = 0,
    key_strength: Tensor | None = None,
    log_retention: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`y_t = sum_i A[t, i] (backward v_{i-1} + content v_i + forward [i < t] v_{i+1})`, with A as in `attention`.

    The DNC's three read modes (Graves et al. 2016). Its link matrix for a memory whose rows are written once and in order is a shift, so
    the backward and forward reads follow each row's neighbours; `v_{-1}` is 0, and a query never reads beyond itself. The neighbours
    are read whether or not the window shows them. One pass over the scores serves the three.

    Args:
        read_modes: weights of the (backward, content, forward) reads, [B, Tq, Hq, 3]; the caller's softmax makes them sum to 1.
        others: as in `attention`.

    Returns:
        output, [B, Tq, Hq, Dv] in q's dtype. Every tensor argument but cu_seqlens has a gradient.

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    if read_modes is None:
        raise TypeError("linked_attention: read_modes must be a torch.Tensor, got NoneType")
    return _run(
        "linked_attention", q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, cu_seqlens, implementation
    )  # fmt: skip


def _run(op, q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, cu_seqlens, implementation) -> Tensor:
    check_dim(op, "q", q, 4, "[B, Tq, Hq, Dk]")
    check_dim(op, "k", k, 4, "[B, Tk, Hk, Dk]")
    check_tokens(op, "q", q)
    check_tokens(op, "k", k)
    batch, queries, heads, key_dim = q.shape
    keys, key_heads = k.shape[1:3]
    check_shape(op, "k", k, (batch, keys, key_heads, key_dim), "[B, Tk, Hk, Dk]")
    check_dim(op, "v", v, 4, "[B, Tk, Hk, Dv]")
    check_shape(op, "v", v, (batch, keys, key_heads, v.shape[3]), "[B, Tk, Hk, Dv]")
    check_head_dim(op, "k", key_dim)
    check_head_dim(op, "v", v.shape[3])
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{op}: q has {heads} heads, needs a multiple of k's {key_heads}")
    if queries > keys:
        raise ValueError(f"{op}: q has {queries} positions, needs at most k's {keys}: queries are the last positions")
    if read_modes is not None:
        check_shape(op, "read_modes", read_modes, (batch, queries, heads, 3), "[B, Tq, Hq, 3]")
    if key_strength is not None:
        check_shape(op, "key_strength", key_strength, (batch, queries, heads), "[B, Tq, Hq]")
    if log_retention is not None:
        check_shape(op, "log_retention", log_retention, (batch, keys, heads), "[B, Tk, Hq]")
    check_float(op, q=q, k=k, v=v, read_modes=read_modes, key_strength=key_strength, log_retention=log_retention)
    check_same(op, "q", q, k=k, v=v)
    check_device(op, "q", q, read_modes=read_modes, key_strength=key_strength, log_retention=log_retention)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{op}: window is {window!r}, needs an integer of at least 1, or None")
    if not isinstance(prefix, int) or prefix < 0:
        raise ValueError(f"{op}: prefix is {prefix!r}, needs an integer of at least 0")
    scale = key_dim**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale is {scale!r}, needs a number above 0")
    cu_seqlens = _check_packing(op, q, k, cu_seqlens)
    window, prefix = (None, 0) if window is None or window >= keys else (window, min(prefix, keys))

    chosen = resolve_implementation(op, implementation, q)
    options = (float(scale), window, prefix, key_strength, log_retention, cu_seqlens)
    if chosen == "reference":
        return attention_reference(q, k, v, read_modes, *options)
    if chosen == "chunked":
        return attention_chunked(q, k, v, read_modes, *options)
    from .kernel import attention_decode, attention_triton, is_decode

    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, read_modes, key_strength, log_retention)
    )
    if not needs_grad and is_decode(q, k, cu_seqlens):
        return attention_decode(q, k, v, read_modes, *options)
    return attention_triton(q, k, v, read_modes, *options)


def _check_packing(op: str, q: Tensor, k: Tensor, cu_seqlens) -> tuple[Tensor, Tensor] | None:
    """The pair of boundaries (of queries, of keys), or None for input that is not packed."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, (tuple, list)):
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"{op}: one cu_seqlens needs as many queries as keys, got {q.shape[1]} and {k.shape[1]}; "
                "give the pair (of queries, of keys)"
            )
        cu_seqlens = (cu_seqlens, cu_seqlens)
    if len(cu_seqlens) != 2:
        raise ValueError(f"{op}: cu_seqlens has {len(cu_seqlens)} parts, needs one tensor or the pair (of queries, of keys)")
    of_queries, of_keys = cu_seqlens
    check_cu_seqlens(op, of_queries, q.shape[0], q.shape[1])
    check_cu_seqlens(op, of_keys, k.shape[0], k.shape[1])
    check_device(op, "q", q, cu_seqlens=of_queries)
    check_device(op, "q", q, cu_seqlens=of_keys)
    check_shape(op, "cu_seqlens of keys", of_keys, of_queries.shape, "[N + 1]")
    if of_queries is not of_keys and of_queries.device.type == "cpu" and not torch.compiler.is_compiling():
        for n, (asked, held) in enumerate(zip(of_queries.diff().tolist(), of_keys.diff().tolist())):
            if asked > held:
                raise ValueError(f"{op}: cu_seqlens gives sequence {n} {asked} queries, needs at most its {held} keys")
    return of_queries, of_keys
