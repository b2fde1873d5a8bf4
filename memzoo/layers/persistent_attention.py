"""Causal attention with persistent memory (arXiv 2501.00663, Sec. 3.3): learned vectors that every token sees beside its window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..kernels import attention
from ..kernels.common.packing import sequence_ids
from .convolution import ShortConvolution
from .flops import projection_flops, rows_read
from .layout import TokenLayout
from .state import LayerState


class PersistentAttention(nn.Module):
    """Softmax attention over [persistent | retrieved | tokens]; [B, T, hidden_size] to the same shape.

    A token sees every persistent vector, and of the tokens before it and itself those in the window. What a memory retrieved for a token is
    one more row, seen by whoever sees the token. Rows are kept between calls; who has segments clears them when one ends.

    Args:
        hidden_size: width of the input and the output.
        num_heads, num_key_value_heads, head_dim: heads of the queries, heads of the rows, width of a head.
        persistent: learned vectors, without positions; 0 for none.
        window: tokens that a token sees, its own included, at least 2; None for all that are kept.
        segment: most tokens ever kept, where segments are cleared; None where they are not.
        conv_width: taps of a causal convolution after each of the q, k, v projections (Sec. 4.4); 0 for none. It runs on over segments.
        bias: biases on the four projections.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        persistent: int = 0,
        window: int | None = None,
        segment: int | None = None,
        conv_width: int = 0,
        bias: bool = False,
    ):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.window, self.segment = window, segment
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        widths = {"q": num_heads * head_dim, "k": num_key_value_heads * head_dim, "v": num_key_value_heads * head_dim}
        self.convolutions = nn.ModuleDict(
            {name: ShortConvolution(size, conv_width, f"attention_conv_{name}", None) for name, size in widths.items()}
            if conv_width
            else {}
        )
        self.persistent = nn.Parameter(torch.empty(persistent, hidden_size)) if persistent else None

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None, retrieved: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        q = self._project("q", x, layout, state, "").unflatten(-1, (self.num_heads, self.head_dim))
        if layout.rotary is not None:
            q, _ = apply_rotary_pos_emb(q, q, *layout.rotary, unsqueeze_dim=2)
        rows = [self._rows(x, layout, state, "")]
        if retrieved is not None:  # a token sees what was retrieved for it, so that row stands before its own
            rows.insert(0, self._rows(retrieved, layout, state, "context_"))
        several = len(rows)
        rows = {name: torch.stack([row[name] for row in rows], 2) for name in ("key", "value")}

        of_queries = of_keys = layout.cu_seqlens
        if state is not None:
            keep = self.segment if self.window is None else self.window - 1
            rows, keys = state.append(rows, layout, keep)
            if keys.dense is not None:
                rows = {name: row.flatten(0, 1)[None] for name, row in rows.items()}
                q = q.flatten(0, 1)[None]
            of_queries, of_keys = keys.cu_seqlens if isinstance(keys.cu_seqlens, tuple) else (keys.cu_seqlens,) * 2
        rows = {name: row.flatten(1, 2) for name, row in rows.items()}
        if of_keys is not None:
            of_queries, of_keys = several * of_queries, several * of_keys
        # The operator takes one query a row. With two rows a token each query stands twice, and the first answer is not looked at; the last
        # token alone needs none of that.
        doubled = several == 2 and (of_keys is not None or length > 1)
        if doubled:
            q = q.repeat_interleave(2, dim=1)
        prefix = 0 if self.persistent is None else self.persistent.shape[0]
        if prefix:
            rows, of_keys = _after(self._persistent_rows(layout, state, batch), rows, of_keys)
        cu_seqlens = None if of_keys is None else (of_queries, of_keys)
        y = attention(q, rows["key"], rows["value"], window=self.window, prefix=prefix, cu_seqlens=cu_seqlens)
        if doubled:
            y = y[:, 1::2]
        return self.o_proj(y.reshape(batch, length, self.num_heads * self.head_dim))

    def _project(self, which: str, x: Tensor, layout: TokenLayout, state: LayerState | None, stream: str) -> Tensor:
        """A projection and its convolution; each stream of tokens through the same weights has a history of its own."""
        x = getattr(self, f"{which}_proj")(x)
        if not self.convolutions:
            return x
        return self.convolutions[which](x, layout, state, stream + self.convolutions[which].name)

    def _rows(self, x: Tensor, layout: TokenLayout, state: LayerState | None, stream: str) -> dict[str, Tensor]:
        heads = (self.num_key_value_heads, self.head_dim)
        k, v = (self._project(which, x, layout, state, stream).unflatten(-1, heads) for which in ("k", "v"))
        if layout.rotary is not None:
            _, k = apply_rotary_pos_emb(k, k, *layout.rotary, unsqueeze_dim=2)
        return {"key": k, "value": v}

    def _persistent_rows(self, layout: TokenLayout, state: LayerState | None, batch: int) -> dict[str, Tensor]:
        """The persistent vectors' rows [N, P, Hk, D], the same for every sequence; with a state they are worked out once."""
        if state is not None and state.get("persistent_key") is not None:
            return {name: state.get(f"persistent_{name}") for name in ("key", "value")}
        count = batch if layout.cu_seqlens is None else layout.cu_seqlens.numel() - 1
        heads = (self.num_key_value_heads, self.head_dim)
        rows = {"key": self.k_proj(self.persistent), "value": self.v_proj(self.persistent)}
        rows = {name: row.unflatten(-1, heads).expand(count, -1, -1, -1) for name, row in rows.items()}
        if state is not None:
            for name, row in rows.items():
                state.set(f"persistent_{name}", row)
        return rows

    def init_weights(self, init: Any) -> None:
        """Persistent vectors start like normalised tokens."""
        if self.persistent is not None:
            init.normal_(self.persistent, 0.0, 1.0)

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Bytes kept for one sequence of `length` tokens in a type of `itemsize` bytes."""
        row = 2 * self.num_key_value_heads * self.head_dim * itemsize
        first = 0 if self.persistent is None else self.persistent.shape[0]
        several = 1 if self.segment is None else 2  # of each token its own row, and that of what was retrieved for it
        streams = {"q": 1, "k": several, "v": several}
        held = sum(streams[name] * convolution.state_bytes(itemsize) for name, convolution in self.convolutions.items())
        if self.segment is None:
            kept = length if self.window is None else min(length, self.window - 1)
        else:
            kept = length % self.segment
        return held + row * (first + several * kept)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a token, averaged over a sequence of `length`: projections, and a product with the key and one with the value of every
        row that it sees. Reading what was retrieved doubles the rows and their two projections. Persistent rows are made once."""
        several = 1 if self.segment is None else 2
        if self.segment is None:
            seen = rows_read(length, self.window)
        else:
            whole, rest = divmod(length, self.segment)
            seen = sum(n * rows_read(size, None) for n, size in ((whole * self.segment, self.segment), (rest, rest)) if n) / length
        prefix = 0 if self.persistent is None else self.persistent.shape[0]
        again = 2 * (several - 1 + prefix / length) * (self.k_proj.weight.numel() + self.v_proj.weight.numel())
        streams = {"q": 1, "k": several, "v": several}
        again += sum(streams[name] * convolution.flops_per_token() for name, convolution in self.convolutions.items())
        return projection_flops(self) + again + 4 * self.num_heads * self.head_dim * (several * seen + prefix)


def _after(first: dict[str, Tensor], rows: dict[str, Tensor], of_keys: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
    """`first` [N, P, Hk, D] before each sequence's own rows, and the sequences' new boundaries."""
    if of_keys is None:
        return {name: torch.cat((first[name], row), 1) for name, row in rows.items()}, None
    count, total, sequences = first["key"].shape[1], rows["key"].shape[1], of_keys.numel() - 1
    bounds = of_keys + count * torch.arange(sequences + 1, device=of_keys.device, dtype=of_keys.dtype)
    size = total + count * sequences
    ids = sequence_ids(bounds, size)
    local = torch.arange(size, device=bounds.device) - bounds[ids]
    index = torch.where(local < count, local, of_keys[ids] + local)  # into [first | rows]; all sequences have the same first rows
    return {name: torch.cat((first[name][0], row[0]))[index][None] for name, row in rows.items()}, bounds
