"""memory_caching on Triton as a whole: against the definition with gradients and states, decode steps, caps, one sweep for the energies."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example

from memzoo.kernels import memory_caching

ROUTED = [(way, routing) for way in ("gated", "sparse") for routing in ("mean", "energy", "submax")]
CASES = [*ROUTED, ("residual", "mean"), ("average", "mean")]
VARIANTS = ("plain", "decay", "delta", "window")


def example(batch=2, length=37, variant="decay", routing_dim=16):
    tensors = {
        "q": torch.randn(batch, length, 1, 16),
        "k": F.normalize(torch.randn(batch, length, 1, 16), dim=-1),
        "v": torch.randn(batch, length, 1, 24),
        "u": 2 * torch.randn(batch, length, 1, routing_dim),
    }
    if routing_dim != 16:
        tensors["routing_keys"] = F.normalize(torch.randn(batch, length, 1, routing_dim), dim=-1)
    if variant != "plain":
        tensors["log_decay"] = -0.3 * torch.rand(batch, length, 1)
    for name in {"delta": ("beta",), "window": ("write_gate", "shift_gate")}.get(variant, ()):
        tensors[name] = torch.rand(batch, length, 1)
    return tensors


def choice(aggregation, routing, **options):
    top_k = 2 if aggregation == "sparse" else None
    return {"aggregation": aggregation, "routing": routing, "top_k": top_k, **options}


def assert_same_state(actual, expected, bound=5e-5):
    assert str(actual.position) == str(expected.position) and str(actual.count) == str(expected.count)
    parts = ((s.memory, s.cached[0], s.pooled, s.descriptors, *(s.previous or ())) for s in (actual, expected))
    for a, e in zip(*parts):
        assert (a is None) == (e is None)
        if e is not None:
            assert_close(a, e, bound)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize(("aggregation", "routing"), CASES)
def test_outputs_gradients_and_any_split(aggregation, routing, restart, variant):
    args = example(1, 25, variant, 24 if variant == "decay" else 16)
    options = choice(aggregation, routing, segment_length=7, restart=restart)

    def output(**tensors):
        return memory_caching(**tensors, **options)[0]

    assert_grads_close(output, args, {}, "triton", bound=2e-5, gradient_bound=2e-4)
    whole, last = memory_caching(**args, **options, output_final_state=True, implementation="reference")
    state, parts = None, []
    for piece in zip(*(t.split([1, 12, 1, 11], dim=1) for t in args.values())):
        with torch.no_grad():
            y, state = memory_caching(
                **dict(zip(args, piece)), **options, initial_state=state, output_final_state=True, implementation="triton"
            )
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, 5e-5)
    assert_same_state(state, last)


@pytest.mark.parametrize(("aggregation", "routing"), [("gated", "submax"), ("sparse", "energy"), ("average", "mean")])
def test_packed_twice_over(aggregation, routing):
    """Sequences of different lengths, some empty, then more of each: caches of different sizes in one state."""
    cu_seqlens, _ = packed_example([0, 13, 1, 30, 4])
    options = choice(aggregation, routing, segment_length=6, output_final_state=True, cu_seqlens=cu_seqlens)
    args = example(1, 48)
    state = expected_state = None
    for part in (args, {name: t.flip(1) for name, t in args.items()}):
        y, state = memory_caching(**part, **options, initial_state=state, implementation="triton")
        expected, expected_state = memory_caching(**part, **options, initial_state=expected_state, implementation="reference")
        assert_close(y, expected, 2e-5)
        assert_same_state(state, expected_state)
    other, _ = packed_example([20, 0, 9, 2, 17])  # now other sequences are without a token
    y, state = memory_caching(**args, **{**options, "cu_seqlens": other}, initial_state=state, implementation="triton")
    expected, expected_state = memory_caching(
        **args, **{**options, "cu_seqlens": other}, initial_state=expected_state, implementation="reference"
    )
    assert_close(y, expected, 5e-5)
    assert_same_state(state, expected_state, 1e-4)


@pytest.mark.parametrize("aggregation", ["gated", "sparse"])
def test_energies_in_the_memory_s_own_sweep(aggregation):
    """Queries that are the connectors, keys that are pooled as they are: one sweep holds both matrices."""
    cu_seqlens, _ = packed_example([0, 13, 1, 30, 4])
    args = {name: t for name, t in example(1, 48, "plain").items() if name != "u"}
    options = choice(aggregation, "energy", segment_length=6, output_final_state=True, cu_seqlens=cu_seqlens)

    def run(implementation, initial_state=None, **tensors):
        return memory_caching(**tensors, u=tensors["q"], **options, initial_state=initial_state, implementation=implementation)

    assert_grads_close(lambda **kw: run(**kw)[0], args, {}, "triton", bound=2e-5, gradient_bound=2e-4)
    states = [run(form, **args)[1] for form in ("triton", "reference")]
    assert_same_state(*states)
    again = [
        run(form, state, **{name: t.flip(1) for name, t in args.items()})[0] for form, state in zip(("triton", "reference"), states)
    ]
    assert_close(*again, 2e-5)


@pytest.mark.parametrize(("aggregation", "routing"), [("gated", "mean"), ("sparse", "energy")])
def test_a_capped_cache(aggregation, routing):
    args = example(2, 25)
    options = choice(aggregation, routing, segment_length=4, output_final_state=True, max_segments=3)
    expected, expected_state = memory_caching(**args, **options, implementation="reference")
    y, state = memory_caching(**args, **options, implementation="triton")
    assert_close(y, expected, 2e-5)
    assert_same_state(state, expected_state)
    state, parts = None, []
    with torch.no_grad():
        for t in range(25):
            token = {name: x[:, t : t + 1] for name, x in args.items()}
            y, state = memory_caching(**token, **options, initial_state=state, implementation="triton")
            parts.append(y)
    assert_close(torch.cat(parts, 1), expected, 5e-5)
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("routing", ["mean", "submax", "energy"])
def test_logarithmic_segments(routing):
    args = example(2, 37)
    options = choice("gated", routing, segment_length="log")
    y, _ = memory_caching(**args, **options, implementation="triton")
    assert_close(y, memory_caching(**args, **options, implementation="reference")[0], 2e-5)


@pytest.mark.parametrize(("aggregation", "routing"), [("gated", "submax"), ("sparse", "energy")])
def test_one_graph_meta_tensors_and_training_after_inference(aggregation, routing):
    args = example(1, 25)
    options = choice(aggregation, routing, segment_length=7, output_final_state=True, implementation="triton")

    def loss(**tensors):
        y, state = memory_caching(**tensors, **options)
        return y.sum() + state.memory.sum()

    y, state = memory_caching(**{name: t.to("meta") for name, t in args.items()}, **options)
    assert y.shape == args["v"].shape and y.device.type == "meta" and state.cached[0].shape == (1, 3, 1, 16, 24)
    with torch.inference_mode():
        loss(**args)  # plans are kept for later calls, which may need gradients
    tensors = {name: t.clone().requires_grad_() for name, t in args.items()}
    expected = torch.autograd.grad(loss(**tensors), list(tensors.values()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, e in zip(torch.autograd.grad(compiled(**tensors), list(tensors.values())), expected):
        assert_close(actual, e)


@pytest.mark.gpu
@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize(("aggregation", "routing"), CASES)
def test_gpu_bfloat16(aggregation, routing, restart):
    length, heads, dim = 3000, 4, 128
    k = F.normalize(torch.randn(2, length, heads, dim), dim=-1)
    args = {"q": torch.randn_like(k), "k": k, "v": torch.randn_like(k), "u": 3 * torch.randn_like(k)}
    args = {name: t.cuda().bfloat16() for name, t in args.items()}
    options = choice(aggregation, routing, segment_length=256, restart=restart)
    if aggregation == "sparse":
        options["top_k"] = 16  # all: which of two nearly equal scores is higher depends on rounding
    assert_grads_close(
        lambda implementation, **t: memory_caching(**t, **options, implementation=implementation)[0],
        args, {}, "triton", "chunked", bound=3e-2, gradient_bound=6e-2,
    )  # fmt: skip
