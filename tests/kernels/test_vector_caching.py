"""vector_caching: its forms against each other and the paper's sum, the properties of every operator, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given
from hypothesis import strategies as st

from memzoo.kernels import MemoryCachingState, vector_caching

FORMS = ["reference", "chunked"]
READS = [("residual", "mean"), ("average", "mean"), *itertools.product(["gated", "soup", "sparse"], ["mean", "energy", "submax"])]


def example(batch=1, length=11, heads=2, dim=24, size=16, dtype=torch.float64):
    return {
        "h": torch.randn(batch, length, heads, dim, dtype=dtype),
        "keys": F.normalize(torch.randn(batch, length, heads, size, dtype=dtype), dim=-1),
        "u": 2 * torch.randn(batch, length, heads, size, dtype=dtype),
    }


def options(aggregation, routing="mean", segment_length=4, **others):
    return {
        "aggregation": aggregation, "routing": routing, "segment_length": segment_length,
        "top_k": 1 if aggregation == "sparse" else None, **others,
    }  # fmt: skip


def parts(state):
    """A state's tensors, and its numbers as tensors [N], so that states compare like outputs."""
    if state is None:
        return []
    count = len(state.cached[0])
    numbers = [torch.as_tensor(x).double().expand(count) for x in (state.position, state.count)]
    return [t for t in (state.memory, *state.cached, state.pooled, state.descriptors) if t is not None] + numbers


def run(h, keys, u, implementation=None, sizes=None, **arguments):
    """(outputs, the final state's parts) of a call, or, but for the definition, of calls with `sizes` tokens one after the other."""
    keep = arguments["segment_length"] != "log"
    if sizes is None or implementation == "reference" or not keep:
        sizes = [h.shape[1]]
    outputs, state = [], None
    for piece in zip(*(t.split(sizes, 1) for t in (h, keys, u))):
        y, state = vector_caching(*piece, **arguments, initial_state=state, output_final_state=keep, implementation=implementation)
        outputs.append(y)
    return torch.cat(outputs, 1), parts(state)


@pytest.mark.parametrize(("aggregation", "routing"), READS)
def test_forms_agree_with_the_definition(aggregation, routing):
    """Outputs, final states and all gradients, in one call or two, whose second one's gradients go through the state between them."""
    for i, segment_length in enumerate([1, 4, 5, 11, 20, "log"]):
        choice = options(aggregation, routing, segment_length, sizes=[(3, 8), (4, 7), (11,)][i % 3])
        assert_grads_close(run, example(), choice, "chunked")


@given(
    batch=st.integers(1, 2), length=st.integers(1, 24), heads=st.integers(1, 2), dim=st.sampled_from([1, 16, 40]),
    size=st.sampled_from([16, 24]), read=st.sampled_from(READS), segment_length=st.integers(1, 12), first=st.integers(0, 24),
)  # fmt: skip
def test_forms_agree_at_many_shapes(batch, length, heads, dim, size, read, segment_length, first):
    sizes = [first, length - first] if 0 < first < length else None
    assert_grads_close(run, example(batch, length, heads, dim, size), options(*read, segment_length, sizes=sizes), "chunked")


@pytest.mark.parametrize("aggregation", ["residual", "average", "gated", "soup", "sparse"])
@pytest.mark.parametrize("implementation", FORMS)
def test_equations_of_the_paper(implementation, aggregation):
    """y_t = sum_i g_i h^(i) over the last states of the segments before and the state itself, and Eq. 8 to 17's gates."""
    for segment_length, sizes in ((5, [5, 5, 5]), ("log", [8, 4, 1])):
        arguments = example(1, 13, 1)
        y, _ = vector_caching(**arguments, **options(aggregation, "mean", segment_length), implementation=implementation)
        h, keys, u = (t[0, :, 0] for t in arguments.values())
        starts = [0, *itertools.accumulate(sizes)]
        for t in range(13):
            s = max(i for i, start in enumerate(starts) if start <= t)
            spans = [(a, b) for a, b in itertools.pairwise(starts[: s + 1])] + [(starts[s], t + 1)]
            scores = torch.stack([u[t] @ keys[a:b].mean(0) for a, b in spans])
            if aggregation == "sparse" and s > 1:
                best = int(scores[:-1].argmax())
                spans, scores = [spans[best], spans[-1]], scores[[best, -1]]
            gates = scores.softmax(0)
            if aggregation in ("residual", "average"):
                gates = torch.ones_like(gates) / (len(gates) if aggregation == "average" else 1)
            assert_close(y[0, t, 0], sum(g * h[b - 1] for g, (_, b) in zip(gates, spans)))


@pytest.mark.parametrize("implementation", FORMS)
def test_identities(implementation):
    """A soup is gated, sparse reads of all are gated, one segment is h itself, and a segment a token softmax attention over h."""
    arguments = example(2, 9)
    gated, soup, sparse = (
        vector_caching(**arguments, **{**options(a), "top_k": 2 if a == "sparse" else None}, implementation=implementation)[0]
        for a in ("gated", "soup", "sparse")
    )
    assert_close(soup, gated)
    assert_close(sparse, gated)
    for aggregation, routing in READS:
        y, _ = vector_caching(**arguments, **options(aggregation, routing, 10), implementation=implementation)
        assert_close(y, arguments["h"])
    y, _ = vector_caching(**arguments, **options("gated", "mean", 1), implementation=implementation)
    u, keys, h = (arguments[name].transpose(1, 2) for name in ("u", "keys", "h"))
    assert_close(y, F.scaled_dot_product_attention(u, keys, h, is_causal=True, scale=1.0).transpose(1, 2))


@pytest.mark.parametrize(("aggregation", "routing"), READS)
@pytest.mark.parametrize("implementation", FORMS)
def test_causal_batch_independent_and_repeatable(implementation, aggregation, routing):
    """Bit for bit; tokens 13 on of the first sequence change."""
    arguments = example(2, 22, 1)
    arguments["u"] *= 3  # gates that are nearly 0 and 1
    choice = options(aggregation, routing, 5, implementation=implementation)
    before, _ = run(**arguments, **choice)
    again, _ = run(**arguments, **choice)
    assert torch.equal(before, again)
    changed = {name: t.clone() for name, t in arguments.items()}
    for t in changed.values():
        t[0, 13:] *= 1.5
    after, _ = run(**changed, **choice)
    assert torch.equal(before[0, :13], after[0, :13])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 13:], after[0, 13:])


@pytest.mark.parametrize(("aggregation", "routing"), READS)
@pytest.mark.parametrize("implementation", FORMS)
def test_any_split_equals_one_pass(implementation, aggregation, routing):
    arguments = example(2, 14, 1)
    choice = options(aggregation, routing, 4, output_final_state=True, implementation=implementation)
    whole, last = vector_caching(**arguments, **choice)
    for sizes in ([1] * 14, [6, 1, 7]):
        state, outputs = None, []
        for piece in zip(*(t.split(sizes, 1) for t in arguments.values())):
            y, state = vector_caching(*piece, **choice, initial_state=state)
            outputs.append(y)
        assert_close(torch.cat(outputs, 1), whole)
        for part, expected in zip(parts(state), parts(last)):
            assert_close(part, expected)


@pytest.mark.parametrize("segment_length", [4, "log"])
@pytest.mark.parametrize(("aggregation", "routing"), READS)
@pytest.mark.parametrize("implementation", FORMS)
def test_packed_equals_separate(implementation, aggregation, routing, segment_length):
    """And what follows on the packed sequences' states, whose positions and counts differ."""
    cu_seqlens, lengths = packed_example([0, 6, 1, 8, 0, 3])
    arguments, following = example(1, sum(lengths), 1), example(len(lengths), 3, 1)
    keep = segment_length != "log"
    choice = options(aggregation, routing, segment_length, output_final_state=keep, implementation=implementation)
    y, state = vector_caching(**arguments, **choice, cu_seqlens=cu_seqlens)
    if keep:
        assert state.position.tolist() == [0, 2, 1, 0, 0, 3] and state.count.tolist() == [0, 1, 0, 2, 0, 0]
        later, _ = vector_caching(**following, **choice, initial_state=state)
    for n, length in enumerate(lengths):
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        alone = {name: t[:, rows] for name, t in arguments.items()}
        if length:
            assert_close(y[:, rows], vector_caching(**alone, **{**choice, "implementation": "reference"})[0])
        if keep:
            alone = {name: torch.cat((t, following[name][n : n + 1]), 1) for name, t in alone.items()}
            expected, _ = vector_caching(**alone, **{**choice, "implementation": "reference"})
            assert_close(later[n : n + 1], expected[:, length:])


def test_packed_gradients():
    cu_seqlens, lengths = packed_example([6, 0, 1, 13, 2])
    for aggregation, routing in READS:
        assert_grads_close(run, example(1, sum(lengths), 1), options(aggregation, routing, cu_seqlens=cu_seqlens), "chunked")


@pytest.mark.parametrize("routing", ["mean", "energy", "submax"])
def test_at_most_max_segments_are_kept(routing):
    for limit, segment_length in ((1, 3), (2, 2)):
        arguments, choice = example(1, 11), options("gated", routing, segment_length, max_segments=limit)
        assert_grads_close(run, arguments, choice, "chunked")
        whole, last = run(**arguments, **choice, implementation="reference")
        y, state = run(**arguments, **choice, sizes=[1] * 11, implementation="chunked")
        for actual, expected in zip((y, *state), (whole, *last)):
            assert_close(actual, expected)


@pytest.mark.parametrize(("aggregation", "routing"), [("residual", "mean"), ("gated", "energy"), ("sparse", "submax")])
def test_finite_for_long_input(aggregation, routing):
    y, state = vector_caching(
        **example(1, 65_536, 1, 16, 16, torch.float32), **options(aggregation, routing, 1024), output_final_state=True
    )
    assert all(torch.isfinite(t).all() for t in (y, *parts(state)))


@pytest.mark.parametrize(
    ("aggregation", "routing"), [("residual", "mean"), ("gated", "mean"), ("soup", "energy"), ("sparse", "submax")]
)
def test_gradcheck_of_the_definition(aggregation, routing):
    tensors = [t.requires_grad_() for t in example(1, 5, 1).values()]
    if aggregation == "residual":
        tensors = tensors[:1]

    def output(h, keys=None, u=None):
        return vector_caching(h, keys, u, **options(aggregation, routing, 2), implementation="reference")[0]

    assert torch.autograd.gradcheck(output, tensors, fast_mode=True)


def test_compiles_to_one_graph_and_takes_meta_tensors():
    choice = options("gated", "submax", output_final_state=True)

    def loss(*tensors):
        y, state = vector_caching(*tensors, **choice, implementation="chunked")
        return y.square().sum() + sum(t.sum() for t in state.cached)

    tensors = [t.requires_grad_() for t in example(1, 11, 1, dtype=torch.float32).values()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = (torch.autograd.grad(f(*tensors), tensors) for f in (loss, compiled))
    for a, e in zip(actual, expected):
        assert_close(a, e)
    y, state = vector_caching(*(t.detach().to("meta") for t in tensors), **choice, implementation="chunked")
    assert y.device.type == "meta" and y.shape == tensors[0].shape and state.cached[0].shape == (1, 2, 1, 24)


@pytest.mark.parametrize("implementation", FORMS)
def test_half_precision(implementation):
    half = {name: t.bfloat16() for name, t in example().items()}
    y, state = vector_caching(**half, **options("gated"), output_final_state=True, implementation=implementation)
    expected, _ = vector_caching(**{name: t.double() for name, t in half.items()}, **options("gated"), implementation="reference")
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in parts(state)[:-2])
    assert_close(y, expected, bound=2e-2)


ZERO = {"h": torch.zeros(2, 3, 1, 24), "keys": torch.zeros(2, 3, 1, 16), "u": torch.zeros(2, 3, 1, 16), "segment_length": 4}
HELD = MemoryCachingState(
    torch.zeros(2, 1, 24), (torch.zeros(2, 5, 1, 24),), torch.zeros(2, 1, 1, 16), torch.zeros(2, 5, 1, 16), 3, 5
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(2, 3, 16)}, "h has shape [2, 3, 16], needs 4 dimensions [B, T, H, D]"),
        ({"h": torch.zeros(2, 0, 1, 24)}, "B and T must both be at least 1"),
        ({"h": ZERO["h"].long()}, "h has dtype torch.int64, needs one of float32"),
        ({"keys": ZERO["keys"].half()}, "keys has dtype torch.float16, h has torch.float32"),
        ({"keys": torch.zeros(2, 3, 1, 24)}, "keys has shape [2, 3, 1, 24], needs [B, T, H, R] as u = [2, 3, 1, 16]"),
        ({"keys": None}, "keys must be a torch.Tensor, got NoneType"),
        ({"u": None}, "u is None, needs connectors [B, T, H, R] with aggregation 'gated'"),
        ({"segment_length": -1}, "segment_length is -1, needs an integer of at least 1, or 'log'"),
        ({"aggregation": "sparse", "top_k": 0}, "top_k is 0, needs an integer from 1 to 16"),
        ({"routing": "sum"}, "routing is 'sum', needs one of mean, energy, submax"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
        ({"initial_state": HELD[:3]}, "initial_state must be a MemoryCachingState, got tuple"),
        ({"initial_state": HELD._replace(memory=torch.zeros(2, 1, 16))}, "initial_state.memory has shape [2, 1, 16]"),
        ({"initial_state": HELD._replace(count=6)}, "initial_state.count is 6, needs 0 to 5, the memories in cached"),
        ({"implementation": "triton"}, "implementation 'triton' does not exist, a vector's reads are products; use 'chunked'"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    with pytest.raises((ValueError, TypeError)) as error:
        vector_caching(**{**ZERO, **change})
    assert message in str(error.value)
    assert str(error.value).startswith("vector_caching: ") and "\n" not in str(error.value)
