"""How the tokens of one forward pass lie in memory, which every layer is told: a dense batch, or rows packed end to end."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Dense: hidden states are [B, T, d] and every token is real. Packed: they are [1, total, d], cut into rows by `cu_seqlens`.

    Pads never reach a layer: a padded batch is packed first, so that "padding changes nothing" and "packed equals separate" are one
    mechanism.

    Args:
        position_ids: each token's place in its own sequence, [B, T] or [1, total].
        cu_seqlens: boundaries of the rows, [N + 1], or None when dense.
        rotary: cosines and sines for the positions, computed once for all layers, or None.
        encoded: an encoder's states [B, S, d] and their mask [B, S] or None, for layers with a read-from memory; None if not given.
    """

    position_ids: Tensor
    cu_seqlens: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    encoded: tuple[Tensor, Tensor | None] | None = field(default=None, repr=False)


def indices_of_real_tokens(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(flat indices of the tokens whose mask is not 0, [total]; boundaries of the rows, [B + 1]) for a mask [B, T]."""
    real = mask != 0
    lengths = real.sum(1)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    return real.flatten().nonzero().squeeze(1), cu_seqlens
