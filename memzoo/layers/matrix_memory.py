"""The linear Transformer's memory: one matrix a head, written by outer products (arXiv 2006.16236) or by the delta rule (2406.06484)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import delta_rule, linear_attention, memory_caching
from ..kernels.linear_attention.reference import NORMALIZER_EPSILON
from .caching import CacheOptions, Router, load_cache, save_cache
from .convolution import ShortConvolution
from .flops import projection_flops
from .gate import Gate
from .layout import TokenLayout
from .precision import wide
from .state import LayerState

FEATURE_MAPS = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "identity": lambda x: x,
}
NORMALIZER_COLUMNS = 8
WRITE_RULES = ("additive", "delta", "gated_delta", "window")


class MatrixMemory(nn.Module):
    """A matrix S [head_dim, value_head_dim] a head; [B, T, hidden_size] to the same shape.

    S <- exp(g) S, then `additive` S += k v^T, or `delta` and `gated_delta` S += beta k (v - S^T k)^T; the read is S^T q, with `normalize`
    divided by q^T z + 1e-6, where z sums the keys as S sums the writes. `window` writes a token and the one before it again (SWLA, Memory
    Caching's Eq. 26 to 29): S += lambda_t k_t v_t^T + beta_t k_{t-1} v_{t-1}^T, with a cache only.

    Args:
        hidden_size: width of the input and the output.
        num_heads: memories.
        head_dim: width of a key (rows of S).
        value_head_dim: width of a value (columns of S).
        bias: biases on the four projections.
        feature_map: "elu" (elu + 1, the paper's), "relu" or "identity", on queries and keys.
        normalize: divide by the summed keys; additive writes only.
        write_rule: "additive", "delta", "gated_delta" (delta after a decay) or "window".
        decay: a data-dependent decay g <= 0 a head and token.
        qk_norm: l2-normalise queries and keys after the feature map, which delta writes need to stay bounded.
        conv_width: taps of a causal convolution with SiLU after each of the q, k, v projections; 0 for none.
        output_norm: RMSNorm of each head's read.
        output_gate: multiply the read by SiLU of a projection of the input.
        norm_eps: of the output norm.
        caching: keep the memories of earlier segments and read them too; None for one memory.
        routing_dim: width of the descriptors that segments are scored by; None for head_dim.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        value_head_dim: int,
        *,
        bias: bool = False,
        feature_map: str = "elu",
        normalize: bool = True,
        write_rule: str = "additive",
        decay: bool = False,
        qk_norm: bool = False,
        conv_width: int = 0,
        output_norm: bool = False,
        output_gate: bool = False,
        norm_eps: float = 1e-6,
        caching: CacheOptions | None = None,
        routing_dim: int | None = None,
    ):
        super().__init__()
        if write_rule == "window" and caching is None:
            raise ValueError("MatrixMemory: write_rule is 'window', needs caching")
        self.num_heads, self.head_dim, self.value_head_dim = num_heads, head_dim, value_head_dim
        self.feature_map, self.normalize, self.write_rule, self.qk_norm = feature_map, normalize, write_rule, qk_norm
        keys, values = num_heads * head_dim, num_heads * value_head_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=bias)
        self.k_proj = nn.Linear(hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(hidden_size, values, bias=bias)
        self.o_proj = nn.Linear(values, hidden_size, bias=bias)
        self.convolutions = nn.ModuleDict(
            {name: ShortConvolution(size, conv_width, f"conv_{name}") for name, size in (("q", keys), ("k", keys), ("v", values))}
            if conv_width
            else {}
        )
        self.beta_proj = Gate(hidden_size, num_heads) if write_rule != "additive" else None
        self.write_proj = Gate(hidden_size, num_heads) if write_rule == "window" else None
        self.decay_proj = nn.Linear(hidden_size, num_heads, bias=False) if decay else None
        if decay:
            # g = -exp(log_rate) softplus(w x + step_bias), the parametrisation of Mamba-2 and gated DeltaNet.
            self.decay_log_rate = nn.Parameter(torch.empty(num_heads))
            self.decay_step_bias = nn.Parameter(torch.empty(num_heads))
        self.output_norm = nn.RMSNorm(value_head_dim, eps=norm_eps) if output_norm else None
        self.gate_proj = nn.Linear(hidden_size, values, bias=bias) if output_gate else None
        self.caching = caching
        scored = caching is not None and caching.scored
        self.router = Router(hidden_size, num_heads, head_dim, caching.routing, routing_dim) if scored else None

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.convolutions:
            q, k, v = (self.convolutions[name](t, layout, state) for name, t in (("q", q), ("k", k), ("v", v)))
        q, k = (FEATURE_MAPS[self.feature_map](t.view(batch, length, self.num_heads, -1)) for t in (q, k))
        v = v.view(batch, length, self.num_heads, -1)
        if self.qk_norm:
            q, k = (F.normalize(wide(t), dim=-1).to(x.dtype) for t in (q, k))
        log_decay = None
        if self.decay_proj is not None:
            step = F.softplus(wide(self.decay_proj(x)) + wide(self.decay_step_bias))
            log_decay = -wide(self.decay_log_rate).exp() * step
        beta = None if self.beta_proj is None else wide(self.beta_proj(x)).sigmoid()
        if self.caching is None:
            y = self._one_memory(q, k, v, log_decay, beta, layout, state)
        else:
            y = self._many_memories(x, q, k, v, log_decay, beta, layout, state)
        if self.output_norm is not None:
            y = self.output_norm(y)
        y = y.reshape(batch, length, -1)
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.o_proj(y)

    def _one_memory(self, q, k, v, log_decay, beta, layout: TokenLayout, state: LayerState | None) -> Tensor:
        options = {"output_final_state": state is not None, "cu_seqlens": layout.cu_seqlens}
        if state is not None and state.get("memory") is not None:
            memory = state.get("memory")
            options["initial_state"] = (memory, state.get("normalizer")) if self.normalize else memory
        if beta is None:
            y, last = linear_attention(q, k, v, log_decay, normalize=self.normalize, **options)
        else:
            y, last = delta_rule(q, k, v, beta, log_decay, **options)
        if state is not None:
            memory, normalizer = last if self.normalize else (last, None)
            state.set("memory", memory)
            if normalizer is not None:
                state.set("normalizer", normalizer)
        return y

    def _many_memories(self, x, q, k, v, log_decay, beta, layout: TokenLayout, state: LayerState | None) -> Tensor:
        if self.normalize:  # the sum of keys is the read of one more value, always 1; a head dimension is a multiple of 8
            v = F.pad(F.pad(v, (0, 1), value=1.0), (0, NORMALIZER_COLUMNS - 1))
        u, keys = (None, None) if self.router is None else self.router(x, q, k)
        scale = None if self.router is None else self.router.read_scale()
        if scale is not None:
            q = u
        gates = {"beta": beta}
        if self.write_proj is not None:
            gates = {"write_gate": wide(self.write_proj(x)).sigmoid(), "shift_gate": beta}
        y, last = memory_caching(
            q,
            k,
            v,
            u,
            log_decay,
            **gates,
            **self.caching.arguments(),
            routing_keys=None if keys is k else keys,
            initial_state=None if state is None else load_cache(state, state.get("memory"), 1),
            output_final_state=state is not None,
            cu_seqlens=layout.cu_seqlens,
        )
        if last is not None:
            state.set("memory", last.memory)
            save_cache(state, last, self.caching.offload)
        if scale is not None:
            y = (y / scale).to(y.dtype)
        if self.normalize:
            y = y[..., : self.value_head_dim] / (y[..., self.value_head_dim, None] + NORMALIZER_EPSILON)
        return y

    def init_weights(self, init: Any) -> None:
        """Starting points of the decay: rates spread over the heads from 1 to 16, steps of 0.01."""
        if self.decay_proj is not None:
            init.copy_(self.decay_log_rate, torch.linspace(1, 16, self.num_heads, device=self.decay_log_rate.device).log())
            init.constant_(self.decay_step_bias, math.log(math.expm1(0.01)))

    def _columns(self) -> int:
        """Columns of a state: the values', and the normaliser's."""
        if not self.normalize:
            return self.value_head_dim
        return self.value_head_dim + (1 if self.caching is None else NORMALIZER_COLUMNS)

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Bytes kept for one sequence: constant without a cache, and with one memory a closed segment more; memories are float32."""
        weights = self.head_dim * self._columns()
        held = 4 * self.num_heads * weights
        if self.caching is not None:
            size = 0 if self.router is None else self.router.size
            held += self.caching.state_bytes(length, self.num_heads, weights, size, linear=True)
        if self.write_proj is not None:
            held += 4 * self.num_heads * (self.head_dim + self.value_head_dim)
        return held + sum(convolution.state_bytes(itemsize) for convolution in self.convolutions.values())

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a token: projections, convolutions, and products with the state: a write and a read, for delta writes the value that the
        key reads before, for window writes a second write. A normaliser is one more column of the state (8 with a cache); decays are
        element-wise. The same at every length but for reads of cached memories."""
        products = {"additive": 2, "window": 4}.get(self.write_rule, 3)
        state = self.head_dim * self._columns()
        convolved = sum(convolution.flops_per_token() for convolution in self.convolutions.values())
        cached = 0.0
        if self.caching is not None:
            size = 0 if self.router is None else self.router.size
            cached = self.caching.flops(length, self.num_heads, 2 * state, size, linear=True)
            cached += 0 if self.router is None else self.router.flops_per_token()
        return float(projection_flops(self) + convolved + products * 2 * self.num_heads * state + cached)
