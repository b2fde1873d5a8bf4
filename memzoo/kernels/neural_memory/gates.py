"""Triton: what the gates of one chunk come to (how much of each write, and of the state before, is left at each token) and its gradients.

With momentum eta, decay alpha and the places of a chunk as rows r and columns i (A[r, i] = 0 for i > r):

    E[r] = eta_r E[r-1] + onehot(r);   A[r] = (1 - alpha_r) A[r-1] + E[r]       a write at i leaves A[r, i] of itself in the weights
    e_r = eta_r e_{r-1}, e_{-1} = 1;   beta_r = (1 - alpha_r) beta_{r-1}, beta_{-1} = 1;   c_r = (1 - alpha_r) c_{r-1} + e_r, c_{-1} = 0

and the adjoints run backwards, `lA_r = dA[r] + (1 - alpha_{r+1}) lA_{r+1}` and so on. Plain recurrences: exact for gates of 0 and 1, no
logarithm and no division. One warp takes a chunk and head, row after row.

For each token and head and chunk length b: forward 4 b + 16 bytes written; backward 12 b + 16 read (A, E and their gradient). At b = 64 and
4.3 TB/s: 0.06 and 0.18 ns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.packing import chunk_indices


@triton.jit
def _chunks(n, position, cu_seqlens, T, BT: tl.constexpr, HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr):
    """How many chunks of sequence n this call touches; the first is short if one was left open at `position`."""
    length = T
    if VARLEN:
        length = (tl.load(cu_seqlens + n + 1) - tl.load(cu_seqlens + n)).to(tl.int32)
    opened = 0
    if HAS_POSITION:
        opened = tl.load(position + n).to(tl.int32)
    return tl.where(length > 0, tl.cdiv(opened + length, BT), 0)


@triton.jit
def _chunk(n, c, position, cu_seqlens, T, BT: tl.constexpr, HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr):
    """(base, front, end) of chunk c of sequence n: its place i, real for front <= i < end, is row base + i of [rows, ...] in memory."""
    if VARLEN:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = n.to(tl.int64) * T
        length = T
    opened = 0
    if HAS_POSITION:
        opened = tl.load(position + n).to(tl.int32)
    return first - opened + c * BT, tl.where(c == 0, opened, 0), tl.minimum(opened + length - c * BT, BT)


@triton.jit
def _chunk_of(
    program, position, cu_seqlens, chunks, T, BT: tl.constexpr, HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr
):  # fmt: skip
    """`_chunk` of a program's chunk, for kernels with a chunk a program; end <= front if the program is idle."""
    if VARLEN:
        n = tl.load(chunks + program * 2)
        c = tl.load(chunks + program * 2 + 1)
    else:
        count = tl.cdiv(T + (BT - 1 if HAS_POSITION else 0), BT)
        n = program // count
        c = program % count
    base, front, end = _chunk(tl.maximum(n, 0), c, position, cu_seqlens, T, BT, HAS_POSITION, VARLEN)
    return base, front, tl.where(n < 0, 0, end)


@triton.jit
def _load(x, base, front, end, head, H, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """The rows of a chunk of a [rows, H, D] tensor, zero at places that are not real and in columns from D on."""
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BD)[None, :]
    inside = (i >= front) & (i < end)
    if D != BD:
        inside = inside & (j < D)
    return tl.load(x + (base + i) * (H * D) + head * D + j, mask=inside, other=0.0)


@triton.jit
def _store(x, value, base, front, end, head, H, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BD)[None, :]
    inside = (i >= front) & (i < end)
    if D != BD:
        inside = inside & (j < D)
    tl.store(x + (base + i) * (H * D) + head * D + j, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gate(x, base, front, end, head, H, BT: tl.constexpr, COUNT: tl.constexpr, WHICH: tl.constexpr):
    """Number WHICH of COUNT a token, float32, zero at places that are not real."""
    i = tl.arange(0, BT)
    return tl.load(x + ((base + i) * H + head) * COUNT + WHICH, mask=(i >= front) & (i < end), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _prepare_kernel(
    momentum, decay, mask, scalars, products, position, cu_seqlens, chunks, T, H,
    HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr, KEEP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A (and with KEEP also E) and the scalars of one chunk and head, row after row."""
    head = tl.program_id(0) % H
    base, front, end = _chunk_of(tl.program_id(0) // H, position, cu_seqlens, chunks, T, BT, HAS_POSITION, VARLEN)
    i = tl.arange(0, BT)
    left = tl.zeros((BT,), tl.float32)  # E[r]
    held = tl.zeros((BT,), tl.float32)  # A[r]
    e, beta, c = 1.0, 1.0, 0.0
    for r in range(front, end):
        at = (base + r) * H + head
        eta = tl.load(momentum + at).to(tl.float32)
        keep = 1.0 - tl.load(decay + at).to(tl.float32)
        left = left * eta + tl.where(i == r, 1.0, 0.0)
        held = held * keep + left
        e *= eta
        beta *= keep
        c = c * keep + e
        tl.store(mask + at * BT + i, held)
        if KEEP:
            tl.store(products + at * BT + i, left)
        tl.store(scalars + at * 4, beta)
        tl.store(scalars + at * 4 + 1, c)
        tl.store(scalars + at * 4 + 2, e)
    tl.store(scalars + ((base + i) * H + head) * 4 + 3, left, mask=(i >= front) & (i < end))


@triton.jit(do_not_specialize=["T"])
def _prepare_backward_kernel(
    momentum, decay, mask, scalars, products, dmask, dscalars, dmomentum, ddecay, position, cu_seqlens, chunks, T, H,
    HAS_POSITION: tl.constexpr, VARLEN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates of one chunk and head, row after row from the last."""
    head = tl.program_id(0) % H
    base, front, end = _chunk_of(tl.program_id(0) // H, position, cu_seqlens, chunks, T, BT, HAS_POSITION, VARLEN)
    i = tl.arange(0, BT)
    real = (i >= front) & (i < end)
    # The adjoints of the row after this one, times its gates.
    grad_left = tl.load(dscalars + ((base + i) * H + head) * 4 + 3, mask=real, other=0.0)
    grad_held = tl.zeros((BT,), tl.float32)
    grad_e, grad_beta, grad_c = 0.0, 0.0, 0.0
    for back in range(front, end):
        r = front + end - 1 - back
        at = (base + r) * H + head
        eta = tl.load(momentum + at).to(tl.float32)
        keep = 1.0 - tl.load(decay + at).to(tl.float32)
        grad_held += tl.load(dmask + at * BT + i, mask=real & (i <= r), other=0.0)
        grad_left += grad_held
        grad_beta += tl.load(dscalars + at * 4)
        grad_c += tl.load(dscalars + at * 4 + 1)
        grad_e += tl.load(dscalars + at * 4 + 2) + grad_c
        # The row before, if this is not the first.
        before = at - H
        there = r > front
        held = tl.load(mask + before * BT + i, mask=real & (i < r), other=0.0)
        left = tl.load(products + before * BT + i, mask=real & (i < r), other=0.0)
        beta = tl.load(scalars + before * 4, mask=there, other=1.0)
        c = tl.load(scalars + before * 4 + 1, mask=there, other=0.0)
        e = tl.load(scalars + before * 4 + 2, mask=there, other=1.0)
        slope = tl.sum(grad_held * held, 0) + grad_beta * beta + grad_c * c
        tl.store(ddecay + at, -slope)
        tl.store(dmomentum + at, tl.sum(grad_left * left, 0) + grad_e * e)
        grad_held *= keep
        grad_left *= eta
        grad_beta *= keep
        grad_c *= keep
        grad_e *= eta


def chunk_table(position: Tensor | None, cu_seqlens: Tensor, length: int, chunk_size: int) -> Tensor:
    """Which chunk of which sequence each program of `_chunk_of` handles, when packed; a chunk left open counts from its own start."""
    if position is None:
        return chunk_indices(cu_seqlens, length, chunk_size)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    places = torch.where(lengths > 0, lengths + position.to(lengths.dtype), 0)
    ends = torch.cat((torch.zeros_like(places[:1]), places.cumsum(0)))
    return chunk_indices(ends, length + (chunk_size - 1) * lengths.numel(), chunk_size)


def _launch(momentum: Tensor, position: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int):
    """(programs, arguments, options) that the forward and backward share."""
    batch, length, heads = momentum.shape
    chunks = None
    if cu_seqlens is None:
        programs = batch * triton.cdiv(length + (0 if position is None else chunk_size - 1), chunk_size)
    else:
        chunks = chunk_table(position, cu_seqlens, length, chunk_size)
        programs = chunks.shape[0]
    options = {"HAS_POSITION": position is not None, "VARLEN": cu_seqlens is not None, "BT": chunk_size, "num_warps": 1}
    return programs * heads, (position, cu_seqlens, chunks, length, heads), options


def prepare(
    momentum: Tensor,
    decay: Tensor,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    keep_products: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(mask, scalars, products), all float32 and by token, of contiguous gates [B, T, H].

    mask [B, T, H, chunk_size]: the token's row of A over the places of its chunk, zero where no real token of this call stands. scalars
    [B, T, H, 4]: beta, c, e, and the last row of E at the token's place. products: E laid out as the mask, for `prepare_backward`.
    """
    mask = momentum.new_empty(*momentum.shape, chunk_size, dtype=torch.float32)
    scalars = momentum.new_empty(*momentum.shape, 4, dtype=torch.float32)
    products = torch.empty_like(mask) if keep_products else None
    programs, arguments, options = _launch(momentum, position, cu_seqlens, chunk_size)
    _prepare_kernel[(programs,)](momentum, decay, mask, scalars, products, *arguments, KEEP=keep_products, **options)
    return mask, scalars, products


def prepare_backward(
    momentum: Tensor,
    decay: Tensor,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    prepared: tuple[Tensor, Tensor, Tensor],
    dmask: Tensor,
    dscalars: Tensor,
) -> tuple[Tensor, Tensor]:
    """(dmomentum, ddecay) in float32 from the gradients of `prepare`'s mask and scalars, both float32; prepared with its products.

    Read of dmask: at row r of a chunk, the columns of real places up to r.
    """
    dmomentum, ddecay = (torch.empty_like(momentum, dtype=torch.float32) for _ in range(2))
    programs, arguments, options = _launch(momentum, position, cu_seqlens, chunk_size)
    _prepare_backward_kernel[(programs,)](
        momentum, decay, *prepared, dmask, dscalars, dmomentum, ddecay, *arguments, **options
    )  # fmt: skip
    return dmomentum, ddecay
