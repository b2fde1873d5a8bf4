"""Operations that the memories count alike: of projections, and how many rows an average token reads."""

from __future__ import annotations

from torch import nn


def projection_flops(module: nn.Module) -> int:
    """FLOPs of one token through every linear map in `module`, each used once: 2 a weight; biases, being element-wise, are left out."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def rows_read(length: int, window: int | None = None) -> float:
    """Rows that a causal read sees, its own included, averaged over a sequence of `length` tokens; at most the last `window`."""
    window = length if window is None else min(window, length)
    return window - window * (window - 1) / (2 * length)  # the first `window` tokens see 1, 2, ... rows, the others `window`
