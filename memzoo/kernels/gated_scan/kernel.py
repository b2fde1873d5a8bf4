"""Triton kernels of the gated scan: one scan for the forward, the backward and the steps between spans, and a decode step.

The time axis is cut into spans so that the chip is full even at batch 1. (1) `_local_kernel` walks through a span from a state of 0 and
leaves where it ends and the product of its gates; (2) `_scan_kernel` over these, which are a gated scan themselves, gives the state at
every span's end; (3) `_scan_kernel` goes through every span from there. With one span, (1) and (2) fall away. A program has a tile of
channels, two a thread, and walks through time; GROUP tokens are on their way from memory at once.

Packed sequences are one long row: the first token of each has a gate of 0 and its sequence's state in what it adds. Spans are equal
whatever the lengths, and (1) reads only from the last start in a span onwards. A gate of exactly 0 also forgets a state that is
infinite or NaN, so that no sequence can spoil another.

The gradient is the same scan backwards in time, with the next token's gate:

    dh_t = dy_t + a_{t+1} dh_{t+1}      db_t = dh_t      da_t = dh_t h_{t-1}      dstate = a_0 dh_0

Bytes an element with a float32 gate and bf16 elsewhere: the forward reads a and b and writes h, 8; the backward reads a, dy and h and
writes da and db, 14: 1.9 and 3.3 ps at 4.3 TB/s. With more than one span (1) reads all but the last span again, 6 bytes in either pass,
and the spans' ends add 24 / span. Operations: 2 an element forwards and 3 backwards, nothing beside the bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch, LaunchTable, capability_of
from ..common.packing import sequence_ids

# Channels take the place of the head dimension: one entry serves any number of them.
ANY = 2**31
SCAN = LaunchTable({(ANY, 80): Launch(num_warps=2, num_stages=1, blocks={"GROUP": 8, "BC": 128})})
STEP = LaunchTable({(ANY, 80): Launch(num_warps=4, num_stages=1, blocks={"BC": 512})})

SPAN_STEP = 16  # spans are whole numbers of groups
MIN_SPAN = 64
PROGRAMS_PER_MULTIPROCESSOR = 8  # each has GROUP x BC elements of 6 bytes on their way, 6 KiB


@triton.jit
def _place(ids, batch, t, alive, T, D, VARLEN: tl.constexpr):
    """(sequence of token t; D, or 0 where t is not `alive`; D, or 0 where it is not its sequence's first; and so for the last)."""
    if VARLEN:
        n = tl.load(ids + t, mask=alive, other=-1)
        first = n != tl.load(ids + t - 1, mask=alive & (t > 0), other=-1)
        last = n != tl.load(ids + t + 1, mask=alive & (t + 1 < T), other=-1)
    else:
        n = batch
        first = t == 0
        last = t == T - 1
    return n, tl.where(alive, D, 0), tl.where(alive & first, D, 0), tl.where(alive & last, D, 0)


@triton.jit
def _token(a, b, state, at, place, D, columns, REVERSE: tl.constexpr, HAS_STATE: tl.constexpr):
    """What token `at` does to what is carried: its gate and what it adds. One that is not alive leaves it as it is."""
    n, alive, first, last = place
    value = tl.load(b + at, mask=columns < alive, other=0.0).to(tl.float32)
    if REVERSE:
        edge = last
        gate = tl.load(a + at + D, mask=columns < alive - edge, other=1.0).to(tl.float32)
    else:
        edge = first
        gate = tl.load(a + at, mask=columns < alive, other=1.0).to(tl.float32)
    if HAS_STATE:
        given = tl.load(state + n * D + columns, mask=columns < edge, other=0.0)
        if REVERSE:
            value += given
        else:
            value += gate * given
    return tl.where(columns < edge, 0.0, gate), value


@triton.jit
def _advance(carried, gate, value):
    return tl.where(gate == 0.0, value, gate * carried + value)


@triton.jit(do_not_specialize=["T", "SPAN"])
def _scan_kernel(
    a, b, state, out, last_state, carries, ids, h, initial_state, da, T, SPAN, D,
    REVERSE: tl.constexpr, GRADIENT: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_LAST: tl.constexpr,
    HAS_CARRIES: tl.constexpr, VARLEN: tl.constexpr, GROUP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One span of BC channels of a, b, out [rows, T, D], from `carries` [rows, spans - 1, D] on.

    Backwards, b, out and da are dy, db and da, and each token uses the gate of the token after it; `state` is then the gradient of the
    last state and `last_state` that of the initial one.
    """
    tiles = tl.cdiv(D, BC)
    columns = (tl.program_id(0) % tiles) * BC + tl.arange(0, BC)
    p = tl.program_id(0) // tiles
    spans = tl.cdiv(T, SPAN)
    batch = (p // spans).to(tl.int64)
    span = p % spans
    start = span * SPAN
    stop = tl.minimum(start + SPAN, T)
    carried = tl.zeros((BC,), tl.float32)
    if HAS_CARRIES:
        slot = span if REVERSE else span - 1
        known = tl.where((slot >= 0) & (slot < spans - 1), D, 0)
        carried = tl.load(carries + (batch * (spans - 1) + slot) * D + columns, mask=columns < known, other=0.0)
    for i in range(tl.cdiv(stop - start, GROUP)):
        places = ()
        tokens = ()
        befores = ()
        for u in tl.static_range(GROUP):
            t = (stop - 1 - i * GROUP - u) if REVERSE else (start + i * GROUP + u)
            alive = (t >= start) & (t < stop)
            at = (batch * T + t) * D + columns
            place = _place(ids, batch, t, alive, T, D, VARLEN)
            places += (place,)
            tokens += (_token(a, b, state, at, place, D, columns, REVERSE, HAS_STATE),)
            if GRADIENT:
                before = tl.load(h + at - D, mask=columns < place[1] - place[2], other=0.0).to(tl.float32)
                if HAS_INITIAL:
                    before += tl.load(initial_state + place[0] * D + columns, mask=columns < place[2], other=0.0)
                befores += (before,)
        for u in tl.static_range(GROUP):
            t = (stop - 1 - i * GROUP - u) if REVERSE else (start + i * GROUP + u)
            at = (batch * T + t) * D + columns
            n, alive, first, last = places[u]
            carried = _advance(carried, tokens[u][0], tokens[u][1])
            tl.store(out + at, carried.to(out.dtype.element_ty), mask=columns < alive)
            if GRADIENT:
                tl.store(da + at, (carried * befores[u]).to(da.dtype.element_ty), mask=columns < alive)
            if STORE_LAST:
                if REVERSE:
                    gate = tl.load(a + at, mask=columns < first, other=0.0).to(tl.float32)
                    tl.store(last_state + n * D + columns, gate * carried, mask=columns < first)
                else:
                    tl.store(last_state + n * D + columns, carried, mask=columns < last)


@triton.jit(do_not_specialize=["T", "SPAN"])
def _local_kernel(
    a, b, state, gates, ends, cu_seqlens, ids, T, SPAN, D,
    REVERSE: tl.constexpr, HAS_STATE: tl.constexpr, VARLEN: tl.constexpr, GROUP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What one span does to what comes in, as gate and value of a scan over spans, [rows, spans - 1, D] each."""
    tiles = tl.cdiv(D, BC)
    columns = (tl.program_id(0) % tiles) * BC + tl.arange(0, BC)
    within = columns < D
    p = tl.program_id(0) // tiles
    spans = tl.cdiv(T, SPAN)
    batch = (p // (spans - 1)).to(tl.int64)
    slot = p % (spans - 1)
    # Nothing follows the last span, nor, going backwards, the first.
    span = slot + 1 if REVERSE else slot
    start = span * SPAN
    stop = tl.minimum(start + SPAN, T)
    if VARLEN:
        # Only the tokens whose sequence goes on beyond the span matter to what comes after.
        if REVERSE:
            n = tl.load(ids + start)
            begun = tl.load(cu_seqlens + n).to(tl.int32)
            stop = tl.where(begun == start, start, tl.minimum(stop, tl.load(cu_seqlens + n + 1).to(tl.int32)))
        else:
            n = tl.load(ids + stop - 1)
            ended = tl.load(cu_seqlens + n + 1).to(tl.int32)
            start = tl.where(ended == stop, stop, tl.maximum(start, tl.load(cu_seqlens + n).to(tl.int32)))
    total = tl.full((BC,), 1.0, tl.float32)
    carried = tl.zeros((BC,), tl.float32)
    for i in range(tl.cdiv(stop - start, GROUP)):
        tokens = ()
        for u in tl.static_range(GROUP):
            t = (stop - 1 - i * GROUP - u) if REVERSE else (start + i * GROUP + u)
            alive = (t >= start) & (t < stop)
            at = (batch * T + t) * D + columns
            place = _place(ids, batch, t, alive, T, D, VARLEN)
            tokens += (_token(a, b, state, at, place, D, columns, REVERSE, HAS_STATE),)
        for u in tl.static_range(GROUP):
            carried = _advance(carried, tokens[u][0], tokens[u][1])
            total = _advance(total, tokens[u][0], 0.0)
    place = (batch * (spans - 1) + slot) * D + columns
    tl.store(ends + place, carried, mask=within)
    if REVERSE:
        # A scan backwards uses the gate after each of its tokens.
        tl.store(gates + place + D, total, mask=columns < tl.where(slot < spans - 2, D, 0))
    else:
        tl.store(gates + place, total, mask=within)


@triton.jit
def _step_kernel(a, b, state, h, new_state, count, BC: tl.constexpr):
    """One token of `count` channels in all."""
    at = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    inside = at < count
    gate = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    value = _advance(tl.load(state + at, mask=inside, other=0.0), gate, value)
    tl.store(new_state + at, value, mask=inside)
    tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _span(b: Tensor) -> int:
    """Tokens in a span, from shapes alone: as many spans as fill the chip once, but not so many that the steps between spans take
    longer than those in two of them. Packed sequences are one row."""
    rows, length, dim = b.shape
    tiles = triton.cdiv(dim, SCAN.lookup(1, capability_of(b.device)).blocks["BC"])
    spans = max(1, _multiprocessors(b.device) * PROGRAMS_PER_MULTIPROCESSOR // (tiles * rows))
    span = max(triton.cdiv(length, spans), MIN_SPAN, math.isqrt(length // 2))
    return triton.cdiv(span, SPAN_STEP) * SPAN_STEP


def _scan(
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    out: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    gradient: tuple[Tensor, Tensor | None, Tensor] | None = None,
    span: int | None = None,
) -> None:
    """Fill `out` and `last`; `gradient` = (h, initial state, where da goes). `span` is given for the scan over spans, which is not cut."""
    rows, length, dim = b.shape
    launch = SCAN.lookup(1, capability_of(b.device))
    tiles = triton.cdiv(dim, launch.blocks["BC"])
    span = _span(b) if span is None else span
    spans = triton.cdiv(length, span)
    ids = None if cu_seqlens is None else sequence_ids(cu_seqlens, length)
    carries = None
    if spans > 1:
        gates, ends, carries = b.new_empty(3, rows, spans - 1, dim, dtype=torch.float32)
        _local_kernel[(rows * (spans - 1) * tiles,)](
            a, b, state, gates, ends, cu_seqlens, ids, length, span, dim,
            REVERSE=reverse, HAS_STATE=state is not None, VARLEN=ids is not None, **launch.options(),
        )  # fmt: skip
        _scan(gates, ends, None, carries, None, None, reverse, span=spans)
    h, initial_state, da = gradient or (None, None, None)
    _scan_kernel[(rows * spans * tiles,)](
        a, b, state, out, last, carries, ids, h, initial_state, da, length, span, dim,
        REVERSE=reverse, GRADIENT=gradient is not None, HAS_STATE=state is not None, HAS_INITIAL=initial_state is not None,
        STORE_LAST=last is not None, HAS_CARRIES=carries is not None, VARLEN=ids is not None, **launch.options(),
    )  # fmt: skip


def _beyond_empty(like: Tensor | None, b: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Memory for a state of each sequence; where one may be empty, no kernel writes and what came in, `like`, goes out."""
    if cu_seqlens is None:
        return b.new_empty(b.shape[0], b.shape[2], dtype=torch.float32)
    if like is None:
        return b.new_zeros(cu_seqlens.numel() - 1, b.shape[2], dtype=torch.float32)
    return like.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("memzoo::gated_scan_forward", mutates_args=())
def _forward(a: Tensor, b: Tensor, state: Tensor | None, want_last: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, last state or nothing)."""
    a, b, state, cu_seqlens = (None if t is None else t.contiguous() for t in (a, b, state, cu_seqlens))
    h = torch.empty_like(b)
    last = _beyond_empty(state, b, cu_seqlens) if want_last else None
    _scan(a, b, state, h, last, cu_seqlens, reverse=False)
    return h, b.new_empty(0, dtype=torch.float32) if last is None else last


@_forward.register_fake
def _(a, b, state, want_last, cu_seqlens):
    count = b.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    last = b.new_empty((count, b.shape[2]) if want_last else (0,), dtype=torch.float32)
    return torch.empty_like(b, memory_format=torch.contiguous_format), last


@torch.library.custom_op("memzoo::gated_scan_backward", mutates_args=())
def _backward(
    dy: Tensor, dlast: Tensor | None, a: Tensor, h: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(da, db, dstate); the last is empty when there is no such input."""
    dy, dlast, a, h, state, cu_seqlens = (None if t is None else t.contiguous() for t in (dy, dlast, a, h, state, cu_seqlens))
    da, db = torch.empty_like(a), torch.empty_like(h)
    dstate = None if state is None else _beyond_empty(dlast, h, cu_seqlens)
    _scan(a, dy, dlast, db, dstate, cu_seqlens, reverse=True, gradient=(h, state, da))
    return da, db, h.new_empty(0, dtype=torch.float32) if dstate is None else dstate


@_backward.register_fake
def _(dy, dlast, a, h, state, cu_seqlens):
    da, db = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, h))
    return da, db, h.new_empty((0,) if state is None else state.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    a, _, state, _, cu_seqlens = inputs
    ctx.save_for_backward(a, output[0], state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dlast):
    a, h, state, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(h)
    if dlast is not None and dlast.numel() == 0:
        dlast = None
    da, db, dstate = _backward(dy, dlast, a, h, state, cu_seqlens)
    return da, db, None if state is None else dstate, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("memzoo::gated_scan_step", mutates_args=())
def _step(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    a, b, state = a.contiguous(), b.contiguous(), state.contiguous()
    h, new_state = torch.empty_like(b), torch.empty_like(state)
    launch = STEP.lookup(1, capability_of(b.device))
    count = state.numel()
    _step_kernel[(triton.cdiv(count, launch.blocks["BC"]),)](a, b, state, h, new_state, count, **launch.options())
    return h, new_state


@_step.register_fake
def _(a, b, state):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (b, state))


def gated_scan_triton(
    a: Tensor, b: Tensor, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    h, last = _forward(a, b, initial_state, output_final_state, cu_seqlens)
    return h, last if output_final_state else None


def gated_scan_step(
    a: Tensor, b: Tensor, initial_state: Tensor, output_final_state: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The decode step: T = 1 with a state, no gradient."""
    return _step(a, b, initial_state)


def compile_specs(capability: int) -> Iterator[CompileSpec]:
    """Every launch-table entry for one compute capability, with what needs the most registers: packed, states, several spans."""
    sizes = {"T": "i32", "SPAN": "i32", "D": "i32"}
    inputs = {"a": "*fp32", "b": "*bf16", "state": "*fp32", "ids": "*i64"}
    numbers = dict.fromkeys(("last_state", "carries", "initial_state", "da"), "*fp32")
    tensors = {**inputs, **numbers, "out": "*bf16", "h": "*bf16", **sizes}
    flags = {"HAS_STATE": True, "STORE_LAST": True, "HAS_CARRIES": True, "VARLEN": True}
    nothing = {"h": None, "initial_state": None, "da": None, "GRADIENT": False, "HAS_INITIAL": False}
    plain = {**nothing, **dict.fromkeys(("state", "last_state", "carries", "ids")), **dict.fromkeys(flags, False)}
    launch = SCAN.lookup(1, capability)
    for name, types, constants in (
        ("forward", tensors, {"REVERSE": False, **flags, **nothing}),
        ("over spans", {**tensors, "b": "*fp32", "out": "*fp32"}, {"REVERSE": False, **plain}),
        ("over spans backwards", {**tensors, "b": "*fp32", "out": "*fp32"}, {"REVERSE": True, **plain}),
    ):
        yield CompileSpec(
            f"gated_scan {name}", _scan_kernel, types, {**constants, **launch.blocks}, launch.num_warps, launch.num_stages, ("D",)
        )
    yield CompileSpec(
        "gated_scan backward", _scan_kernel, tensors, {"REVERSE": True, "GRADIENT": True, "HAS_INITIAL": True, **flags, **launch.blocks},
        launch.num_warps, launch.num_stages, ("D",),
    )  # fmt: skip
    for name, reverse in (("local", False), ("local backwards", True)):
        yield CompileSpec(
            f"gated_scan {name}", _local_kernel, {**inputs, "gates": "*fp32", "ends": "*fp32", "cu_seqlens": "*i64", **sizes},
            {"REVERSE": reverse, "HAS_STATE": True, "VARLEN": True, **launch.blocks}, launch.num_warps, launch.num_stages, ("D",),
        )  # fmt: skip
    launch = STEP.lookup(1, capability)
    yield CompileSpec(
        "gated_scan step", _step_kernel,
        {"a": "*fp32", "b": "*bf16", "state": "*fp32", "h": "*bf16", "new_state": "*fp32", "count": "i32"},
        launch.blocks, launch.num_warps, launch.num_stages, ("count",),
    )  # fmt: skip
