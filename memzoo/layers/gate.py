"""A projection to gates whose biases start where the gate should."""

from __future__ import annotations

from typing import Any

from torch import nn


class Gate(nn.Linear):
    """A linear map to one number a head and token, with every bias starting at `start` (before the gate's own non-linearity)."""

    def __init__(self, hidden_size: int, gates: int, start: float = 0.0):
        super().__init__(hidden_size, gates)
        self.start = start

    def init_weights(self, init: Any) -> None:
        init.constant_(self.bias, self.start)
