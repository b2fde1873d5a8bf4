"""Memory caching's decode step: scores and reads against loops over sequences, heads and slots."""

import importlib

import pytest
import torch
from checks import BOUND, assert_close
from hypothesis import given
from hypothesis import strategies as st

ROUTINGS = ("mean", "submax", "energy")


@pytest.fixture(scope="module")
def step():
    return importlib.import_module("memzoo.kernels.memory_caching.step")


def scores_definition(u, descriptors, count, routing):
    sequences, slots, heads = descriptors.shape[:3]
    out = torch.full((sequences, heads, slots), -torch.inf, dtype=torch.float64)
    for n in range(sequences):
        for h in range(heads):
            for s in range(int(count[n])):
                query, d = u[n, h].double(), descriptors[n, s, h].double()
                out[n, h, s] = query @ d @ query if routing == "energy" else (d @ query).max()
    return out


def read_definition(q, weights, ids, bank, online, online_weight):
    y = online_weight.double()[..., None] * online.double()
    for n, h, j in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        if ids[n, h, j] >= 0:
            y[n, h] += weights[n, h, j].double() * (q[n, h].double() @ bank[n, ids[n, h, j], h].double())
    return y


def scores_example(sequences=3, slots=9, heads=2, size=24, routing="mean", blocks=4, dtype=torch.float32):
    inner = {"mean": (), "submax": (blocks,), "energy": (size,)}[routing]
    u = torch.randn(sequences, heads, size).to(dtype)
    count = torch.arange(sequences) * slots // max(sequences - 1, 1)
    return u, torch.randn(sequences, slots, heads, *inner, size), count


def read_example(sequences=3, slots=9, heads=2, rows=24, columns=40, choices=5, dtype=torch.float32):
    q, online = torch.randn(sequences, heads, rows).to(dtype), torch.randn(sequences, heads, columns).to(dtype)
    weights, online_weight = torch.rand(sequences, heads, choices), torch.rand(sequences, heads)
    ids = torch.randint(-1, slots, (sequences, heads, choices))
    return q, weights, ids, torch.randn(sequences, slots, heads, rows, columns), online, online_weight


def assert_scores(step, u, descriptors, count, routing):
    out, expected = step.step_scores(u, descriptors, count, routing), scores_definition(u, descriptors, count, routing)
    assert out.dtype == torch.float32 and torch.equal(out == -torch.inf, expected == -torch.inf)
    cached = torch.isfinite(expected)
    assert_close(out[cached], expected[cached])


@pytest.mark.parametrize("routing", ROUTINGS)
@given(
    sequences=st.integers(1, 3), slots=st.integers(1, 70), heads=st.integers(1, 3), size=st.sampled_from([16, 40, 136]),
    blocks=st.sampled_from([1, 2, 16]),
)  # fmt: skip
def test_scores(step, routing, sequences, slots, heads, size, blocks):
    slots = min(slots, 5) if routing == "energy" else slots
    u, descriptors, count = scores_example(sequences, slots, heads, size, routing, blocks)
    assert_scores(step, u, descriptors, count, routing)
    assert_scores(step, u.bfloat16(), descriptors, count, routing)  # exact products of the rounded query


@given(
    sequences=st.integers(1, 3), slots=st.integers(1, 9), heads=st.integers(1, 3), rows=st.sampled_from([16, 40, 136]),
    columns=st.sampled_from([16, 24, 136]), choices=st.integers(0, 9),
)  # fmt: skip
def test_read(step, sequences, slots, heads, rows, columns, choices):
    args = read_example(sequences, slots, heads, rows, columns, choices)
    y = step.step_read(*args)
    assert_close(y, read_definition(*args))
    assert torch.equal(y, step.step_read(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_read_in_half_precision(step, dtype):
    args = read_example(dtype=dtype)
    y = step.step_read(*args)
    assert y.dtype == dtype
    assert_close(y, read_definition(*args), BOUND[dtype])


def test_only_chosen_and_cached_states_are_read(step):
    """Whatever else the slots hold, be it NaN, and whatever weight an id of -1 has."""
    q, weights, ids, bank, online, online_weight = read_example(choices=3)
    expected = read_definition(q, weights, ids, bank, online, online_weight)
    weights = torch.where(ids < 0, torch.nan, weights)
    for n, s, h in torch.cartesian_prod(*map(torch.arange, bank.shape[:3])).tolist():
        if s not in ids[n, h].tolist():
            bank[n, s, h] = torch.nan
    assert_close(step.step_read(q, weights, ids, bank, online, online_weight), expected)
    for routing in ROUTINGS:
        u, descriptors, count = scores_example(routing=routing)
        before = step.step_scores(u, descriptors, count, routing)
        for n in range(3):
            descriptors[n, count[n] :] = torch.nan
        assert torch.equal(step.step_scores(u, descriptors, count, routing), before)


def test_no_slots(step):
    u, descriptors, count = scores_example(slots=0)
    assert step.step_scores(u, descriptors, count, "mean").shape == (3, 2, 0)


def test_registered_operators_pass_torchs_checks_and_take_meta_tensors(step):
    kinds = ("test_schema", "test_faketensor")
    for routing in ROUTINGS:
        args = scores_example(routing=routing)
        torch.library.opcheck(step._scores, (*args, routing), test_utils=kinds)
        meta = step.step_scores(*(t.to("meta") for t in args), routing)
        assert meta.shape == (3, 2, 9) and meta.dtype == torch.float32
    args = read_example()
    torch.library.opcheck(step._read, args, test_utils=kinds)
    meta = step.step_read(*(t.to("meta") for t in args))
    assert meta.shape == (3, 2, 40) and meta.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("step_scores", {"u": torch.zeros(3, 24)}, "u has shape [3, 24], needs 3 dimensions [N, H, R]"),
        ("step_scores", {"routing": "max"}, "routing is 'max', needs one of mean, submax, energy"),
        ("step_scores", {"routing": "energy"}, "descriptors has shape [3, 9, 2, 24], needs 5 dimensions [N, S, H, R, R]"),
        ("step_scores", {"descriptors": torch.zeros(3, 9, 1, 24)}, "needs [N, S, H, R] = [3, 9, 2, 24]"),
        ("step_scores", {"count": torch.zeros(2)}, "count has shape [2], needs [N] = [3]"),
        ("step_read", {"bank": torch.zeros(3, 9, 2, 16, 40)}, "needs [N, S, H, Dk, Dv] = [3, 9, 2, 24, 40]"),
        ("step_read", {"weights": torch.zeros(3, 2, 4)}, "weights has shape [3, 2, 4], needs [N, H, K] = [3, 2, 5]"),
        ("step_read", {"ids": torch.zeros(3, 1, 5)}, "ids has shape [3, 1, 5], needs [N, H, K] = [3, 2, 5]"),
        ("step_read", {"online": torch.zeros(3, 2, 24)}, "online has shape [3, 2, 24], needs [N, H, Dv] = [3, 2, 40]"),
        ("step_read", {"online_weight": torch.zeros(3)}, "online_weight has shape [3], needs [N, H] = [3, 2]"),
    ],
)
def test_bad_input_is_one_clear_line(step, name, change, message):
    scores = dict(zip(("u", "descriptors", "count"), scores_example()), routing="mean")
    read = dict(zip(("q", "weights", "ids", "bank", "online", "online_weight"), read_example()))
    with pytest.raises(ValueError) as error:
        getattr(step, name)(**{**(scores if name == "step_scores" else read), **change})
    assert message in str(error.value)
    assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)


@pytest.mark.gpu
def test_gpu_in_a_cuda_graph_at_real_size(step):
    """Captured once, replayed on new values."""
    for size in (64, 128, 256):
        args = [t.cuda() for t in read_example(4, 64, 16, size, size, 4, torch.bfloat16)]
        graph = torch.cuda.CUDAGraph()
        step.step_read(*args)
        with torch.cuda.graph(graph):
            y = step.step_read(*args)
        args[0].normal_()
        args[2].fill_(63)
        graph.replay()
        expected = read_definition(*(t.cpu() for t in args))
        assert_close(y.cpu(), expected, BOUND[torch.bfloat16])
        for routing in ROUTINGS:
            u, descriptors, count = (t.cuda() for t in scores_example(4, 20, 4, size, routing))
            out = step.step_scores(u, descriptors, count, routing)
            expected = scores_definition(u.cpu(), descriptors.cpu(), count.cpu(), routing)
            cached = torch.isfinite(expected)
            assert torch.equal(torch.isfinite(out.cpu()), cached)
            assert_close(out.cpu()[cached], expected[cached])
