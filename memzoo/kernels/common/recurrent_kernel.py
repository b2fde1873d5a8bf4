"""What the Triton kernels of the recurrences whose gates read the last state (lstm, gru) share.

A program holds the recurrent weights of one head and carries a tile of sequences through time. A row of the tile that has come to its
sequence's end keeps its state and loads and stores nothing, so sequences of different lengths need no sorting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import interpreting
from .launch import LaunchTable, capability_of, next_power_of_2

MAX_DIM = {2: 128, 4: 64}  # by bytes an element: a program holds a head's recurrent weights


@triton.jit
def sigmoid(a):
    return 1 / (1 + tl.exp(-a))


@triton.jit
def tanh(a):
    return 2 / (1 + tl.exp(-2 * a)) - 1


@triton.jit
def rows(cu_seqlens, N, T, H, VARLEN: tl.constexpr, BN: tl.constexpr):
    """(head, sequences, their first tokens, their lengths) of this program; sequences beyond the last have length 0."""
    head = tl.program_id(0) % H
    n = (tl.program_id(0) // H) * BN + tl.arange(0, BN)
    if VARLEN:
        first = tl.load(cu_seqlens + n, mask=n < N, other=0).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1, mask=n < N, other=0).to(tl.int64) - first).to(tl.int32)
    else:
        first = n.to(tl.int64) * T
        length = tl.where(n < N, T, 0)
    return head, n, first, length


@triton.jit
def load_weight(weight, head, gate, GATES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TRANSPOSED: tl.constexpr):
    """One gate's recurrent weight [D, D] of one head, or its transpose, zeros beyond D."""
    i = tl.arange(0, BD)
    if TRANSPOSED:
        at = i[None, :] * (GATES * D) + i[:, None]
    else:
        at = i[:, None] * (GATES * D) + i[None, :]
    inside = (i < D)[:, None] & (i < D)[None, :]
    return tl.load(weight + head.to(tl.int64) * D * GATES * D + gate * D + at, mask=inside, other=0.0)


@triton.jit
def at_state(n, N, head, H, D: tl.constexpr, BD: tl.constexpr):
    """Offsets and mask of the tile's states [N, H, D]."""
    i = tl.arange(0, BD)
    return (n.to(tl.int64) * H + head)[:, None] * D + i[None, :], (n < N)[:, None] & (i < D)[None, :]


@triton.jit
def unknown(n, steps):
    """n, in a way that the compiler cannot know: what is computed from it after a loop is held in no register throughout the loop."""
    return n + (steps >> 31)


@triton.jit
def at_time(t, first, length, head, H, D: tl.constexpr, BD: tl.constexpr, GATES: tl.constexpr):
    """Offsets and mask of the tile's tokens at time t in [.., H, GATES, D], of the first gate; the others follow D apart."""
    i = tl.arange(0, BD)
    time = tl.zeros_like(length) + t
    present = (time >= 0) & (time < length)
    return ((first + time) * H + head)[:, None] * (GATES * D) + i[None, :], present[:, None] & (i < D)[None, :]


class Call:
    """What every launch of one forward or backward shares."""

    def __init__(self, x: Tensor, states: Tensor, cu_seqlens: Tensor | None):
        self.count, self.heads, self.dim = states.shape
        self.size = max(16, next_power_of_2(self.dim))
        # float32 takes twice the room of what the tables are made for.
        self.entry = self.size if interpreting() else self.size * x.element_size() // 2
        self.capability = capability_of(x.device)
        precision = "ieee" if interpreting() else "tf32x3" if x.dtype == torch.float32 else "tf32"
        self.flags = {"D": self.dim, "BD": self.size, "VARLEN": cu_seqlens is not None, "PRECISION": precision}

    def launch(self, table: LaunchTable) -> tuple[tuple[int], dict[str, object]]:
        """The grid, a program for each head and tile of sequences, and the options of a kernel."""
        launch = table.lookup(self.entry, self.capability)
        return (triton.cdiv(self.count, launch.blocks["BN"]) * self.heads,), {**self.flags, **launch.options()}


def check_fits(op: str, x: Tensor) -> None:
    """Raise unless a program can hold a head's recurrent weights."""
    limit = MAX_DIM[x.element_size()]
    if x.shape[-1] > limit:
        raise ValueError(
            f"{op}: x has head dimension {x.shape[-1]} in {x.dtype}, implementation 'triton' holds at most {MAX_DIM[2]} in half precision "
            f"and {MAX_DIM[4]} in float32; use more heads, half precision or implementation='chunked'"
        )


def by_head(tokens: Tensor) -> Tensor:
    """A view [H, tokens, features] of [B, T, H, ...], for products over all tokens at once."""
    return tokens.flatten(0, 1).flatten(2).transpose(0, 1)


def weight_gradient(before: Tensor, recurrent: Tensor) -> Tensor:
    """[H, D, gates, D] from the states before each token [B, T, H, D] and the gradients of the gates [B, T, H, gates, D]."""
    product = torch.bmm(by_head(before).mT, by_head(recurrent))
    return product.view(before.shape[2], before.shape[3], *recurrent.shape[3:])
