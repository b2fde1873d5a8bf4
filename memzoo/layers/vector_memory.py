"""Vector memories: an LSTM, a GRU or an elementwise gated recurrence a head, alone or with the states of earlier segments cached.

Where a matrix memory is read with a query, a vector is read as it is, behind an output gate: y_t = o_t (x) (g^t h_t + sum_i g^i h^(i))
with a cache (arXiv 2602.24281), y_t = o_t (x) h_t without. The LSTM's memory is tanh of its cell and o_t its own output gate, so that alone
it is the LSTM; the others get a gate from the token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import gated_scan, gru, lstm, vector_caching
from ..kernels.memory_caching.state import Pieces, PieceTable, piece_table
from .caching import CacheOptions, Router, load_cache, save_cache
from .convolution import ShortConvolution
from .flops import projection_flops
from .layout import TokenLayout
from .precision import wide
from .state import LayerState

CELLS = {"lstm": 4, "gru": 3, "gated_linear": 2}  # gates that a token's projection gives


class VectorMemory(nn.Module):
    """A state of `head_dim` numbers a head; [B, T, hidden_size] to the same shape.

    lstm: Hochreiter and Schmidhuber 1997; gru: Cho et al. 2014, as torch has them but with block-diagonal heads. gated_linear:
    h_t = a_t h_{t-1} + (1 - a_t) x_t, a_t = sigmoid(.) of the token alone (minGRU, arXiv 2410.01201).

    Args:
        hidden_size: width of the input and the output.
        num_heads: recurrences that do not mix.
        head_dim: numbers of a state.
        cell: "lstm", "gru" or "gated_linear".
        conv_width: taps of a causal convolution with SiLU before the recurrence's and the router's projections; 0 for none.
        bias: biases on the query, key and output projections (the gates always have one).
        output_norm: RMSNorm of each head's read.
        norm_eps: of that norm.
        caching: read the states of earlier segments too; None for the recurrence alone.
        routing_dim: width of the descriptors that segments are scored by; None for head_dim.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        cell: str = "lstm",
        conv_width: int = 0,
        bias: bool = False,
        output_norm: bool = False,
        norm_eps: float = 1e-6,
        caching: CacheOptions | None = None,
        routing_dim: int | None = None,
    ):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"VectorMemory: cell is {cell!r}, needs one of {', '.join(CELLS)}")
        self.num_heads, self.head_dim, self.cell, self.caching = num_heads, head_dim, cell, caching
        width, gates = num_heads * head_dim, CELLS[cell]
        self.convolution = ShortConvolution(hidden_size, conv_width, "conv") if conv_width else None
        self.gates_proj = nn.Linear(hidden_size, gates * width)
        recurrent = cell != "gated_linear"
        self.recurrent_weight = nn.Parameter(torch.empty(num_heads, head_dim, gates, head_dim)) if recurrent else None
        self.recurrent_bias = nn.Parameter(torch.empty(num_heads, head_dim)) if cell == "gru" else None
        self.gate_proj = nn.Linear(hidden_size, width) if cell != "lstm" else None
        self.output_norm = nn.RMSNorm(head_dim, eps=norm_eps) if output_norm else None
        self.o_proj = nn.Linear(width, hidden_size, bias=bias)
        self.router = self.q_proj = self.k_proj = None
        if caching is not None and caching.scored:
            self.router = Router(hidden_size, num_heads, head_dim, caching.routing, routing_dim)
            self.k_proj = nn.Linear(hidden_size, width, bias=bias)
            self.q_proj = nn.Linear(hidden_size, width, bias=bias) if caching.routing == "energy" else None

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        seen = x if self.convolution is None else self.convolution(x, layout, state)
        gates = self.gates_proj(seen).unflatten(-1, (self.num_heads, CELLS[self.cell], self.head_dim))
        memory, gate = self._recurrence(gates, layout, state)
        if self.gate_proj is not None:
            gate = self.gate_proj(x).unflatten(-1, (self.num_heads, -1)).sigmoid()
        if self.caching is not None:
            memory = self._many_memories(x, seen, memory, layout, state)
        y = gate * memory
        if self.output_norm is not None:
            y = self.output_norm(y)
        return self.o_proj(y.flatten(2))

    def _recurrence(self, gates: Tensor, layout: TokenLayout, state: LayerState | None) -> tuple[Tensor, Tensor | None]:
        """(memory after every token [B, T, H, D], the LSTM's output gate or None), started anew with every segment where that is so."""
        names = ("hidden", "cell") if self.cell == "lstm" else ("hidden",)
        held = None if state is None or state.get("hidden") is None else [state.get(name) for name in names]
        position = 0 if state is None else state.open
        if self.caching is None or not self.caching.restart:
            memory, gate, last = self._scan(gates, held, layout.cu_seqlens)
        elif layout.cu_seqlens is None and isinstance(position, int):
            memory, gate, last = self._in_runs(gates, held, Pieces(gates.shape[1], self.caching.segment_length, position, 0))
        else:
            memory, gate, last = self._in_pieces(gates, held, layout, position)
        if state is not None:
            for name, part in zip(names, last):
                state.set(name, part)
        return memory, gate

    def _scan(
        self, gates: Tensor, held: list[Tensor] | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """(memory after every token, the LSTM's output gate or None, state) of sequences [B, T, H, gates, D], or packed."""
        options = {"output_final_state": True, "cu_seqlens": cu_seqlens}
        if self.cell == "lstm":
            initial = None if held is None else tuple(held)
            (gate, cell), last = lstm(gates, self.recurrent_weight, return_cells=True, initial_state=initial, **options)
            return cell.tanh(), gate, list(last)
        if self.cell == "gru":
            memory, last = gru(
                gates, self.recurrent_weight, self.recurrent_bias, initial_state=None if held is None else held[0], **options
            )
            return memory, None, [last]
        keep, new = wide(gates[:, :, :, 0]).sigmoid().flatten(2), gates[:, :, :, 1].flatten(2)
        added = ((1 - keep) * new).to(gates.dtype)
        memory, last = gated_scan(keep, added, initial_state=None if held is None else held[0].flatten(1), **options)
        return memory.unflatten(2, (self.num_heads, -1)), None, [last.unflatten(1, (self.num_heads, -1))]

    def _in_runs(self, gates: Tensor, held: list[Tensor] | None, pieces: Pieces) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """A dense batch whose rows agree: pieces of one size are a batch of their own."""
        batch, memories, output_gates = len(gates), [], []
        for which in pieces.runs():
            count, start, size = which.stop - which.start, pieces.starts[which.start], pieces.sizes[which.start]
            rows = gates[:, start : start + count * size].unflatten(1, (count, size)).flatten(0, 1)
            begin = None
            if held is not None and which.start == 0:
                begin = [F.pad(part[:, None], (0, 0, 0, 0, 0, count - 1)).flatten(0, 1) for part in held]
            memory, gate, last = self._scan(rows, begin, None)
            memories.append(memory.reshape(batch, count * size, *memory.shape[2:]))
            output_gates.append(None if gate is None else gate.reshape(batch, count * size, *gate.shape[2:]))
        last = [part.unflatten(0, (batch, count))[:, -1] for part in last]
        if pieces.position == 0:
            last = [torch.zeros_like(part) for part in last]
        return torch.cat(memories, 1), None if output_gates[0] is None else torch.cat(output_gates, 1), last

    def _in_pieces(self, gates: Tensor, held, layout: TokenLayout, position) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Packed sequences, or rows in different places of their segments: all pieces as packed sequences."""
        shape = gates.shape[:2]
        table = piece_table(*shape, layout.cu_seqlens, self.caching.segment_length, position)
        bounds = torch.tensor(table.cu_pieces, device=gates.device)
        begin = None if held is None else [_to_pieces(part, table) for part in held]
        memory, gate, last = self._scan(gates.flatten(0, 1)[None], begin, bounds)
        memory, gate = (None if part is None else part.reshape(*shape, *part.shape[2:]) for part in (memory, gate))
        return memory, gate, [_from_pieces(part, table, was) for part, was in zip(last, held or [None] * len(last))]

    def _many_memories(self, x: Tensor, seen: Tensor, memory: Tensor, layout: TokenLayout, state: LayerState | None) -> Tensor:
        keys = u = None
        if self.router is not None:
            q, k = (None if part is None else self._normalized(part(seen)) for part in (self.q_proj, self.k_proj))
            u, keys = self.router(x, k if q is None else q, k)
        options = self.caching.arguments()
        del options["restart"]  # the recurrence's own matter
        y, last = vector_caching(
            memory,
            keys,
            u,
            **options,
            initial_state=None if state is None else load_cache(state, state.get("memory"), 1),
            output_final_state=state is not None,
            cu_seqlens=layout.cu_seqlens,
        )
        if last is not None:
            state.set("memory", last.memory)
            save_cache(state, last, self.caching.offload)
        return y

    def _normalized(self, x: Tensor) -> Tensor:
        return F.normalize(wide(x.unflatten(-1, (self.num_heads, -1))), dim=-1).to(x.dtype)

    def init_weights(self, init: Any) -> None:
        """Recurrent weights uniform as torch's; forget and keep gates spread over time constants of 2 to 64 tokens."""
        bound = self.head_dim**-0.5
        if self.recurrent_weight is not None:
            init.uniform_(self.recurrent_weight, -bound, bound)
        if self.recurrent_bias is not None:
            init.zeros_(self.recurrent_bias)
        kept = {"lstm": 1, "gru": 1, "gated_linear": 0}[self.cell]  # the gate that keeps the state
        spans = 2.0 ** torch.linspace(1, 6, self.head_dim, device=self.gates_proj.bias.device)
        bias = torch.zeros_like(self.gates_proj.bias).view(self.num_heads, CELLS[self.cell], self.head_dim)
        bias[:, kept] = (spans - 1).log()
        init.copy_(self.gates_proj.bias, bias.flatten())

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Bytes kept for one sequence: the recurrence's state in float32, and with a cache one memory a closed segment."""
        numbers = self.num_heads * self.head_dim
        held = 4 * numbers * (2 if self.cell == "lstm" else 1)
        if self.caching is not None:
            size = 0 if self.router is None else self.router.size
            held += 4 * numbers + self.caching.state_bytes(length, self.num_heads, self.head_dim, size, linear=True)
        return held + (0 if self.convolution is None else self.convolution.state_bytes(itemsize))

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a token: projections, the recurrent product, and scores and reads of cached states."""
        flops = projection_flops(self) + (0 if self.recurrent_weight is None else 2 * self.recurrent_weight.numel())
        flops += 0 if self.convolution is None else self.convolution.flops_per_token()
        if self.caching is not None and self.caching.scored:
            flops += self.caching.flops(length, self.num_heads, 2 * self.head_dim, self.router.size, linear=True)
            flops += self.router.flops_per_token()
        return float(flops)

    def extra_repr(self) -> str:
        return f"cell={self.cell}, heads={self.num_heads}, head_dim={self.head_dim}"


def _to_pieces(held: Tensor, table: PieceTable) -> Tensor:
    """States of pieces [P, ...] from those of sequences [N, ...]: a sequence's first piece goes on, the others start from zero."""
    rows = [n for n, piece in enumerate(table.first) if piece >= 0]
    pieces = held.new_zeros(len(table.cu_pieces) - 1, *held.shape[1:])
    return pieces.index_copy(0, torch.tensor([table.first[n] for n in rows], device=held.device), held[rows])


def _from_pieces(last: Tensor, table: PieceTable, held: Tensor | None) -> Tensor:
    """States of sequences [N, ...] after their last pieces; zero where a segment has closed, as before where there was no token."""
    state = last[[max(piece, 0) for piece in table.last]]
    closed = torch.tensor([place == 0 for place in table.position], device=last.device)
    state = torch.where(closed.view(-1, *(1,) * (state.dim() - 1)), 0.0, state)
    if -1 not in table.last:
        return state
    absent = torch.tensor([piece < 0 for piece in table.last], device=last.device).view(-1, *(1,) * (state.dim() - 1))
    return torch.where(absent, torch.zeros_like(state) if held is None else held, state)
