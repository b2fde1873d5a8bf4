"""Times every operator on a GPU beside its peers and against the machine's floor: python scripts/benchmark.py --out FILE.json.

The ceilings (copy bandwidth, bf16 matrix rate) are measured first. A row is timed only after its outputs and gradients, from the very
launch that is timed, agreed with the chunked form in float32. Floor: every input read once and every output written once, or the
definition's operations, whichever takes longer at the ceilings. Each operator runs in a process of its own with an empty compiler
cache. A time from a CPU is never a claim: without a GPU only `--dry-run` works, which exercises this code on tiny shapes.

To add an operator: a `Case` in CASES, with its inputs by argument name, its operations in the forward, and its peers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a machine that is only lent has no memzoo installed

from memzoo import kernels
from memzoo.layers.caching import CacheOptions

OUTPUT_BOUND, GRADIENT_BOUND = 2e-2, 5e-2  # ||difference|| / ||expected||, bf16 against float32; errors themselves are in each row
LENGTHS = (1, 16, 17, 63, 64, 65, 128, 1000, 1024, 2047, 4096, 5001)  # none may compile anything again


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.length} H{self.heads} D{self.dim}"


# flash-linear-attention's default benchmark shapes, so that figures can be laid side by side.
STANDARD = [
    Shape(*s)
    for s in ((1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 1024, 8, 64), (8, 2048, 32, 256))
]
SWEEP = [Shape(16384 // length, length, 16, dim) for dim in (128, 64) for length in (2048, 4096, 8192, 16384)]
LONG = [Shape(1, 65536, 16, 128), Shape(32, 2048, 16, 128)]
SOME = [Shape(4, 2048, 16, 128), Shape(2, 16384, 16, 128)]
GROWING = [Shape(1, length, 16, dim) for dim in (64, 128) for length in (1024, 4096, 16384, 65536)]
DECODE = [Shape(batch, 1, 16, 128) for batch in (1, 8, 64)]
# A published shape of fused LSTMs (heads x dimension = 768), and the same tokens restarted every 64.
RECURRENT = [Shape(16, 1024, heads, 768 // heads) for heads in (24, 12, 6)] + [Shape(256, 64, 12, 64), Shape(256, 64, 6, 128)]
QUICK = {Shape(4, 2048, 16, 128), Shape(8, 1024, 8, 64), Shape(1, 65536, 16, 128), Shape(8, 1, 16, 128)}
QUICK |= {Shape(16, 1024, 12, 64), Shape(256, 64, 12, 64)}
TINY, TINY_STEP = Shape(1, 64, 4, 16), Shape(1, 1, 4, 16)
HOST = Shape(1, 256, 4, 64)
CHUNK, HIDDEN = 64, 4  # of a neural memory: tokens a chunk, hidden width over the head dimension
CACHED = 4096  # keys that a decoding attention reads, and tokens before a decode step of cached memories
SEGMENT, TOP_K = 256, 4  # of memory caching: tokens a segment, and cached memories that a sparse read takes
TINY_SEGMENTS = Shape(1, (TOP_K + 2) * SEGMENT, 1, 16)  # a dry run's, with more segments than a sparse read takes

Tensors = dict[str, Tensor]
Peer = Callable[["Case", Shape, Tensors], tuple[Callable[[], Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Case:
    """One operator in one configuration: what goes in, what it must compute, and what it stands beside."""

    operator: str
    variant: str
    inputs: Callable[[Shape, Callable[..., Tensor]], Tensors]
    operations: Callable[[Shape], float]  # of the forward, by the definition
    shapes: list[Shape]
    options: dict[str, object] = field(default_factory=dict)
    peers: dict[str, Peer] = field(default_factory=dict)
    part: Callable[[Shape, str, Tensor], Tensor] | None = None  # the slice the correctness gate looks at; all of it if None
    backward: float | None = 2.5  # operations of the backward over those of the forward; None: a decode step, forward only
    tiny: Shape = TINY  # of a dry run; a decode step has its own
    read: dict[str, float] = field(default_factory=dict)  # inputs of which the definition reads a share only

    def run(self, tensors: Tensors, implementation: str | None = None) -> tuple[Tensor, ...]:
        """The operator's outputs (output, and of the final state what is new, where asked for) as a flat tuple."""
        given = {name: t for name, t in tensors.items() if "." not in name}
        if layers := tuple(t for name, t in tensors.items() if name.startswith("weights.")):
            given["weights"] = layers
        if "state.cached" in tensors:
            given["initial_state"] = cache_of(tensors)
        outputs = getattr(kernels, self.operator)(**given, **self.options, implementation=implementation)
        flat = []
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            flat += [output.memory, output.pooled] if isinstance(output, kernels.MemoryCachingState) else [output]
        return tuple(o for o in flat if o is not None)

    def input_bytes(self, tensors: Tensors) -> float:
        """Bytes of the inputs that the definition reads."""
        return sum(tensor_bytes([t]) * self.read.get(name, 1) for name, t in tensors.items())


# Inputs. `make(*shape)` is random normal in the run's dtype on its device; gates are float32.


def heads_inputs(shape: Shape, make, *, groups: int = 1, gates: Iterable[str] = ()) -> Tensors:
    size = (shape.batch, shape.length, shape.heads)
    tensors = {
        "q": make(*size, shape.dim),
        "k": make(*size[:2], shape.heads // groups, shape.dim),
        "v": make(*size[:2], shape.heads // groups, shape.dim),
    }
    makers = {
        "log_decay": lambda: F.logsigmoid(make(*size).float() + 4),
        "log_retention": lambda: F.logsigmoid(make(*size).float() + 6),
        "key_strength": lambda: 1 + F.softplus(make(*size)),
        "beta": lambda: make(*size).sigmoid(),
        "read_modes": lambda: make(*size, 3).softmax(-1),
    }
    return tensors | {gate: makers[gate]() for gate in gates}


def memory_inputs(shape: Shape, make, *, gates: Iterable[str] = (), state: bool = False) -> Tensors:
    """Normalised keys and scaled queries, as every model here feeds a matrix memory."""
    tensors = heads_inputs(shape, make, gates=gates)
    tensors["q"] = F.normalize(tensors["q"].float(), dim=-1).to(tensors["q"].dtype)
    tensors["k"] = F.normalize(tensors["k"].float(), dim=-1).to(tensors["k"].dtype)
    if state:
        tensors["initial_state"] = make(shape.batch, shape.heads, shape.dim, shape.dim).float()
    return tensors


def neural_inputs(shape: Shape, make, *, depth: int) -> Tensors:
    """Gates as a layer makes them, with steps small enough that a chunk of random keys does not overshoot."""
    tensors = memory_inputs(shape, make)
    size = (shape.batch, shape.length, shape.heads)
    tensors |= {"lr": 0.1 * make(*size).float().sigmoid(), "momentum": make(*size).float().sigmoid()}
    tensors["decay"] = 0.1 * make(*size).float().sigmoid()
    hidden = [HIDDEN * shape.dim] * (depth - 1)
    for i, (a, b) in enumerate(zip([shape.dim, *hidden], [*hidden, shape.dim])):
        tensors[f"weights.{i}"] = make(shape.heads, a, b).float() * a**-0.5
    return tensors


def caching_inputs(shape: Shape, make, *, scale: float) -> Tensors:
    """Connectors that point at TOP_K earlier segments, whose keys share a direction, so that rounding does not decide what is chosen;
    `scale` makes the scores of those 2 to 3."""
    tensors = memory_inputs(shape, make)
    segment = torch.arange(shape.length, device=tensors["q"].device) // SEGMENT
    segments = torch.arange(-(-shape.length // SEGMENT), device=segment.device)
    topics = F.normalize(make(len(segments), shape.heads, shape.dim).float(), dim=-1)
    tensors["k"] = F.normalize(tensors["k"].float() + topics[segment], dim=-1).to(tensors["k"].dtype)
    liking = make(shape.length, len(segments)).float().masked_fill(segments >= segment[:, None], -torch.inf)
    liked = torch.zeros_like(liking).scatter_(1, liking.topk(min(TOP_K, len(segments)), dim=1).indices, 1.0)
    connectors = scale * (liked @ topics.flatten(1)).unflatten(1, (shape.heads, shape.dim))
    return tensors | {"u": connectors.to(tensors["q"].dtype).expand(shape.batch, -1, -1, -1).contiguous()}


def caching_step_inputs(shape: Shape, make) -> Tensors:
    """One token after CACHED others in closed segments and half a segment more; scores of about 1."""
    tensors, heads = memory_inputs(shape, make), (shape.heads, shape.dim)
    cached = (shape.batch, CACHED // SEGMENT, *heads)
    return tensors | {
        "u": make(shape.batch, 1, *heads),
        "state.memory": make(shape.batch, *heads, shape.dim).float(),
        "state.cached": make(*cached, shape.dim).float(),
        "state.pooled": make(shape.batch, shape.heads, 1, shape.dim).float(),
        "state.descriptors": make(*cached).float() * shape.dim**-0.5,
    }


def neural_caching_inputs(shape: Shape, make, *, depth: int) -> Tensors:
    return neural_inputs(shape, make, depth=depth) | {"u": make(shape.batch, shape.length, shape.heads, shape.dim)}


def vector_caching_inputs(shape: Shape, make) -> Tensors:
    size = (shape.batch, shape.length, shape.heads, shape.dim)
    return {"h": make(*size), "keys": F.normalize(make(*size), dim=-1), "u": make(*size)}


def cache_of(tensors: Tensors) -> kernels.MemoryCachingState:
    memory, cached, pooled, descriptors = (tensors[f"state.{name}"] for name in ("memory", "cached", "pooled", "descriptors"))
    return kernels.MemoryCachingState(memory, (cached,), pooled, descriptors, SEGMENT // 2, cached.shape[1])


def cached_inputs(shape: Shape, make) -> Tensors:
    tensors = heads_inputs(shape, make)
    for name in ("k", "v"):
        tensors[name] = make(shape.batch, CACHED, shape.heads, shape.dim)
    return tensors


def conv_inputs(shape: Shape, make, *, state: bool = False) -> Tensors:
    channels = shape.heads * shape.dim
    tensors = {"x": make(shape.batch, shape.length, channels), "weight": make(channels, 4), "bias": make(channels)}
    if state:
        tensors["initial_state"] = make(shape.batch, 3, channels)
    return tensors


def scan_inputs(shape: Shape, make, *, state: bool = False) -> Tensors:
    """All heads' channels side by side, with a gate in float32 as layers make it."""
    size = (shape.batch, shape.length, shape.heads * shape.dim)
    tensors = {"a": (make(*size).float() + 4).sigmoid(), "b": make(*size)}
    if state:
        tensors["initial_state"] = make(shape.batch, size[2]).float()
    return tensors


def recurrent_inputs(shape: Shape, make, *, gates: int) -> Tensors:
    weight = make(shape.heads, shape.dim, gates, shape.dim) * shape.dim**-0.5
    return {"x": make(shape.batch, shape.length, shape.heads, gates, shape.dim), "weight": weight}


# Operations of the forward, counting a multiply and an add as two.


def attention_operations(shape: Shape, *, window: int | None = None, prefix: int = 0) -> float:
    seen = shape.length * (shape.length + 1) / 2
    if window is not None:
        seen = sum(min(t + 1, window) + min(prefix, max(t + 1 - window, 0)) for t in range(shape.length))
    return 4 * shape.dim * seen * shape.batch * shape.heads


def memory_operations(shape: Shape, *, products: int) -> float:
    """`products` passes of a vector over the state a token: write and read are two, the delta rule's look-up is a third."""
    return 2 * products * shape.dim**2 * shape.batch * shape.length * shape.heads


def neural_operations(shape: Shape, *, depth: int) -> float:
    """With F the hidden width: the inner forward and gradient, reads of weights and momentum, writes of both, pairs in a chunk."""
    dim, hidden = shape.dim, HIDDEN * shape.dim
    token = 12 * dim**2 + 4 * CHUNK * dim if depth == 1 else 22 * dim * hidden + 4 * CHUNK * (dim + hidden)
    return token * shape.batch * shape.length * shape.heads


def cache_operations(shape: Shape, *, read: float, linear: bool = True, **options) -> float:
    """Scores of cached memories and reads, of `read` operations each, with segments of SEGMENT tokens."""
    token = CacheOptions(SEGMENT, **options).flops(shape.length, 1, read, shape.dim, linear=linear)
    return token * shape.batch * shape.length * shape.heads


def caching_operations(shape: Shape, **options) -> float:
    return memory_operations(shape, products=2) + cache_operations(shape, read=2 * shape.dim**2, **options)


def neural_caching_operations(shape: Shape, *, depth: int, **options) -> float:
    """Reading a cached memory takes 2 operations a weight."""
    hidden = HIDDEN * shape.dim
    weights = shape.dim**2 if depth == 1 else 2 * shape.dim * hidden + (depth - 2) * hidden**2
    return neural_operations(shape, depth=depth) + cache_operations(shape, read=2 * weights, linear=False, **options)


def vector_caching_operations(shape: Shape, **options) -> float:
    return cache_operations(shape, read=2 * shape.dim, **options)


def caching_step_operations(shape: Shape, *, read: int) -> float:
    """A write and a read, scores of all cached memories and the open one, and reads of `read` of them."""
    token = 4 * shape.dim**2 + 2 * shape.dim * (CACHED // SEGMENT + 1) + 2 * read * shape.dim**2
    return token * shape.batch * shape.heads


def conv_operations(shape: Shape) -> float:
    return 8 * shape.batch * shape.length * shape.heads * shape.dim


def scan_operations(shape: Shape) -> float:
    return 2 * shape.batch * shape.length * shape.heads * shape.dim


def recurrent_operations(shape: Shape, *, gates: int) -> float:
    return 2 * gates * shape.dim**2 * shape.batch * shape.length * shape.heads


# The slice that the gate compares: one row of the batch and one head of keys, which depend on no other.


def one_head(shape: Shape, name: str, tensor: Tensor, *, groups: int = 1) -> Tensor:
    if name.startswith("weights."):
        return tensor[-1:]  # of one sequence's gradients: such shapes have batch 1
    return tensor[-1:, :, -(tensor.shape[2] * groups // shape.heads) :]


def last_head(shape: Shape, name: str, tensor: Tensor) -> Tensor:
    """One head of every row: the rows share its weight's gradient."""
    return tensor[-1:] if name == "weight" else tensor[:, :, -1:]


def some_channels(shape: Shape, name: str, tensor: Tensor) -> Tensor:
    return tensor[-64:] if name in ("weight", "bias") else tensor[..., -64:]


# Peers: each returns the call to time and the tensors whose gradients it takes.


def sdpa(case: Case, shape: Shape, tensors: Tensors):
    """torch's FlashAttention path at the same batch, length, heads and head dimension, whatever the operator.

    Beside a recurrent step: one query over CACHED keys.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    keys = CACHED if case.backward is None else shape.length
    if case.operator == "attention":
        given = [tensors[name].detach().clone() for name in ("q", "k", "v")]
    else:
        like = next(iter(tensors.values()))
        lengths = (shape.length, keys, keys)
        given = [torch.randn(shape.batch, n, shape.heads, shape.dim, device=like.device, dtype=like.dtype) for n in lengths]
    q, k, v = (t.requires_grad_(case.backward is not None) for t in given)
    backends = [SDPBackend.FLASH_ATTENTION] if q.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def call() -> Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                is_causal=keys == shape.length, enable_gqa=q.shape[2] != k.shape[2],
            )  # fmt: skip

    return call, [q, k, v]


def flex(case: Case, shape: Shape, tensors: Tensors):
    """Compiled FlexAttention with the same window and prefix."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not tensors["q"].is_cuda:
        raise ImportError("not compiled on a CPU")
    window, prefix = case.options["window"], case.options.get("prefix", 0)

    def visible(b, h, row, column):
        return (column <= row) & ((column > row - window) | (column < prefix))

    mask = create_block_mask(visible, None, None, shape.length, shape.length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (tensors[name].detach().clone().requires_grad_() for name in ("q", "k", "v"))
    return lambda: compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask), [q, k, v]


def other(module: str, function: str, call: Callable[[Callable, Tensors], Tensor]) -> Peer:
    """A function of another package, where it is installed."""

    def build(case: Case, shape: Shape, tensors: Tensors):
        theirs = getattr(importlib.import_module(module), function)
        own = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        return lambda: call(theirs, own), list(own.values())

    return build


def plain_linear(case: Case, shape: Shape, tensors: Tensors):
    """Our own linear attention without decay: the bound for every matrix memory with a richer write."""
    own = {name: tensors[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
    return lambda: kernels.linear_attention(**own)[0], list(own.values())


def plain_neural(case: Case, shape: Shape, tensors: Tensors):
    """Our own neural memory without a cache: the bound for a cache of its segments."""
    own = {name: t.detach().clone().requires_grad_() for name, t in tensors.items() if name != "u"}
    given = {name: t for name, t in own.items() if "." not in name}
    layers = tuple(t for name, t in own.items() if "." in name)
    return lambda: kernels.neural_memory(**given, weights=layers, chunk_size=CHUNK)[0], list(own.values())


def titans(case: Case, shape: Shape, tensors: Tensors):
    """titans-pytorch's memory of the same depth, width and chunk; its projections and gates are in the time."""
    from titans_pytorch import MemoryMLP, NeuralMemory

    like = tensors["q"]
    depth = sum(name.startswith("weights.") for name in tensors)
    memory = NeuralMemory(
        shape.heads * shape.dim, dim_head=shape.dim, heads=shape.heads, chunk_size=CHUNK,
        model=MemoryMLP(shape.dim, depth=depth, expansion_factor=HIDDEN),
    ).to(like.device, like.dtype)  # fmt: skip
    x = torch.randn(shape.batch, shape.length, shape.heads * shape.dim, device=like.device, dtype=like.dtype, requires_grad=True)
    return lambda: memory(x)[0], [x, *memory.memory_model_parameters]


def ttt_linear(case: Case, shape: Shape, tensors: Tensors):
    """flash-linear-attention's TTT-Linear with the same chunk: a matrix with a LayerNorm in its loss, without momentum and decay."""
    from fla.ops.ttt import chunk_ttt_linear

    q, k, v, lr = (tensors[name].detach().clone().requires_grad_() for name in ("q", "k", "v", "lr"))
    scale, shift = (torch.ones(shape.heads, shape.dim, device=q.device, dtype=q.dtype) * value for value in (1, 0))
    own = [q, k, v, lr, scale.requires_grad_(), shift.requires_grad_()]
    return lambda: chunk_ttt_linear(q, k, v, scale, shift, lr[..., None].to(q.dtype), chunk_size=CHUNK)[0], own


def torch_conv(case: Case, shape: Shape, tensors: Tensors):
    own = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}

    def call() -> Tensor:
        x = F.pad(own["x"].transpose(1, 2), (own["weight"].shape[1] - 1, 0))
        return F.silu(F.conv1d(x, own["weight"][:, None], own["bias"], groups=x.shape[1]))

    return call, list(own.values())


def fla_hgrn(case: Case, shape: Shape, tensors: Tensors):
    """flash-linear-attention's scan of HGRN, which takes the gates' logarithms."""
    from fla.ops.hgrn import chunk_hgrn

    own = [tensors["b"].detach().clone().requires_grad_(), tensors["a"].detach().log().requires_grad_()]
    return lambda: chunk_hgrn(*own)[0], own


def cudnn(case: Case, shape: Shape, tensors: Tensors):
    """torch.nn's (cuDNN's) of the same width; its input projection and its dense recurrent weight are in the time."""
    like, width = tensors["x"], shape.heads * shape.dim
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[case.operator](width, width, batch_first=True).to(like.device, like.dtype)
    x = torch.randn(shape.batch, shape.length, width, device=like.device, dtype=like.dtype, requires_grad=True)
    return lambda: module(x)[0], [x, *module.parameters()]


FLASH_ATTN = other("flash_attn", "flash_attn_func", lambda f, t: f(t["q"], t["k"], t["v"], causal=True))
FLA_LINEAR = other(
    "fla.ops.linear_attn", "chunk_linear_attn", lambda f, t: f(t["q"], t["k"], t["v"], scale=1.0, normalize=False)[0]
)
FLA_SIMPLE_GLA = other(
    "fla.ops.simple_gla", "chunk_simple_gla", lambda f, t: f(t["q"], t["k"], t["v"], t["log_decay"], scale=1.0)[0]
)
FLA_DELTA = other("fla.ops.delta_rule", "chunk_delta_rule", lambda f, t: f(t["q"], t["k"], t["v"], t["beta"], scale=1.0)[0])
FLA_GATED_DELTA = other(
    "fla.ops.gated_delta_rule", "chunk_gated_delta_rule",
    lambda f, t: f(t["q"], t["k"], t["v"], t["log_decay"], t["beta"], scale=1.0)[0],
)  # fmt: skip
DAO_CONV = other(
    "causal_conv1d", "causal_conv1d_fn",
    lambda f, t: f(t["x"].transpose(1, 2), t["weight"], t["bias"], activation="silu").transpose(1, 2),
)  # fmt: skip

WINDOW = {"window": 512, "prefix": 16}
STEP = {"output_final_state": True}
CACHING = {
    "gated, mean": {"aggregation": "gated", "routing": "mean"},
    "gated, energy": {"aggregation": "gated", "routing": "energy"},
    f"sparse {TOP_K}, mean": {"aggregation": "sparse", "top_k": TOP_K, "routing": "mean"},
}

CASES = [
    Case(
        "attention", "causal", heads_inputs, attention_operations, STANDARD + SWEEP,
        part=one_head, peers={"sdpa": sdpa, "flash_attn": FLASH_ATTN},
    ),
    Case(
        "attention", "grouped heads", partial(heads_inputs, groups=4), attention_operations, SOME,
        part=partial(one_head, groups=4), peers={"sdpa": sdpa},
    ),
    Case(
        "attention", "window 512, prefix 16", heads_inputs, partial(attention_operations, **WINDOW), SOME, WINDOW,
        part=one_head, peers={"sdpa": sdpa, "flex_attention": flex},
    ),
    Case(
        "attention", "key strength and retention", partial(heads_inputs, gates=("key_strength", "log_retention")),
        attention_operations, SOME, part=one_head, peers={"sdpa": sdpa},
    ),
    Case(
        "attention", f"one query, {CACHED} cached keys", cached_inputs,
        lambda s: 4 * s.dim * CACHED * s.batch * s.heads, DECODE, peers={"sdpa": sdpa}, backward=None,
    ),
    Case(
        "linked_attention", "causal", partial(heads_inputs, gates=("read_modes",)), attention_operations, SOME,
        part=one_head, peers={"sdpa": sdpa},
    ),
    Case(
        "linear_attention", "no decay", memory_inputs, partial(memory_operations, products=2), STANDARD + LONG,
        part=one_head, peers={"sdpa": sdpa, "fla": FLA_LINEAR},
    ),
    Case(
        "linear_attention", "decay", partial(memory_inputs, gates=("log_decay",)), partial(memory_operations, products=2),
        STANDARD + LONG, part=one_head, peers={"sdpa": sdpa, "fla": FLA_SIMPLE_GLA},
    ),
    Case(
        "linear_attention", "step", partial(memory_inputs, gates=("log_decay",), state=True),
        partial(memory_operations, products=2), DECODE, STEP, peers={"sdpa": sdpa}, backward=None,
    ),
    Case(
        "delta_rule", "no decay", partial(memory_inputs, gates=("beta",)), partial(memory_operations, products=3),
        STANDARD + LONG, part=one_head, peers={"sdpa": sdpa, "linear_attention": plain_linear, "fla": FLA_DELTA},
    ),
    Case(
        "delta_rule", "decay", partial(memory_inputs, gates=("beta", "log_decay")), partial(memory_operations, products=3),
        STANDARD + LONG, part=one_head, peers={"sdpa": sdpa, "linear_attention": plain_linear, "fla": FLA_GATED_DELTA},
    ),
    Case(
        "delta_rule", "step", partial(memory_inputs, gates=("beta", "log_decay"), state=True),
        partial(memory_operations, products=3), DECODE, STEP, peers={"sdpa": sdpa}, backward=None,
    ),
    Case(
        "gated_scan", "float32 gate", scan_inputs, scan_operations, STANDARD + LONG, part=some_channels,
        peers={"sdpa": sdpa, "fla": fla_hgrn}, backward=1.5,
    ),
    Case(
        "gated_scan", "step", partial(scan_inputs, state=True), scan_operations, DECODE, STEP, peers={"sdpa": sdpa}, backward=None,
    ),
    *(
        Case(
            operator, "heads apart", partial(recurrent_inputs, gates=gates),
            partial(recurrent_operations, gates=gates), RECURRENT, part=last_head,
            peers={"sdpa": sdpa, "torch.nn": cudnn}, backward=2.0,
        )
        for operator, gates in (("gru", 3), ("lstm", 4))
    ),
    *(
        Case(
            "neural_memory", f"depth {depth}, chunk {CHUNK}", partial(neural_inputs, depth=depth),
            partial(neural_operations, depth=depth), GROWING, {"chunk_size": CHUNK}, part=one_head,
            peers={"sdpa": sdpa, "linear_attention": plain_linear, "titans-pytorch": titans,
                   **({"fla ttt": ttt_linear} if depth == 1 else {})},
        )
        for depth in (1, 2)
    ),
    *(
        Case(
            "memory_caching", f"{variant}, segment {SEGMENT}", partial(caching_inputs, scale=0.15 if "energy" in variant else 4.0),
            partial(caching_operations, **options), GROWING, {"segment_length": SEGMENT, **options}, part=one_head,
            peers={"sdpa": sdpa, "linear_attention": plain_linear}, backward=2.0, tiny=TINY_SEGMENTS,
        )
        for variant, options in CACHING.items()
    ),
    *(
        Case(
            "memory_caching", f"step, {variant}", caching_step_inputs, partial(caching_step_operations, read=read), DECODE,
            {"segment_length": SEGMENT, **CACHING[variant], **STEP}, peers={"sdpa": sdpa}, backward=None,
            read={"state.cached": read * SEGMENT / CACHED},
        )
        for variant, read in (("gated, mean", CACHED // SEGMENT), (f"sparse {TOP_K}, mean", TOP_K))
    ),
    Case(
        "neural_memory_caching", f"gated, mean, depth 2, segment {SEGMENT}", partial(neural_caching_inputs, depth=2),
        partial(neural_caching_operations, depth=2, **CACHING["gated, mean"]), [Shape(1, n, 16, 64) for n in (4096, 16384)],
        {"chunk_size": CHUNK, "segment_length": SEGMENT, **CACHING["gated, mean"]}, part=one_head,
        peers={"sdpa": sdpa, "neural_memory": plain_neural}, backward=2.0, tiny=TINY_SEGMENTS,
    ),
    Case(
        "vector_caching", f"gated, mean, segment {SEGMENT}", vector_caching_inputs,
        partial(vector_caching_operations, **CACHING["gated, mean"]), GROWING, {"segment_length": SEGMENT, **CACHING["gated, mean"]},
        part=one_head, peers={"sdpa": sdpa}, backward=2.0, tiny=TINY_SEGMENTS,
    ),
    Case(
        "causal_conv1d", "width 4, bias, SiLU", conv_inputs, conv_operations, STANDARD + LONG, {"activation": "silu"},
        part=some_channels, peers={"sdpa": sdpa, "conv1d": torch_conv, "causal-conv1d": DAO_CONV},
    ),
    Case(
        "causal_conv1d", "step", partial(conv_inputs, state=True), conv_operations, DECODE, {"activation": "silu", **STEP},
        peers={"sdpa": sdpa}, backward=None,
    ),
]  # fmt: skip


class Bench:
    """One device: random tensors, times, memory, and the machine's ceilings."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run
        if dry_run:
            torch.set_num_threads(1)
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype = torch.float32 if dry_run else torch.bfloat16
        # A dry run has nothing but the chunked form; elsewhere None takes what a user gets.
        self.implementation = "chunked" if dry_run else None
        self.flush = torch.empty(1 if dry_run else 2**28, dtype=torch.int8, device=self.device)
        self.ceilings = self.measure_ceilings()

    def make(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(self.dtype)

    def wait(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    def poison(self) -> None:
        """Fill free memory with NaN, so that an output nobody wrote is no number."""
        if not self.dry_run:
            torch.cuda.empty_cache()
            block = torch.empty(min(torch.cuda.mem_get_info()[0] // 2, 2**34) // 4, device=self.device)
            block.fill_(float("nan"))
            del block

    def time(self, call: Callable[[], object], budget_ms: float = 150.0) -> dict[str, float]:
        """Median milliseconds of one call with cold L2, with the 20th and 80th percentile."""
        if self.dry_run:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
        else:
            for _ in range(3):
                call()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            self.wait()
            count = max(10, min(300, int(budget_ms / max(pair[0].elapsed_time(pair[1]), 1e-3))))
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            for start, end in events:
                self.flush.zero_()
                start.record()
                call()
                end.record()
            self.wait()
            times = [start.elapsed_time(end) for start, end in events]
        times.sort()
        return {"ms": statistics.median(times), "ms_p20": times[len(times) // 5], "ms_p80": times[-1 - len(times) // 5]}

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call captured in a CUDA graph: its kernels without the host between them."""
        if self.dry_run:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        return captured.replay

    def wall(self, call: Callable[[], object], count: int = 200) -> float:
        """Milliseconds a call takes when many follow each other, host included."""
        for _ in range(3):
            call()
        self.wait()
        start = time.perf_counter()
        for _ in range(3 if self.dry_run else count):
            call()
        self.wait()
        return (time.perf_counter() - start) * 1e3 / (3 if self.dry_run else count)

    def peak(self, call: Callable[[], object]) -> float | None:
        """MiB beyond what was allocated before the call."""
        if self.dry_run:
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def measure_ceilings(self) -> dict[str, float]:
        size = 2**10 if self.dry_run else 2**31
        buffers = torch.ones(2, size, dtype=torch.int8, device=self.device)
        copy = self.time(lambda: buffers[0].copy_(buffers[1]))["ms"]
        buffers = None
        n = 64 if self.dry_run else 8192
        a, b = self.make(n, n), self.make(n, n)
        product = self.time(lambda: a @ b)["ms"]
        return {"copy_bytes_per_s": 2 * size / copy * 1e3, "matmul_flop_per_s": 2 * n**3 / product * 1e3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def gate(bench: Bench, case: Case, shape: Shape, tensors: Tensors, dy: Tensor | None) -> dict[str, float]:
    """Relative errors of outputs and gradients against the chunked form in float32; raises AssertionError over a bound."""
    part = (lambda name, t: t) if case.part is None else partial(case.part, shape)
    exact = {name: part(name, t).detach().float().requires_grad_(dy is not None) for name, t in tensors.items()}
    expected = case.run(exact, "chunked")
    bench.poison()
    actual = case.run(tensors, bench.implementation)
    errors = {f"output {i}": relative_error(part("output", a), e) for i, (a, e) in enumerate(zip(actual, expected))}
    if dy is not None:
        wanted = torch.autograd.grad(expected[0], list(exact.values()), part("output", dy).float())
        given = torch.autograd.grad(actual[0], list(tensors.values()), dy)
        for name, a, e in zip(tensors, given, wanted):
            errors[f"gradient of {name}"] = relative_error(part(name, a), e)
    wrong = [n for n, e in errors.items() if not e <= (OUTPUT_BOUND if n.startswith("output") else GRADIENT_BOUND)]
    assert not wrong, "wrong: " + ", ".join(f"{name} by {errors[name]:.2g}" for name in wrong)
    return errors


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + (str(error).strip().splitlines() or [""])[0][:200]


def measure_row(bench: Bench, case: Case, shape: Shape) -> list[dict[str, object]]:
    """The rows of one case at one shape: forward, and forward with backward (or one decode step in a CUDA graph)."""
    torch.manual_seed(0)
    base = {"operator": case.operator, "variant": case.variant, "shape": vars(shape), "dtype": str(bench.dtype)[6:]}
    train = case.backward is not None
    tensors = {name: t.detach().requires_grad_(train) for name, t in case.inputs(shape, bench.make).items()}
    with torch.set_grad_enabled(train):
        outputs = case.run(tensors, bench.implementation)
        dy = torch.randn_like(outputs[0]) if train else None
        base["errors"] = gate(bench, case, shape, tensors, dy)
    bytes_forward = case.input_bytes(tensors) + tensor_bytes(outputs)
    bytes_both = 2 * bytes_forward + case.input_bytes(tensors)  # the backward reads inputs and dy and writes gradients
    operations = case.operations(shape)
    del outputs

    @torch.no_grad()
    def forward():
        return case.run(tensors, bench.implementation)

    def training(call, wanted, dy):
        return lambda: torch.autograd.grad(call(), wanted, dy)

    passes = {"forward" if train else "step": (bench.graph(forward) if not train else forward, bytes_forward, operations)}
    if train:
        both = training(lambda: case.run(tensors, bench.implementation)[0], list(tensors.values()), dy)
        passes["forward+backward"] = (both, bytes_both, operations * (1 + case.backward))

    rows = []
    for name, (call, size, count) in passes.items():
        by_bytes = size / bench.ceilings["copy_bytes_per_s"] * 1e3
        by_operations = count / bench.ceilings["matmul_flop_per_s"] * 1e3
        floor = max(by_bytes, by_operations)
        row = {**base, "pass": name, **bench.time(call), "peak_mib": bench.peak(call)}
        row |= {"operations": count, "bytes": size, "floor_ms": floor, "bound": "bytes" if floor == by_bytes else "operations"}
        row |= {"x_floor": row["ms"] / floor, "tflop_per_s": count / row["ms"] / 1e9, "peers": {}, "x_peer": {}, "absent": {}}
        if not train:
            row["eager_ms"] = bench.time(forward)["ms"]
        for peer, build in case.peers.items():
            try:
                theirs, wanted = build(case, shape, tensors)
                if name == "forward+backward":
                    timed = training(theirs, wanted, torch.randn_like(theirs()))
                else:
                    timed = torch.no_grad()(theirs)
                    timed = timed if train else bench.graph(timed)
                row["peers"][peer] = bench.time(timed)["ms"]
                row["x_peer"][peer] = row["peers"][peer] / row["ms"]
            except Exception as error:  # a peer that is not installed, or cannot do this, leaves its reason
                row["absent"][peer] = one_line(error)
        rows.append(row)
    return rows


def compiled_kernels() -> int:
    """How many kernels Triton has compiled into this run's own cache."""
    return sum(1 for _ in Path(os.environ.get("TRITON_CACHE_DIR", os.devnull)).rglob("*.cubin"))


def first_calls(bench: Bench, case: Case) -> dict[str, object]:
    """Seconds of the first forward and the first backward with an empty compiler cache, and what other lengths compile again."""

    def run(length: int) -> tuple[float, float]:
        shape = Shape(1, length, 4, 16 if bench.dry_run else 128)
        tensors = {name: t.detach().requires_grad_() for name, t in case.inputs(shape, bench.make).items()}
        bench.wait()
        start = time.perf_counter()
        output = case.run(tensors, bench.implementation)[0]
        bench.wait()
        middle = time.perf_counter()
        torch.autograd.grad(output, list(tensors.values()), torch.ones_like(output))
        bench.wait()
        return middle - start, time.perf_counter() - middle

    forward, backward = run(2048 if not bench.dry_run else 32)
    before = compiled_kernels()
    lengths = LENGTHS[:6] if bench.dry_run else LENGTHS
    for length in lengths:
        run(length)
    figures = {"first_forward_s": forward, "first_backward_s": backward, "compiled": before, "lengths": list(lengths)}
    return figures | {"compiled_again": compiled_kernels() - before}


def host_side(bench: Bench, case: Case) -> dict[str, float]:
    """A small forward called one after another, and the same as replays of a CUDA graph."""
    tensors = case.inputs(TINY if bench.dry_run else HOST, bench.make)

    @torch.no_grad()
    def call():
        return case.run(tensors, bench.implementation)

    eager, replay = bench.wall(call), bench.wall(bench.graph(call))
    return {"eager_ms": eager, "graph_ms": replay, "ratio": eager / replay}


def machine(dry_run: bool) -> dict[str, object]:
    """What the figures were taken on."""
    found: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if not dry_run:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
        found |= {"capability": f"{properties.major}.{properties.minor}", "memory_gib": round(properties.total_memory / 2**30, 1)}
    return found


def save(path: Path | None, result: dict[str, object]) -> None:
    """Replace the file in one step, so that a run cut short leaves the rows so far."""
    if path is not None:
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(path)


def show(row: dict[str, object]) -> None:
    head = f"{row['operator']:21} {row['variant']:36} {Shape(**row['shape'])!s:22} "
    if "error" in row:
        print(f"{head}{row['error']}", flush=True)
        return
    peers = "  ".join(f"{name} {times:.2f}x" for name, times in row["x_peer"].items())
    peers += "".join(f"  {name} absent" for name in row["absent"])
    print(f"{head}{row['pass']:17} {row['ms']:9.3f} ms  {row['x_floor']:6.2f} x floor ({row['bound']})  {peers}", flush=True)


def run_operator(operator: str, arguments: argparse.Namespace, deadline: float) -> dict[str, object]:
    """Everything about one operator, in this process."""
    bench = Bench(arguments.dry_run)
    cases = [case for case in CASES if case.operator == operator]
    result: dict[str, object] = {"ceilings": bench.ceilings, "rows": [], "not_run": []}
    for name, figures in (("first_calls", first_calls), ("host", host_side)):
        try:
            result[name] = figures(bench, cases[0])
        except Exception as error:
            result[name] = {"error": one_line(error)}
    for case in cases:
        shapes = [case.tiny if case.backward is not None else TINY_STEP] if arguments.dry_run else case.shapes
        for shape in dict.fromkeys(shapes):
            if arguments.shapes == "quick" and not arguments.dry_run and shape not in QUICK:
                continue
            if time.monotonic() > deadline:
                result["not_run"].append(f"{operator}, {case.variant}, {shape}: out of time")
                continue
            try:
                rows = measure_row(bench, case, shape)
            except Exception as error:  # one row's failure is a finding; the others still count
                rows = [{"operator": operator, "variant": case.variant, "shape": vars(shape), "error": one_line(error)}]
            for row in rows:
                show(row)
            result["rows"] += rows
            save(arguments.out, result)
    return result


def run_apart(operator: str, arguments: argparse.Namespace, seconds: float) -> dict[str, object]:
    """One operator in a process of its own, with an empty compiler cache; what it wrote counts even if it dies."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--operators", operator, "--shapes", arguments.shapes, "--out", str(out), "--child"]
        command += ["--seconds", str(seconds)] + ["--dry-run"] * arguments.dry_run
        environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
        try:
            status = subprocess.run(command, env=environment, timeout=seconds + 60).returncode
            reason = f"its process ended with status {status}" if status else None
        except subprocess.TimeoutExpired:
            reason = "its process did not end in time"
        result = json.loads(out.read_text()) if out.exists() else {"rows": [], "not_run": []}
        if reason:
            result["not_run"].append(f"{operator}: {reason}")
        return result


def main(argv: list[str] | None = None) -> int:
    operators = list(dict.fromkeys(case.operator for case in CASES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--operators", default=",".join(operators), help=f"comma-separated (default: {','.join(operators)})")
    parser.add_argument("--shapes", choices=("quick", "standard"), default="standard", help="how many shapes (default: standard)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop starting rows after this long (default: 3600)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the chunked forms, on a CPU; no time is a claim")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("benchmark: no CUDA GPU here, and a time from a CPU is never a claim; --dry-run exercises the code", file=sys.stderr)
        return 2
    chosen = [name for name in arguments.operators.split(",") if name]
    if unknown := [name for name in chosen if name not in operators]:
        parser.error(f"no operator {', '.join(unknown)}; there are {', '.join(operators)}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    if arguments.child:
        save(arguments.out, run_operator(chosen[0], arguments, end))
        return 0

    result: dict[str, object] = {"dry_run": arguments.dry_run, "machine": machine(arguments.dry_run), "shapes": arguments.shapes}
    result |= {"bounds": {"output": OUTPUT_BOUND, "gradient": GRADIENT_BOUND}, "operators": {}, "rows": [], "not_run": []}
    for index, operator in enumerate(chosen):
        part = run_apart(operator, arguments, max((end - time.monotonic()) / (len(chosen) - index), 1.0))
        result["rows"] += part.pop("rows")
        result["not_run"] += part.pop("not_run")
        result["operators"][operator] = part
        save(arguments.out, result)
    wrong = [row for row in result["rows"] if "error" in row]
    print(f"{len(result['rows'])} rows, {len(wrong)} with an error, {len(result['not_run'])} not run")
    for line in result["not_run"]:
        print(f"not run: {line}")
    if arguments.dry_run:
        print("a dry run on a CPU: no time above is a claim")
    return 1 if wrong or result["not_run"] else 0


if __name__ == "__main__":
    sys.exit(main())
