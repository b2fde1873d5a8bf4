"""A vector as the definition of memory caching takes a memory: written elsewhere, read as it is."""

from __future__ import annotations

from torch import Tensor

from ..memory_caching.reference import Memory


def cached_vectors(h: Tensor) -> Memory:
    """h [B, T, H, D], or packed: the states after every token."""
    return Memory(
        fresh=lambda: h.new_zeros(1, *h.shape[2:]),
        write=lambda state, previous, row, t: h[row, t][None],
        weights=lambda state: (state,),
        read=lambda weights, row, t: weights[0],
        carry=lambda state: state,
        linear=True,
    )
