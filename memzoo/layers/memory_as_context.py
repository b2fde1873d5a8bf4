"""MAC, memory as context: attention inside a segment reads what the memory held before it, and its output is written to the memory.

Titans (arXiv 2501.00663), Eq. 21 to 25, for segment s of C tokens, causal at every token:

    h_t = M_{s-1}(q_t)                     the state before the segment
    y_t = Attn([persistent | h_j, x_j for j <= t in the segment])
    M_t <- write y_t;   o_t = y_t (x) M_t(y_t)      written and read token by token

Read at segment granularity (write the whole segment, then read at its tokens) the equations let a token see the ones after it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .layout import TokenLayout
from .memory_gate import MemoryGate
from .neural_memory import NeuralMemory
from .persistent_attention import PersistentAttention
from .state import LayerState


class MemoryAsContext(nn.Module):
    """[B, T, hidden_size] to the same shape, segment after segment; a segment's tokens run at once.

    Args:
        memory, attention, gate: the parts; `attention` was built with the same segment.
        segment: C, in real tokens of each sequence.
        residual: y_t = x_t + Attn(...), so that the memory is written with the token itself from the first step on.
    """

    def __init__(
        self, memory: NeuralMemory, attention: PersistentAttention, gate: MemoryGate, segment: int, residual: bool = False
    ):
        super().__init__()
        self.memory, self.attention, self.gate, self.segment, self.residual = memory, attention, gate, segment, residual

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        state = LayerState() if state is None else state
        count = x.shape[0] if layout.cu_seqlens is None else layout.cu_seqlens.numel() - 1
        # The query stream of x has a convolution of its own history: the same weights read y when it is written.
        q = self.memory.queries(x, layout, state, "conv_context")
        if state.get("before_0") is None:
            self._keep(state, tuple(w.expand(count, *w.shape) for w in self.memory.memory))
        if layout.cu_seqlens is None and isinstance(state.open, int):
            return self._agreeing(x, q, layout, state)
        return self._ragged(x, q, layout, state, count)

    def _agreeing(self, x: Tensor, q: Tensor, layout: TokenLayout, state: LayerState) -> Tensor:
        """A dense batch whose sequences are all at the same place of their segment."""
        outputs, start, length = [], 0, x.shape[1]
        while start < length:
            stop = min(length, start + self.segment - state.open)
            tokens = slice(start, stop)
            outputs.append(self._segment(x[:, tokens], q[:, tokens], _at(layout, tokens, None), state))
            state.open, start = (state.open + stop - start) % self.segment, stop
            if state.open == 0:
                state.clear()
                self._keep(state, self.memory.held(state).weights)
        return torch.cat(outputs, 1)

    def _ragged(self, x: Tensor, q: Tensor, layout: TokenLayout, state: LayerState, count: int) -> Tensor:
        """Packed rows, or sequences at different places: in each round every sequence runs what is left of its segment."""
        batch, length = x.shape[:2]
        ends = layout.cu_seqlens
        if ends is None:
            ends = torch.arange(count + 1, device=x.device) * length
        ends = ends.long()
        x, q = x.flatten(0, 1)[None], q.flatten(0, 1)[None]
        opened = torch.as_tensor(state.open, device=x.device).expand(count)
        left, place = ends[1:] - ends[:-1], ends[:-1]
        outputs, order = [], []
        while bool((left > 0).any()):
            take = torch.minimum(left, self.segment - opened)
            bounds = torch.cat((take.new_zeros(1), take.cumsum(0)))
            token = torch.repeat_interleave(place - bounds[:-1], take) + torch.arange(int(bounds[-1]), device=x.device)
            outputs.append(self._segment(x[:, token], q[:, token], _at(layout, token, bounds), state))
            order.append(token)
            opened, left, place = opened + take, left - take, place + take
            done = opened == self.segment
            opened = torch.where(done, 0, opened)
            state.clear(done)
            ended = done[:, None, None, None]
            new = zip(self.memory.held(state).weights, self._before(state))
            self._keep(state, tuple(torch.where(ended, w, before) for w, before in new))
        state.open = opened
        output = torch.cat(outputs, 1)[:, torch.cat(order).argsort()]
        return output.view(batch, length, -1)

    def _segment(self, x: Tensor, q: Tensor, layout: TokenLayout, state: LayerState) -> Tensor:
        """Tokens of which no sequence has two segments."""
        retrieved = self.memory.retrieve(x, q, self._before(state), layout)
        y = self.attention(x, layout, state, retrieved)
        y = x + y if self.residual else y
        return self.gate(x, y, self.memory(y, layout, state))

    def _before(self, state: LayerState) -> tuple[Tensor, ...]:
        """The memory's weights before the open segment."""
        return tuple(state.get(f"before_{i}") for i in range(len(self.memory.memory)))

    def _keep(self, state: LayerState, weights: tuple[Tensor, ...]) -> None:
        for i, weight in enumerate(weights):
            state.set(f"before_{i}", weight.to(torch.promote_types(weight.dtype, torch.float32)))

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Bytes kept for one sequence of `length` tokens: the memory, its weights before the open segment, the open segment's rows."""
        parts = self.memory.state_bytes(length, itemsize) + self.attention.state_bytes(length, itemsize)
        streams = self.memory.convolutions["q"].state_bytes(itemsize) if self.memory.convolutions else 0
        return parts + streams + 4 * sum(weight.numel() for weight in self.memory.memory)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a token: memory, attention, and the retrieval of h: query, convolution, read, gate and projection again."""
        memory = self.memory
        again = [part.weight for part in (memory.q_proj, memory.o_proj, memory.gate_proj) if part is not None]
        retrieval = sum(2 * weight.numel() for weight in (*again, *memory.memory))
        retrieval += memory.convolutions["q"].flops_per_token() if memory.convolutions else 0
        retrieval += 0 if self.gate.mix_proj is None else 2 * self.gate.mix_proj.weight.numel()
        return memory.flops_per_token(length) + self.attention.flops_per_token(length) + retrieval


def _at(layout: TokenLayout, tokens: slice | Tensor, cu_seqlens: Tensor | None) -> TokenLayout:
    """The layout of some tokens of a layout: a slice of a dense batch, or packed tokens by their flat index."""
    position_ids, rotary = layout.position_ids, layout.rotary
    if cu_seqlens is not None:
        position_ids = position_ids.flatten()[None]
        rotary = None if rotary is None else tuple(part.flatten(0, 1)[None] for part in rotary)
    rotary = None if rotary is None else tuple(part[:, tokens] for part in rotary)
    return replace(layout, position_ids=position_ids[:, tokens], cu_seqlens=cu_seqlens, rotary=rotary)
