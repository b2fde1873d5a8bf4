"""What every memory with a cache of segments shares: the options, the router that scores segments, and the state between calls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import MemoryCachingState
from ..kernels.memory_caching.routing import blocks_of
from .precision import wide
from .state import LayerState

ENERGY_START = 4.0  # tau: a segment that holds the query's key exactly then outweighs one that does not by e^4


@dataclass(frozen=True)
class CacheOptions:
    """How a memory is cut into segments and how the cached ones are read (arXiv 2602.24281).

    Args:
        segment_length: tokens of a segment, or "log" for the binary expansion of the length (no generation).
        aggregation: "residual", "gated", "soup", "sparse" or "average".
        top_k: cached memories that a token reads, with "sparse".
        restart: every segment starts from the first state; else from where the one before ended.
        routing: "mean", "energy" or "submax".
        max_segments: most memories kept; None for no limit.
        offload: keep cached memories in the host's memory between calls.
    """

    segment_length: int | str
    aggregation: str = "gated"
    top_k: int | None = None
    restart: bool = True
    routing: str = "mean"
    max_segments: int | None = None
    offload: bool = False

    @property
    def scored(self) -> bool:
        return self.aggregation in ("gated", "soup", "sparse")

    def collapsed(self, linear: bool) -> bool:
        """Whether the sum of the cached memories is all that is kept and read."""
        return self.aggregation == "average" or (self.aggregation == "residual" and linear)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the operators."""
        names = ("segment_length", "aggregation", "top_k", "restart", "routing", "max_segments")
        return {name: getattr(self, name) for name in names}

    def closed(self, length: int) -> int:
        """Memories that are cached after `length` tokens."""
        if self.segment_length == "log":
            return 0  # nothing is kept between calls
        count = length // self.segment_length
        return count if self.max_segments is None else min(count, self.max_segments)

    def read(self, length: int) -> tuple[float, float]:
        """(memories that a token scores, those whose read it mixes in), cached ones, averaged over a sequence of `length` tokens."""
        if self.segment_length == "log":
            sizes = [1 << bit for bit in reversed(range(length.bit_length())) if length >> bit & 1]
            counts = [(size, i) for i, size in enumerate(sizes)]
        else:
            starts = range(0, length, self.segment_length)
            counts = [(min(self.segment_length, length - start), self.closed(start)) for start in starts]
        limit = self.top_k if self.aggregation == "sparse" else math.inf
        return sum(n * count for n, count in counts) / length, sum(n * min(count, limit) for n, count in counts) / length

    def state_bytes(self, length: int, heads: int, weights: int, routing_dim: int, linear: bool) -> int:
        """Bytes of one sequence's cache: memories of `weights` numbers a head, and descriptors, in float32."""
        if self.collapsed(linear):
            return 4 * heads * weights  # their sum
        described = pool = 0
        if self.scored:
            described = routing_dim * (routing_dim if self.routing == "energy" else blocks_of(self.routing))
            pool = described
        return 4 * heads * (self.closed(length) * (weights + described) + pool)

    def flops(self, length: int, heads: int, read: float, routing_dim: int, linear: bool) -> float:
        """FLOPs of a token for scores and reads of cached memories, averaged; `read` is what reading one memory takes a head. With a cap,
        the scores by which memories are dropped too."""
        scored, mixed = self.read(length)
        if self.collapsed(linear):
            return heads * read  # of the sum of all
        if not self.scored:
            return heads * mixed * read
        if self.routing == "energy":
            one = 2 * routing_dim**2
            online = 2 * one  # a write and a read of the matrix
        else:
            blocks = blocks_of(self.routing)
            one = 2 * blocks * routing_dim
            online = 2 * routing_dim * self._open_blocks(length, blocks)
        dropping = 0.0
        if self.max_segments is not None:
            dropping = max(0, length // self.segment_length - self.max_segments) * (self.max_segments + 1) / length
        return heads * (mixed * read + (scored + dropping) * one + online)

    def _open_blocks(self, length: int, blocks: int) -> float:
        """Sub-blocks of its own segment that a token scores, averaged."""
        if blocks == 1 or self.segment_length == "log":
            return 1.0
        size = -(-self.segment_length // blocks)
        return sum(t % self.segment_length // size + 1 for t in range(length)) / length


class Router(nn.Module):
    """(connectors u, keys that descriptors pool), [B, T, H, R] each, from the tokens and their l2-normalised queries and keys.

    With "energy" u = sqrt(tau) q, tau learned a head; else u is a projection of the token (the paper's connector).

    Args:
        hidden_size: width of the tokens.
        num_heads, head_dim: of the queries and keys.
        routing: "mean", "energy" or "submax".
        rank: dimensions R of a learned projection of queries and keys, shared by both; None for head_dim, unprojected.
        tau: with "energy" a fixed one, for a model that was trained without a cache: nothing to learn, and nothing to save.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, routing: str, rank: int | None = None, tau: float | None = None
    ):
        super().__init__()
        self.num_heads, self.routing, self.size = num_heads, routing, head_dim if rank is None else rank
        self.project = None if rank is None else nn.Parameter(torch.empty(num_heads, head_dim, rank))
        self.fixed = tau is not None
        if self.fixed:
            self.register_buffer("log_tau", torch.full((num_heads,), math.log(tau)), persistent=False)
        elif routing == "energy":
            self.log_tau = nn.Parameter(torch.empty(num_heads))
        else:
            self.u_proj = nn.Linear(hidden_size, num_heads * self.size, bias=False)

    def read_scale(self) -> Tensor | None:
        """[num_heads, 1], where connectors are the queries times this: read with them and divide, and both come from one sweep."""
        return self._root_tau() if self.routing == "energy" and self.project is None else None

    def _root_tau(self) -> Tensor:
        return (wide(self.log_tau) / 2).exp()[:, None]

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.project is not None:
            q, k = (torch.einsum("bthd,hdr->bthr", t, self.project.to(t.dtype)) for t in (q, k))
        if self.routing == "energy":
            return self._root_tau().to(q.dtype) * q, k
        return self.u_proj(x).unflatten(-1, (self.num_heads, -1)), k

    def init_weights(self, init: Any) -> None:
        if self.project is not None:  # a random subspace, in which an l2-normalised key keeps a norm of 1 on average
            init.normal_(self.project, 0.0, self.size**-0.5)
        if self.routing == "energy" and not self.fixed:
            init.constant_(self.log_tau, math.log(ENERGY_START))

    def flops_per_token(self) -> int:
        """Of the low-rank projection; the connector's is a linear layer, counted as such."""
        return 0 if self.project is None else 2 * 2 * self.project.numel()


def load_cache(state: LayerState, memory: Any, parts: int) -> MemoryCachingState | None:
    """The cache that `state` holds of `parts` weight tensors, with this online memory; None before the first call."""
    if state.get("cached_0") is None:
        return None
    previous = None if state.get("previous_key") is None else (state.get("previous_key"), state.get("previous_value"))
    cached = tuple(state.get(f"cached_{i}") for i in range(parts))
    return MemoryCachingState(memory, cached, state.get("pooled"), state.get("descriptors"), state.open, state.closed, previous)


def save_cache(state: LayerState, cache: MemoryCachingState, offload: bool) -> None:
    """Keep everything of `cache` but its online memory, which the layer keeps under names of its own."""
    for i, part in enumerate(cache.cached):
        state.set(f"cached_{i}", part.to("cpu") if offload else part)
    for name in ("pooled", "descriptors"):
        if getattr(cache, name) is not None:
            state.set(name, getattr(cache, name))
    for name, value in zip(("previous_key", "previous_value"), cache.previous or ()):
        state.set(name, value)
    state.open, state.closed = cache.position, cache.count
