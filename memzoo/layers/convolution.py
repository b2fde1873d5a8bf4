"""The short depthwise causal convolution that stands after the q, k and v projections of recurrent memories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import causal_conv1d
from .layout import TokenLayout
from .state import LayerState


class ShortConvolution(nn.Module):
    """y = activation(causal depthwise convolution of x), [B, T, C] to [B, T, C].

    Args:
        channels: C.
        width: taps, the token's own included.
        name: under which the last width - 1 inputs are kept between calls.
        activation: None or "silu".
    """

    def __init__(self, channels: int, width: int, name: str, activation: str | None = "silu"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.name, self.activation = name, activation

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None, name: str | None = None) -> Tensor:
        """The convolution of x; `name` keeps the inputs of a second stream through the same weights apart."""
        name = self.name if name is None else name
        y, last = causal_conv1d(
            x,
            self.weight.to(x.dtype),
            activation=self.activation,
            initial_state=None if state is None else state.get(name),
            output_final_state=state is not None,
            cu_seqlens=layout.cu_seqlens,
        )
        if state is not None:
            state.set(name, last)
        return y

    def init_weights(self, init: Any) -> None:
        """The identity, and taps uniform within 1 / sqrt(width) as torch's convolutions start.

        From the uniform taps alone associative recall takes twice the steps to set in: a token's own key is lost among its neighbours'.
        """
        bound = self.weight.shape[1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        with torch.no_grad():
            self.weight[:, -1] += 1

    def state_bytes(self, itemsize: int) -> int:
        """Bytes kept for one sequence."""
        return (self.weight.shape[1] - 1) * self.weight.shape[0] * itemsize

    def flops_per_token(self) -> int:
        """A multiply-add a tap and channel."""
        return 2 * self.weight.numel()

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, width={self.weight.shape[1]}, activation={self.activation}"
