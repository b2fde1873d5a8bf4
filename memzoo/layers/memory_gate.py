"""How what attention gives and what a memory gives become one: the gating of Titans MAC and MAG (arXiv 2501.00663, Eq. 25 and 28)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import TokenLayout
from .neural_memory import NeuralMemory
from .persistent_attention import PersistentAttention
from .state import LayerState

GATES = ("product", "mix")


class MemoryGate(nn.Module):
    """o = y (x) m of two streams [B, T, hidden_size].

    Args:
        hidden_size: width of the streams.
        kind: "product", norm(y) * sigmoid(norm(m)), each norm an RMSNorm with a learned weight (Sec. 4.2: both outputs are normalised
            with learnable vectors, then a non-linearity); or "mix", g norm(y) + (1 - g) norm(m) with g = sigmoid(W x).
        norm_eps: of the norms.

    The weight of what enters the residual stream starts at 0.1: normalised to 1 it would drown the embeddings at the start.
    """

    def __init__(self, hidden_size: int, kind: str = "product", norm_eps: float = 1e-6):
        super().__init__()
        if kind not in GATES:
            raise ValueError(f"MemoryGate: kind is {kind!r}, needs one of {', '.join(GATES)}")
        self.norm_eps = norm_eps
        self.attention_weight = nn.Parameter(torch.empty(hidden_size))
        self.memory_weight = nn.Parameter(torch.empty(hidden_size))
        self.mix_proj = nn.Linear(hidden_size, hidden_size, bias=False) if kind == "mix" else None
        self.init_weights(nn.init)

    def forward(self, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
        """`x` the layer's input, `y` from attention, `m` from the memory."""
        y = F.rms_norm(y, y.shape[-1:], self.attention_weight, self.norm_eps)
        m = F.rms_norm(m, m.shape[-1:], self.memory_weight, self.norm_eps)
        if self.mix_proj is None:
            return y * m.sigmoid()
        return torch.lerp(m, y, self.mix_proj(x).sigmoid())

    def init_weights(self, init: Any) -> None:
        init.constant_(self.attention_weight, 0.1)
        init.constant_(self.memory_weight, 1.0 if self.mix_proj is None else 0.1)


class MemoryAsGate(nn.Module):
    """MAG: attention in a sliding window and a memory beside it, o = SW-Attn(x) (x) M(x) (Eq. 26 to 28); [B, T, hidden_size] to the same.

    Args:
        memory, attention, gate: the parts.
    """

    def __init__(self, memory: NeuralMemory, attention: PersistentAttention, gate: MemoryGate):
        super().__init__()
        self.memory, self.attention, self.gate = memory, attention, gate

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        return self.gate(x, self.attention(x, layout, state), self.memory(x, layout, state))

    def state_bytes(self, length: int, itemsize: int) -> int:
        return self.memory.state_bytes(length, itemsize) + self.attention.state_bytes(length, itemsize)

    def flops_per_token(self, length: int) -> float:
        mixed = 0 if self.gate.mix_proj is None else 2 * self.gate.mix_proj.weight.numel()
        return self.memory.flops_per_token(length) + self.attention.flops_per_token(length) + mixed
