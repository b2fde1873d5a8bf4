"""The neural memory of Titans (arXiv 2501.00663, Sec. 3): a matrix or an MLP a head that learns keys and values while it reads.

Projections with short convolutions and SiLU, l2-normalised queries and keys, a step size, momentum and decay a head and token; the memory
itself is the operator `memzoo.kernels.neural_memory`; an RMSNorm, a gate and a projection follow the read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import NeuralMemoryState, neural_memory, neural_memory_caching
from ..kernels.common.packing import pack, unpack
from ..kernels.neural_memory import read_memory
from .caching import CacheOptions, Router, load_cache, save_cache
from .convolution import ShortConvolution
from .flops import projection_flops
from .gate import Gate
from .layout import TokenLayout
from .precision import wide
from .state import LayerState


class NeuralMemory(nn.Module):
    """Write every token by a gradient step on `1/2 ||M(k) - v||^2`, then read M(q); [B, T, hidden_size] to the same shape.

    S <- eta S - theta grad, M <- (1 - alpha) M + S (Eq. 13, 14), gradients at the weights of the chunk's start. The paper gives neither the
    parametrisation of the gates nor their starting points: here theta = lr_max sigmoid(w x + b), eta = sigmoid(w x + b), alpha likewise.

    It stands alone in anybody's model; with a state it goes on where the last call ended, whatever the split:

    >>> import torch
    >>> from memzoo.layers import LayerState, NeuralMemory
    >>> memory = NeuralMemory(hidden_size=64, num_heads=2, head_dim=32, chunk_size=16)
    >>> x = torch.randn(1, 40, 64)
    >>> y = x + memory(x)                                 # a residual branch, trained as any other module
    >>> state = LayerState()
    >>> first, second = memory(x[:, :25], state=state), memory(x[:, 25:], state=state)
    >>> torch.allclose(x + torch.cat((first, second), 1), y, atol=1e-4)
    True

    Args:
        hidden_size: width of the input and the output.
        num_heads: memories.
        head_dim: width D of a key and of a value.
        depth: layers of a memory; 1 is a matrix, more an MLP with GELU. The paper recommends 2 or more.
        expansion: hidden width of the MLP as a multiple of head_dim (the paper does not give it; its successors use 4).
        residual: M(x) = x + MLP(x); None for yes with two layers or more.
        chunk_size: tokens whose gradients are taken at the same weights. Part of the model: scores fall with another one.
        conv_width: taps of a causal convolution after each of the q, k, v projections; 0 for none (SiLU stays).
        momentum, decay: the two terms of the update; off for ablations (Table 5).
        lr_max: largest step size.
        lr_start, momentum_start, decay_start: sigmoids of the gates' biases at the start (lr_start is a share of lr_max); lr_start None for
            1 / chunk_size.
        max_grad_norm: theta is lowered where the gradient of one token has a larger norm; None for no clamp.
        loss: "l2", or "dot" for `-<M(k), v>`.
        persistent: learned vectors that are written to the memory before the first token of every sequence (Eq. 19).
        output_gate: multiply the normalised read by SiLU of a projection of the input.
        bias: biases on the projections.
        norm_eps: of the norm after the read.
        caching: keep the memories of earlier segments and read them too (Memory Caching); None for one memory.
        routing_dim: width of the descriptors that segments are scored by; None for head_dim.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        depth: int = 2,
        expansion: int = 4,
        residual: bool | None = None,
        chunk_size: int = 64,
        conv_width: int = 4,
        momentum: bool = True,
        decay: bool = True,
        lr_max: float = 1.0,
        lr_start: float | None = None,
        momentum_start: float = 0.5,
        decay_start: float = 0.001,
        max_grad_norm: float | None = 1.0,
        loss: str = "l2",
        persistent: int = 0,
        output_gate: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-6,
        caching: CacheOptions | None = None,
        routing_dim: int | None = None,
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.chunk_size, self.lr_max = num_heads, head_dim, chunk_size, lr_max
        self.residual, self.loss, self.max_grad_norm = depth > 1 if residual is None else residual, loss, max_grad_norm
        width = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(hidden_size, width, bias=bias)
        self.o_proj = nn.Linear(width, hidden_size, bias=bias)
        self.convolutions = nn.ModuleDict(
            {name: ShortConvolution(width, conv_width, f"conv_{name}") for name in ("q", "k", "v")} if conv_width else {}
        )
        self.lr_proj = Gate(hidden_size, num_heads, start=_logit(first_step(chunk_size) if lr_start is None else lr_start))
        self.momentum_proj = Gate(hidden_size, num_heads, start=_logit(momentum_start)) if momentum else None
        self.decay_proj = Gate(hidden_size, num_heads, start=_logit(decay_start)) if decay else None
        sizes = [head_dim, *[expansion * head_dim] * (depth - 1), head_dim]
        self.memory = nn.ParameterList(torch.empty(num_heads, a, b) for a, b in zip(sizes, sizes[1:]))
        self.persistent = nn.Parameter(torch.empty(persistent, hidden_size)) if persistent else None
        self.output_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.gate_proj = nn.Linear(hidden_size, width, bias=bias) if output_gate else None
        self.caching = caching
        scored = caching is not None and caching.scored
        self.router = Router(hidden_size, num_heads, head_dim, caching.routing, routing_dim) if scored else None
        self.watching = False
        self.observed: dict[str, Tensor] | None = None
        for part in self.modules():
            if hasattr(part, "init_weights"):
                part.init_weights(nn.init)

    def forward(self, x: Tensor, layout: TokenLayout | None = None, state: LayerState | None = None) -> Tensor:
        layout = dense_layout(x) if layout is None else layout
        first = state is None or state.get("position") is None
        written = self._persistent_state() if self.persistent is not None and (first or self.caching is not None) else None
        if written is not None and first:
            count = x.shape[0] if layout.cu_seqlens is None else layout.cu_seqlens.numel() - 1
            state = LayerState() if state is None else state
            for name, value in written.fixed.items():
                state.set(name, value.expand(count, *value.shape[1:]))
        return self._output(self._write_and_read(x, layout, state, written), x)

    def _persistent_state(self) -> LayerState:
        """The state of one sequence after the persistent vectors."""
        written, x = LayerState(), torch.stack([self.persistent])
        self._write_and_read(x, dense_layout(x), written, None, plain=True)
        return written

    def _write_and_read(
        self, x: Tensor, layout: TokenLayout, state: LayerState | None, start: LayerState | None, plain: bool = False
    ) -> Tensor:
        """Reads of every token [B, T, num_heads, head_dim]; `start` is what segments start from, `plain` leaves the cache out."""
        q = self.queries(x, layout, state)
        k = F.normalize(wide(self._project("k", self.k_proj(x), layout, state)), dim=-1).to(x.dtype)
        v = self._project("v", self.v_proj(x), layout, state)
        lr = self.lr_max * wide(self.lr_proj(x)).sigmoid()
        momentum = None if self.momentum_proj is None else wide(self.momentum_proj(x)).sigmoid()
        decay = None if self.decay_proj is None else wide(self.decay_proj(x)).sigmoid()
        held = None if state is None else self.held(state)
        if self.caching is not None and not plain:
            return self._many_memories(x, q, k, v, lr, momentum, decay, held, layout, state, start)
        if self.watching and not plain:
            self._observe(k, v, lr, momentum, decay, held, layout)
        y, last = self._operator(q, k, v, lr, momentum, decay, held, state is not None, layout.cu_seqlens)
        if state is not None:
            self._keep(state, last)
        return y

    def _keep(self, state: LayerState, memory: NeuralMemoryState) -> None:
        for part, layers in zip(memory._fields, memory[:3]):
            for i, layer in enumerate(layers):
                state.set(f"{part}_{i}", layer)
        state.set("position", memory.position)

    def _many_memories(self, x, q, k, v, lr, momentum, decay, held, layout, state, start) -> Tensor:
        if self.watching:
            raise ValueError("NeuralMemory: watching shows one memory, not a cache of them; watch a model without caching")
        u, keys = (None, None) if self.router is None else self.router(x, q, k)
        cache = None if state is None else load_cache(state, held, len(self.memory))
        y, last = neural_memory_caching(
            q,
            k,
            v,
            u,
            lr,
            momentum,
            decay,
            tuple(self.memory),
            chunk_size=self.chunk_size,
            residual=self.residual,
            loss=self.loss,
            max_grad_norm=self.max_grad_norm,
            **self.caching.arguments(),
            routing_keys=keys,
            start=None if start is None else self.held(start),
            initial_state=cache,
            output_final_state=state is not None,
            cu_seqlens=layout.cu_seqlens,
        )
        if last is not None:
            self._keep(state, last.memory)
            save_cache(state, last, self.caching.offload)
        return y

    def _operator(self, q, k, v, lr, momentum, decay, held, keep, cu_seqlens) -> tuple[Tensor, NeuralMemoryState | None]:
        return neural_memory(
            q,
            k,
            v,
            lr,
            momentum,
            decay,
            tuple(self.memory),
            chunk_size=self.chunk_size,
            residual=self.residual,
            loss=self.loss,
            max_grad_norm=self.max_grad_norm,
            initial_state=held,
            output_final_state=keep,
            cu_seqlens=cu_seqlens,
        )

    def queries(self, x: Tensor, layout: TokenLayout, state: LayerState | None, name: str | None = None) -> Tensor:
        """Read keys of every token, l2-normalised, [B, T, num_heads, head_dim]; `name` keeps another stream's convolution apart."""
        q = self._project("q", self.q_proj(x), layout, state, name)
        return F.normalize(wide(q), dim=-1).to(x.dtype)

    def _project(self, which: str, x: Tensor, layout: TokenLayout, state: LayerState | None, name: str | None = None) -> Tensor:
        x = self.convolutions[which](x, layout, state, name) if self.convolutions else F.silu(x)
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def retrieve(self, x: Tensor, q: Tensor, weights: tuple[Tensor, ...], layout: TokenLayout) -> Tensor:
        """What memories of `weights` (one [N, H, Din, Dout] a layer) hold for the queries q [B, T, H, D] of the tokens x, unwritten."""
        total, cu_seqlens = q.shape[1], layout.cu_seqlens
        rows = q if cu_seqlens is None else unpack(q, cu_seqlens)
        y = read_memory(weights, wide(rows).transpose(1, 2), self.residual).transpose(1, 2).to(q.dtype)
        return self._output(y if cu_seqlens is None else pack(y, cu_seqlens, total), x)

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        y = self.output_norm(y).flatten(2)
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.o_proj(y)

    def held(self, state: LayerState) -> NeuralMemoryState | None:
        """The operator's state in a LayerState; None before the first call."""
        if state.get("position") is None:
            return None
        parts = (tuple(state.get(f"{part}_{i}") for i in range(len(self.memory))) for part in NeuralMemoryState._fields[:3])
        return NeuralMemoryState(*parts, state.get("position"))

    @torch.no_grad()
    def _observe(self, k, v, lr, momentum, decay, held, layout) -> None:
        """Add these tokens to `observed`: what `watch` describes."""
        if layout.cu_seqlens is not None:
            raise ValueError("NeuralMemory: watching needs a dense batch without padding or packing; pass one text at a time")
        momentum = torch.zeros_like(lr) if momentum is None else momentum
        decay = torch.zeros_like(lr) if decay is None else decay
        weights = tuple(w.expand(k.shape[0], *w.shape) for w in self.memory) if held is None else held.weights
        surprise, norms, ends = [], [], []
        for start in range(0, k.shape[1], self.chunk_size):
            piece = [t[:, start : start + self.chunk_size] for t in (k, v, lr, momentum, decay)]
            # The read of a token sees its own write: with the next token's key as query, it is the read before the next token's write.
            asked = torch.cat((piece[0][:, 1:], piece[0][:, -1:]), 1)
            first = read_memory(tuple(map(wide, weights)), wide(piece[0][:, :1]).transpose(1, 2), self.residual).transpose(1, 2)
            reads, held = self._operator(asked, *piece, held, True, None)
            read, value = torch.cat((first, wide(reads[:, :-1])), 1), wide(piece[1])
            surprise.append(-(read * value).sum(-1) if self.loss == "dot" else 0.5 * (read - value).square().sum(-1))
            weights = held.weights
            norms.append([sum(w.square().sum((-2, -1)) for w in part).sqrt() for part in (held.weights, held.momentum)])
            ends.append(start + piece[0].shape[1])
        weight_norm, momentum_norm = (torch.stack(part, 1) for part in zip(*norms))
        new = {
            "surprise": torch.cat(surprise, 1),
            "lr": lr.detach(),
            "momentum": momentum.detach(),
            "decay": decay.detach(),
            "weight_norm": weight_norm,
            "momentum_norm": momentum_norm,
            "tokens": torch.tensor([ends]),
        }
        if self.observed is not None:  # a memory as context is called once a segment
            new["tokens"] = new["tokens"] + self.observed["lr"].shape[1]
            new = {name: torch.cat((seen, new[name]), 1) for name, seen in self.observed.items()}
        self.observed = new

    def init_weights(self, init: Any) -> None:
        """M_0 nearly empty, persistent vectors like normalised tokens (the paper gives neither).

        The first layer of an MLP gives a key of norm 1 pre-activations of variance 1/4, where GELU bends; the last layer is small, so that
        what is read is what was written. Random keys and values written once are then read back far better than from fan-in scaling.
        """
        last = len(self.memory) - 1
        for i, weight in enumerate(self.memory):
            fan_in = weight.shape[1] ** -0.5
            init.normal_(weight, 0.0, 0.1 * fan_in if i == last else 0.5 if i == 0 else fan_in)
        if self.persistent is not None:
            init.normal_(self.persistent, 0.0, 1.0)

    def _sizes(self) -> list[int]:
        return [weight.numel() for weight in self.memory]

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Bytes kept for one sequence: weights, momentum and the chunk's first weights in float32, and the place; with a cache, the weights
        once more for every closed segment."""
        held = 3 * 4 * sum(self._sizes()) + 8
        if self.caching is not None:
            size = 0 if self.router is None else self.router.size
            held += self.caching.state_bytes(length, self.num_heads, sum(self._sizes()) // self.num_heads, size, linear=False)
        return held + sum(convolution.state_bytes(itemsize) for convolution in self.convolutions.values())

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a token, averaged over a sequence of `length`: projections, convolutions, and products with each layer: the key's
        read, the gradient passed down (all but the first layer), the write, the query's read. Persistent vectors are written once."""
        sizes = self._sizes()
        convolved = sum(convolution.flops_per_token() for convolution in self.convolutions.values())
        token = projection_flops(self) + convolved + 2 * (3 * sum(sizes) + sum(sizes[1:]))
        if self.loss == "dot":
            token -= 2 * sizes[-1]  # the gradient of -<M(k), v> needs no M(k)
        output = sum(2 * part.weight.numel() for part in (self.o_proj, self.gate_proj) if part is not None)
        persistent = 0 if self.persistent is None else self.persistent.shape[0]
        cached = 0.0
        if self.caching is not None:
            size = 0 if self.router is None else self.router.size
            cached = self.caching.flops(length, self.num_heads, 2 * sum(sizes) / self.num_heads, size, linear=False)
            cached += 0 if self.router is None else self.router.flops_per_token()
        return token + persistent * (token - output) / length + cached

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, layers={len(self.memory)}, chunk_size={self.chunk_size}, residual={self.residual}"


def first_step(chunk_size: int) -> float:
    """Where step sizes start: a chunk whose keys are all alike then takes one whole step; larger ones overshoot, chunk after chunk."""
    return min(0.5, 1 / chunk_size)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def dense_layout(x: Tensor) -> TokenLayout:
    """The layout of a dense batch [B, T, ...] whose tokens are all real and stand at 0, 1, 2, ..."""
    return TokenLayout(torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1))


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, NeuralMemory]]:
    """Within the block every NeuralMemory of `model` keeps what the model's last forward pass did, in `observed`; yields them by name.

    surprise [B, T, H]: the inner loss of each token before its own write. lr, momentum, decay [B, T, H]: the gates. weight_norm and
    momentum_norm [B, P, H]: Frobenius norms after `tokens` [1, P] of the pass, every `chunk_size` of them and at the end (of each segment,
    for memory as context, which writes what attention made of the tokens). It costs a second pass.

    Raises:
        ValueError: the model has no NeuralMemory.
    """
    memories = {name: module for name, module in model.named_modules() if isinstance(module, NeuralMemory)}
    if not memories:
        raise ValueError(f"{type(model).__name__} has no neural memory to watch")

    def forget(*_: Any) -> None:
        for memory in memories.values():
            memory.observed = None

    forget()
    for memory in memories.values():
        memory.watching = True
    before_each_pass = model.register_forward_pre_hook(forget)
    try:
        yield memories
    finally:
        before_each_pass.remove()
        for memory in memories.values():
            memory.watching = False
