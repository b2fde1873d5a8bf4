"""The sDNC's external memory: a write-once, append-only table of keys and values, read by content (arXiv 2603.19272).

The names are the DNC's (Graves et al. 2016): every token's feed-forward controller emits an interface vector (read keys q, a write key k,
a write vector v, and what the extensions add); the write is one-hot at the next free row and erases nothing; H read heads address the rows
by content. With every extension off this is causal softmax attention, exactly.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..kernels import attention, linked_attention
from ..kernels.common.packing import pack, unpack
from .flops import projection_flops, rows_read
from .gate import Gate
from .layout import TokenLayout
from .precision import wide
from .state import LayerState


class ExternalMemory(nn.Module):
    """Append each token's row, then read with every head; [B, T, hidden_size] to the same shape.

    Args:
        hidden_size: width of the input and the output.
        num_heads: read heads.
        num_key_value_heads: heads of the table; each serves num_heads / num_key_value_heads read heads.
        head_dim: width of a row's key and of its value.
        bias: biases on the four projections.
        window: rows that a read can see, its own included; None for all.
        learned_key_strength: key strength beta = oneplus(w x + b) a head and token (DNC), multiplying the logits.
        cosine_addressing: content addressing by cosine similarity (DNC) instead of the inner product, scaled by sqrt(head_dim).
        free_gates: each token emits a retention in (0, 1) a head, which lowers the weight of all older rows: a cumulative log-bias.
        temporal_links: three reads mixed by a softmax over read modes (DNC): the rows written before, at and after the rows found by
            content. Rows are written once and in order, so the link matrix is a shift.
        read_steps: reads of the keys before the last, each result the next read key (modern Hopfield iteration, arXiv 2008.02217).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        window: int | None = None,
        learned_key_strength: bool = False,
        cosine_addressing: bool = False,
        free_gates: bool = False,
        temporal_links: bool = False,
        read_steps: int = 1,
    ):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.window, self.cosine_addressing, self.read_steps = window, cosine_addressing, read_steps
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        # Starting points: key strength 1.02, retention 0.998, the three read modes alike.
        self.strength_proj = Gate(hidden_size, num_heads, start=-4.0) if learned_key_strength else None
        self.free_gate_proj = Gate(hidden_size, num_heads, start=6.0) if free_gates else None
        self.read_mode_proj = Gate(hidden_size, num_heads * 3) if temporal_links else None

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim)
        v = self.v_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim)
        if self.cosine_addressing:
            q, k = (F.normalize(wide(t), dim=-1).to(x.dtype) for t in (q, k))
        if layout.rotary is not None:
            q, k = apply_rotary_pos_emb(q, k, *layout.rotary, unsqueeze_dim=2)
        rows = {"key": k, "value": v}
        if self.free_gate_proj is not None:
            rows["log_retention"] = F.logsigmoid(wide(self.free_gate_proj(x)))

        cu_seqlens, dense = layout.cu_seqlens, None
        if state is not None:
            # A window of w rows needs w - 1 old ones; the link to the row before the oldest needs one more.
            keep = None if self.window is None else self.window
            rows, keys = state.append(rows, layout, keep)
            cu_seqlens, dense = keys.cu_seqlens, keys.dense
        strength = None if self.strength_proj is None else 1 + F.softplus(wide(self.strength_proj(x)))
        modes = None
        if self.read_mode_proj is not None:
            modes = wide(self.read_mode_proj(x)).view(batch, length, self.num_heads, 3).softmax(-1)
        if dense is not None:
            rows = {name: value.flatten(0, 1)[None] for name, value in rows.items()}
            q, strength, modes = (None if t is None else t.flatten(0, 1)[None] for t in (q, strength, modes))

        options = {
            "scale": self.head_dim**0.5 if self.cosine_addressing else self.head_dim**-0.5,
            "window": self.window,
            "key_strength": strength,
            "log_retention": rows.get("log_retention"),
            "cu_seqlens": cu_seqlens,
        }
        for _ in range(self.read_steps - 1):
            q = attention(q, rows["key"], rows["key"], **options)
        if modes is None:
            y = attention(q, rows["key"], rows["value"], **options)
        else:
            y = linked_attention(q, rows["key"], rows["value"], modes, **options)
        return self.o_proj(y.reshape(batch, length, self.num_heads * self.head_dim))

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Bytes kept for one sequence of `length` tokens in a type of `itemsize` bytes."""
        rows = length if self.window is None else min(length, self.window)
        row = 2 * self.num_key_value_heads * self.head_dim * itemsize
        return rows * (row + (4 * self.num_heads if self.free_gate_proj is not None else 0))

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a token, averaged over a sequence of `length`: projections, and a product with the key and one with the value of every
        row that a read sees, in every head and read step. The three reads of temporal links are one, of weights mixed element-wise."""
        read = 2 * 2 * self.num_heads * self.head_dim * rows_read(length, self.window)
        return projection_flops(self) + self.read_steps * read


class ReadFromMemory(nn.Module):
    """A memory that an encoder wrote once and that is only read: content reads over all its rows; [B, T, hidden_size] to the same shape.

    Args:
        hidden_size: width of the input, of the encoder's states and of the output.
        num_heads, num_key_value_heads, head_dim, bias: as in ExternalMemory.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int, *, bias: bool = False):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        keys, values, mask = self._rows(layout, state)
        total, cu_seqlens = x.shape[1], layout.cu_seqlens
        if cu_seqlens is not None:  # row n reads the memory of encoder row n
            x = unpack(x, cu_seqlens)
        if x.shape[0] != keys.shape[0]:
            raise ValueError(f"ReadFromMemory: {keys.shape[0]} encoded sequences for {x.shape[0]} sequences that read them")
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        # Every row may be read, so this is plain attention without order: torch has it.
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        y = self.o_proj(y.transpose(1, 2).flatten(2))
        return y if cu_seqlens is None else pack(y, cu_seqlens, total)

    def _rows(self, layout: TokenLayout, state: LayerState | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, Hk, S, D] and the mask [B, 1, 1, S]: from the encoder's states, or as an earlier call wrote them."""
        if state is not None and state.get("read_from_key") is not None:
            return state.get("read_from_key"), state.get("read_from_value"), state.get("read_from_mask")
        if layout.encoded is None:
            raise ValueError("ReadFromMemory: nothing was written; pass encoder_hidden_states [B, S, hidden_size] to the model")
        encoded, mask = layout.encoded
        keys, values = (
            proj(encoded).unflatten(-1, (self.num_key_value_heads, self.head_dim)).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )
        mask = None if mask is None else (mask != 0)[:, None, None, :]
        if state is not None:
            state.set("read_from_key", keys)
            state.set("read_from_value", values)
            if mask is not None:
                state.set("read_from_mask", mask)
        return keys, values, mask
