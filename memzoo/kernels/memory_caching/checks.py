"""Argument checks that the operators with a cache share: options of the cache, and its state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import check_device, check_dim, check_float, check_head_dim, check_shape
from .routing import blocks_of
from .state import AGGREGATIONS, GATED, LOG, ROUTINGS, Caching, MemoryCachingState, map_tensors

MAX_TOP_K = 16


def check_caching(
    op: str,
    segment_length: object,
    aggregation: object,
    top_k: object,
    restart: object,
    routing: object,
    like: Tensor,
    u: Tensor | None,
    keys: Tensor | None,
    state: MemoryCachingState | None,
    keep: bool,
    max_segments: object,
    keys_name: str = "routing_keys",
) -> tuple[Caching, Tensor | None]:
    """(the options of the cache, what its descriptors pool or None); `like` is [B, T, H, ...]."""
    if segment_length != LOG and (isinstance(segment_length, bool) or not isinstance(segment_length, int) or segment_length < 1):
        raise ValueError(f"{op}: segment_length is {segment_length!r}, needs an integer of at least 1, or 'log'")
    for name, value, known in (("aggregation", aggregation, AGGREGATIONS), ("routing", routing, ROUTINGS)):
        if value not in known:
            raise ValueError(f"{op}: {name} is {value!r}, needs one of {', '.join(known)}")
    if aggregation == "sparse":
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
            raise ValueError(f"{op}: top_k is {top_k!r}, needs an integer from 1 to {MAX_TOP_K} with aggregation 'sparse'")
    elif top_k is not None:
        raise ValueError(f"{op}: top_k is {top_k!r}, needs None with aggregation {aggregation!r} ('sparse' has it)")
    if segment_length == LOG and (state is not None or keep):
        raise ValueError(f"{op}: segment_length 'log' knows no state between calls: its segments depend on the whole length")
    if max_segments is not None:
        if isinstance(max_segments, bool) or not isinstance(max_segments, int) or max_segments < 1:
            raise ValueError(f"{op}: max_segments is {max_segments!r}, needs an integer of at least 1, or None")
        if aggregation not in GATED or segment_length == LOG:
            raise ValueError(f"{op}: max_segments needs scores and segments of one length: {', '.join(GATED)}, and no 'log'")
    caching = Caching(segment_length, aggregation, top_k, bool(restart), routing, max_segments)
    if not caching.scored:
        return caching, None
    if u is None:
        raise ValueError(f"{op}: u is None, needs connectors [B, T, H, R] with aggregation {aggregation!r}")
    check_dim(op, "u", u, 4, "[B, T, H, R]")
    check_shape(op, "u", u, (*like.shape[:3], u.shape[3]), "[B, T, H, R]")
    check_head_dim(op, "u", u.shape[3])
    check_shape(op, keys_name, keys, u.shape, "[B, T, H, R] as u")
    return caching, keys


def check_state(
    op: str,
    state: MemoryCachingState,
    caching: Caching,
    linear: bool,
    count: int,
    memory: Sequence[tuple[int, ...]],
    u: Tensor | None,
    like: Tensor,
    previous: tuple[tuple[int, ...], ...] | None = None,
    online: bool = True,
) -> MemoryCachingState:
    """The state in the type to compute in; raises unless it fits. `memory` are the shapes of its weights without the sequence axis;
    `online`: whether `state.memory` is such a tensor, to be checked here."""
    if not isinstance(state, tuple) or len(state) != len(MemoryCachingState._fields):
        raise TypeError(f"{op}: initial_state must be a MemoryCachingState, got {type(state).__name__}")
    state = MemoryCachingState(*state)
    if len(state.cached) != len(memory):
        raise ValueError(f"{op}: initial_state.cached has {len(state.cached)} tensors, needs {len(memory)}")
    for name in ("position", "count"):
        value = getattr(state, name)
        if isinstance(value, Tensor):
            check_shape(op, f"initial_state.{name}", value, (count,), "[N]")
        elif isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: initial_state.{name} must be an int or a tensor [N], got {type(value).__name__}")
    tensors = {f"initial_state.cached[{i}]": part for i, part in enumerate(state.cached)}
    slots = state.cached[0].shape[1] if state.cached[0].dim() > 1 else 0
    _check_places(op, state, caching, slots, caching.collapsed(linear))
    for (name, part), shape in zip(tensors.items(), memory):
        check_shape(op, name, part, (count, slots, *shape), "[N, S, H, ...]")
    if online:
        tensors["initial_state.memory"] = state.memory
        check_shape(op, "initial_state.memory", state.memory, (count, *memory[0]), "[N, H, Dk, Dv]")
    if caching.scored:
        heads, size = u.shape[2:]
        rows = size if caching.routing == "energy" else blocks_of(caching.routing)
        described = (heads, size) if caching.routing == "mean" else (heads, rows, size)
        for name, shape in (("pooled", (count, heads, rows, size)), ("descriptors", (count, slots, *described))):
            if getattr(state, name) is None:
                raise ValueError(f"{op}: initial_state.{name} is None, needs what aggregation {caching.aggregation!r} keeps")
            check_shape(op, f"initial_state.{name}", getattr(state, name), shape, "[N, ...]")
            tensors[f"initial_state.{name}"] = getattr(state, name)
    if previous is not None and state.previous is None:
        raise ValueError(f"{op}: initial_state.previous is None, needs the last key and value with shift_gate")
    for value, shape in zip(state.previous or (), previous or ()):
        check_shape(op, "initial_state.previous", value, (count, *shape), "[N, H, D]")
        tensors["initial_state.previous"] = value
    check_float(op, **tensors)
    if caching.scored and not (caching.aggregation == "soup" and not linear):  # a cache whose reads are mixed may lie elsewhere
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("initial_state.cached")}
    check_device(op, "q", like, **tensors)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return map_tensors(state, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _check_places(op: str, state: MemoryCachingState, caching: Caching, slots: int, collapsed: bool) -> None:
    """Raise unless positions and counts fit the segments and the cache, where reading them costs nothing."""
    if collapsed and slots != 1:
        raise ValueError(f"{op}: initial_state.cached has {slots} memories, needs 1 with {caching.aggregation!r}, their sum")
    limits = {"position": (caching.segment_length - 1, f"0 to segment_length - 1 = {caching.segment_length - 1}")}
    limits["count"] = (float("inf") if collapsed else slots, "0 or more" if collapsed else f"0 to {slots}, the memories in cached")
    for name, (limit, needs) in limits.items():
        value = getattr(state, name)
        if isinstance(value, Tensor) and (value.device.type != "cpu" or torch.compiler.is_compiling()):
            continue
        numbers = value.tolist() if isinstance(value, Tensor) else [value]
        if not all(0 <= n <= limit for n in numbers):
            raise ValueError(f"{op}: initial_state.{name} is {numbers[:8] if isinstance(value, Tensor) else value}, needs {needs}")
