"""memory_caching and neural_memory_caching against memory-caching, an independent implementation of the paper, set up to say the same."""

from dataclasses import replace

import pytest
import torch
from checks import assert_close

from memzoo.kernels import memory_caching, neural_memory_caching

peer = pytest.importorskip("memory_caching", reason="memory-caching is not installed: pip install -e '.[peers]'")

HEADS, DIM, LENGTH = 2, 16, 11
NAMES = {"residual": "residual", "gated": "grm", "soup": "soup", "sparse": "ssc"}
SIZES = {1: [1] * 11, 4: [4, 4, 3], "log": [8, 2, 1]}


def theirs(backend, aggregation, segment_length, restart):
    """Their cache around a memory; gradients through cached states and contexts are their default."""
    config = peer.MCConfig(
        d_model=HEADS * DIM, num_heads=HEADS, aggregation=NAMES[aggregation], ssc_top_k=1,
        segmentation="logarithmic" if segment_length == "log" else "constant",
        segment_size=1 if segment_length == "log" else segment_length, state_init_mode="restart" if restart else "checkpoint",
    )  # fmt: skip
    return peer.MemoryCachingLayer(config=config, backend=backend).double()


def summed(k, segment_length):
    """Routing keys whose mean over any beginning of a segment is the sum of the keys k [B, T, H, D] there.

    Theirs scores segments by sums, as Eq. 10 is printed; ours by means, of whatever it is given to pool.
    """
    keys, at = [], 0
    for size in SIZES[segment_length]:
        part = k[:, at : at + size]
        sums = part.cumsum(1) * torch.arange(1, size + 1, dtype=k.dtype)[:, None, None]
        keys.append(sums.diff(dim=1, prepend=torch.zeros_like(part[:, :1])))
        at += size
    return torch.cat(keys, 1)


def assert_same(layer, aggregation, segment_length, operator, leaves):
    """Outputs, and gradients of the input, of their projections and of `leaves`; `operator` takes q, k, v, u and options."""
    x = torch.randn(2, LENGTH, HEADS * DIM, dtype=torch.float64, requires_grad=True)
    q, k, v, u = (project(x).unflatten(-1, (HEADS, DIM)) for project in (layer.q_proj, layer.k_proj, layer.v_proj, layer.u_proj))
    y, _ = operator(
        q, k, v, u, routing_keys=summed(k, segment_length), segment_length=segment_length, aggregation=aggregation,
        top_k=1 if aggregation == "sparse" else None,
    )  # fmt: skip
    actual, expected = layer.o_proj(y.flatten(2)), layer(x)
    assert_close(actual, expected)
    leaves = {"input": x, **dict(layer.named_parameters()), **leaves}
    gradients = []
    for output in (actual, expected):
        total = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).cos().view(output.shape)).sum()
        gradients.append(torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True))
    for name, ours, wanted in zip(leaves, *gradients):
        assert_close(ours, wanted, 1e-9, f"gradient of {name}")


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("segment_length", [1, 4, "log"])
@pytest.mark.parametrize("aggregation", NAMES)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_matrix_memories(implementation, aggregation, segment_length, restart):
    """Linear attention and SWLA, whose constant alpha, lambda and beta are exp(log_decay), write_gate and shift_gate."""

    def options(**gates):
        def operator(*tokens, **options):
            given = {name: torch.full((2, LENGTH, HEADS), value, dtype=torch.float64) for name, value in gates.items()}
            return memory_caching(*tokens, **given, **options, restart=restart, implementation=implementation)

        return operator

    layer = theirs(peer.LinearMemoryBackend(), aggregation, segment_length, restart)
    assert_same(layer, aggregation, segment_length, options(), {})
    swla = peer.SWLABackend(peer.SWLAConfig(alpha=0.8, beta=0.3, lam=0.7))
    gates = {"log_decay": torch.tensor(0.8, dtype=torch.float64).log().item(), "write_gate": 0.7, "shift_gate": 0.3}
    assert_same(theirs(swla, aggregation, segment_length, restart), aggregation, segment_length, options(**gates), {})


def deep(backend, initial):
    """Their MLP memory, started from `initial` instead of zeros, which their MLP never leaves, and with its biases held at zero."""
    speed = "s" if isinstance(backend, peer.TitansBackend) else "vel"

    class Started(type(backend)):
        def init_state(self, *, batch_size, **options):
            weights = tuple(w.mT.expand(batch_size, *w.mT.shape) for w in initial)
            return replace(super().init_state(batch_size=batch_size, **options), weights=weights)

        def update(self, state, k_t, v_t):
            written = super().update(state, k_t, v_t)
            return replace(written, biases=state.biases, **{f"{speed}_b": getattr(state, f"{speed}_b")})

    return Started(backend.config)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("segment_length", [4, "log"])
@pytest.mark.parametrize("aggregation", NAMES)
@pytest.mark.parametrize("memory", ["dla", "titans"])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_deep_memories(implementation, memory, aggregation, segment_length, restart):
    """Deep linear attention and Titans, with a step a token, the inner gradient differentiable, and no residual connection.

    Titans: "gradient_descent", since "paper" ascends; their retention is our 1 - decay, and their loss has no 1/2, hence twice the step.
    """
    initial = tuple((torch.randn(HEADS, *shape, dtype=torch.float64) / 4).requires_grad_() for shape in ((DIM, 24), (24, DIM)))
    common = {"memory_width": 24, "memory_depth": 2, "inner_update_mode": "differentiable", "step_size": 0.1, "momentum": 0.6}
    if memory == "dla":
        backend = peer.DLABackend(peer.DLAConfig(**common, objective="dot"))
        loss, lr, decay = "dot", 0.1, 0.0
    else:
        config = peer.TitansConfig(**common, objective="l2", retention_alpha=0.9, update_convention="gradient_descent")
        backend = peer.TitansBackend(config)
        loss, lr, decay = "l2", 0.2, 0.1

    def operator(q, k, v, u, **options):
        gates = (torch.full((2, LENGTH, HEADS), value, dtype=torch.float64) for value in (lr, 0.6, decay))
        return neural_memory_caching(
            q, k, v, u, *gates, initial, chunk_size=1, residual=False, loss=loss, restart=restart, implementation=implementation,
            **options,
        )  # fmt: skip

    layer = theirs(deep(backend, initial), aggregation, segment_length, restart)
    assert_same(layer, aggregation, segment_length, operator, {f"layer {i}": w for i, w in enumerate(initial)})
