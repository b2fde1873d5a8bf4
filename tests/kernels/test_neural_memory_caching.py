"""neural_memory_caching: its forms against each other and the paper's equations, identities, what every operator keeps to, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given
from hypothesis import strategies as st

from memzoo.kernels import MemoryCachingState, NeuralMemoryState, neural_memory, neural_memory_caching

AGGREGATIONS = ["residual", "average", "gated", "soup", "sparse"]
ROUTINGS = ["mean", "energy", "submax"]
FORMS = ["reference", "chunked"]
TOKENS = ("q", "k", "v", "u", "routing_keys", "lr", "momentum", "decay")
PARTS = NeuralMemoryState._fields[:3]


def example(batch=1, length=11, heads=2, dim=16, depth=2, hidden=24, size=None, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Arguments of T tokens and `weights.i`; with `size` descriptors pool routing keys of their own, of that many dimensions."""
    shape = (batch, length, heads)
    tensors = {
        "q": F.normalize(torch.randn(*shape, dim), dim=-1),
        "k": F.normalize(torch.randn(*shape, dim), dim=-1),
        "v": torch.randn(*shape, dim),
        "u": 2 * torch.randn(*shape, size or dim),
        "lr": 0.5 * torch.rand(shape),
        "momentum": torch.rand(shape),
        "decay": 0.3 * torch.rand(shape),
    }
    if size:
        tensors["routing_keys"] = F.normalize(torch.randn(*shape, size), dim=-1)
    sizes = [dim, *[hidden] * (depth - 1), dim]
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        tensors[f"weights.{i}"] = torch.randn(heads, a, b) * a**-0.5
    return {name: t.to(dtype) for name, t in tensors.items()}


def options(aggregation, routing="mean", segment_length=4, chunk_size=3, **others):
    return {
        "aggregation": aggregation, "routing": routing, "segment_length": segment_length, "chunk_size": chunk_size,
        "top_k": 1 if aggregation == "sparse" else None, **others,
    }  # fmt: skip


def call(**given):
    """neural_memory_caching with tensors named as `example` names them, and those of `start` as `start.weights.i` and so on."""
    depth = sum(name.startswith("weights.") for name in given)
    weights = tuple(given.pop(f"weights.{i}") for i in range(depth))
    if "start.weights.0" in given:
        held = [tuple(given.pop(f"start.{part}.{i}") for i in range(depth)) for part in PARTS]
        given["start"] = NeuralMemoryState(*held, torch.tensor([given.pop("start_position", 0)]))
    return neural_memory_caching(**{"u": None, **given}, weights=weights)


def parts(state):
    """A state's tensors, and its numbers as tensors [N], so that states compare like outputs."""
    if state is None:
        return []
    count = len(state.cached[0])
    numbers = [torch.as_tensor(x).double().expand(count) for x in (state.position, state.count)]
    tensors = [*itertools.chain(*state.memory[:3]), *state.cached, state.pooled, state.descriptors]
    return [t for t in tensors if t is not None] + [*numbers, state.memory.position.double()]


def run(implementation=None, sizes=None, **arguments):
    """(outputs, the final state's parts) of a call, or of calls with `sizes` tokens one after the other.

    The definition always makes one call."""
    tokens = {name: arguments.pop(name) for name in TOKENS if name in arguments}
    keep = arguments["segment_length"] != "log"
    if sizes is None or implementation == "reference" or not keep:
        sizes = [tokens["v"].shape[1]]
    outputs, state = [], arguments.pop("initial_state", None)
    for piece in zip(*(t.split(sizes, 1) for t in tokens.values())):
        y, state = call(
            **dict(zip(tokens, piece)), **arguments, initial_state=state, output_final_state=keep, implementation=implementation
        )
        outputs.append(y)
    return torch.cat(outputs, 1), parts(state)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_forms_agree_with_the_definition(aggregation, restart, depth):
    """Outputs, final states and all gradients, in one call or two, whose second one's gradients go through the state between them."""
    for i, segment_length in enumerate([1, 4, 5, 11, 20, "log"]):
        choice = options(
            aggregation, ROUTINGS[i % 3], segment_length, restart=restart, sizes=[(3, 8), (4, 7), (11,)][i % 3],
            loss=["l2", "dot"][i % 2], max_grad_norm=[None, 1.0][i // 2 % 2],
        )  # fmt: skip
        assert_grads_close(run, example(depth=depth), choice, "chunked")


@given(
    batch=st.integers(1, 2), length=st.integers(1, 14), heads=st.integers(1, 2), dim=st.sampled_from([16, 24]),
    depth=st.integers(1, 3), hidden=st.sampled_from([16, 40]), size=st.sampled_from([None, 16, 32]),
    aggregation=st.sampled_from(AGGREGATIONS), routing=st.sampled_from(ROUTINGS), segment_length=st.integers(1, 9),
    chunk_size=st.integers(1, 6), restart=st.booleans(), residual=st.booleans(), first=st.integers(0, 14),
)  # fmt: skip
def test_forms_agree_at_many_shapes(
    batch, length, heads, dim, depth, hidden, size, aggregation, routing, segment_length, chunk_size, restart, residual, first
):
    sizes = [first, length - first] if 0 < first < length else None
    choice = options(aggregation, routing, segment_length, chunk_size, restart=restart, residual=residual, sizes=sizes)
    assert_grads_close(run, example(batch, length, heads, dim, depth, hidden, size), choice, "chunked")


@pytest.mark.parametrize(
    ("aggregation", "depth", "segment_length", "restart"),
    [("residual", 1, "log", True), ("gated", 1, 20, False), ("gated", 2, 16, True), ("sparse", 2, 8, True)],
)
def test_triton(aggregation, depth, segment_length, restart):
    arguments = example(1, 21, 1, depth=depth, hidden=16, dtype=torch.float32)
    choice = options(aggregation, "mean", segment_length, 16, restart=restart, max_grad_norm=1.0)
    assert_grads_close(run, arguments, choice, "triton", "chunked", bound=1e-4, gradient_bound=1e-3)


class Network:
    """An MLP of one head with GELU and its optimiser, for tokens [D]."""

    def __init__(self, weights, residual):
        self.weights, self.residual = list(weights), residual
        self.velocity = [torch.zeros_like(w) for w in weights]

    def copy(self):
        other = Network(self.weights, self.residual)
        other.velocity = list(self.velocity)
        return other

    def read(self, x, weights=None):
        y = x
        for i, w in enumerate(self.weights if weights is None else weights):
            y = torch.nn.functional.gelu(y) @ w if i else y @ w
        return y + x if self.residual else y

    def write(self, k, v, lr, momentum, decay, loss, limit, frozen):
        """One step with the gradient that torch takes of the loss as the paper states it, at the weights `frozen`."""
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in frozen]
            read = self.read(k, leaves)
            value = -(read @ v) if loss == "dot" else ((read - v) ** 2).sum() / 2
            gradient = torch.autograd.grad(value, leaves)
        norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
        step = lr if limit is None or norm <= limit else lr * limit / norm
        self.velocity = [momentum * s - step * g for s, g in zip(self.velocity, gradient)]
        self.weights = [(1 - decay) * w + s for w, s in zip(self.weights, self.velocity)]


def paper(tokens, weights, sizes, chunk_size, aggregation, top_k, restart, residual, loss, limit):
    """Eq. 4 to 17 and 30 to 36 and Sec. 4.3 for one head and mean descriptors; tokens [T, ...]."""
    q, k, v, u, lr, momentum, decay = (tokens[name] for name in ("q", "k", "v", "u", "lr", "momentum", "decay"))
    network, cached, outputs, t = Network(weights, residual), [], [], 0
    for size in sizes:
        if restart:
            network = Network(weights, residual)
        keys = []
        for place in range(min(size, len(q) - t)):
            if place % chunk_size == 0:
                frozen = list(network.weights)
            network.write(k[t], v[t], lr[t], momentum[t], decay[t], loss, limit, frozen)
            keys.append(k[t])
            memories = [*cached, (network, keys)]
            scores = torch.stack([u[t] @ torch.stack(members).mean(0) for _, members in memories])
            if top_k is not None and len(cached) > top_k:
                chosen = [*sorted(scores[:-1].argsort(descending=True)[:top_k].tolist()), len(cached)]
                memories, scores = [memories[i] for i in chosen], scores[chosen]
            gates = scores.softmax(0)
            if aggregation == "average":
                gates = torch.full_like(gates, 1 / len(gates))
            if aggregation in ("soup", "average"):
                mixed = [sum(g * m.weights[i] for g, (m, _) in zip(gates, memories)) for i in range(len(weights))]
                outputs.append(network.read(q[t], mixed))
            else:
                reads = torch.stack([m.read(q[t]) for m, _ in memories])
                outputs.append(reads.sum(0) if aggregation == "residual" else gates @ reads)
            t += 1
        cached.append((network.copy(), keys))
    return torch.stack(outputs)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("implementation", FORMS)
def test_equations_of_the_paper(implementation, aggregation, depth):
    for restart, residual, loss, (segment_length, sizes) in [
        (True, False, "l2", (5, [5, 5, 5])), (False, True, "l2", (5, [5, 5, 5])), (True, True, "dot", ("log", [8, 4, 1])),
    ]:  # fmt: skip
        arguments = example(1, 13, 1, depth=depth)
        limit = 1.0 if residual else None
        choice = options(aggregation, "mean", segment_length, restart=restart, residual=residual, loss=loss, max_grad_norm=limit)
        y, _ = call(**arguments, **choice, implementation=implementation)
        tokens = {name: t[0, :, 0] for name, t in arguments.items() if not name.startswith("weights")}
        weights = [arguments[f"weights.{i}"][0] for i in range(depth)]
        expected = paper(tokens, weights, sizes, 3, aggregation, choice["top_k"], restart, residual, loss, limit)
        assert_close(y[0, :, 0], expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("implementation", FORMS)
def test_one_segment_is_the_base_memory(implementation, aggregation):
    arguments = example(2, 7)
    y, state = call(**arguments, **options(aggregation, segment_length=8), output_final_state=True, implementation=implementation)
    tokens = [arguments[name] for name in ("q", "k", "v", "lr", "momentum", "decay")]
    weights = (arguments["weights.0"], arguments["weights.1"])
    expected, last = neural_memory(*tokens, weights, chunk_size=3, output_final_state=True, implementation="reference")
    assert_close(y, expected)
    for actual, wanted in zip(itertools.chain(*state.memory[:3]), itertools.chain(*last[:3])):
        assert_close(actual, wanted)
    assert state.count == 0 and state.position == 7 and torch.equal(state.memory.position, last.position)


@pytest.mark.parametrize("implementation", FORMS)
def test_identities_of_the_aggregations(implementation):
    """Sparse reads of all are gated ones; a soup is gated for a matrix, and for an MLP it is not."""

    def output(aggregation, depth, top_k=None):
        torch.manual_seed(1)
        arguments = example(2, depth=depth)
        return call(**arguments, **{**options(aggregation), "top_k": top_k}, implementation=implementation)[0]

    assert_close(output("sparse", 2, top_k=2), output("gated", 2))
    assert_close(output("soup", 1), output("gated", 1))
    difference = (output("soup", 2) - output("gated", 2)).abs().amax((0, 2, 3))
    assert difference[:4].max() < 1e-12 and difference[4:].min() > 1e-3  # there is nothing to mix in the first segment


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("implementation", FORMS)
def test_causal_batch_independent_and_repeatable(implementation, aggregation):
    """Bit for bit; tokens 9 on of the first sequence change."""
    arguments = example(2, 15, 1)
    arguments["u"] *= 3  # gates that are nearly 0 and 1
    choice = options(aggregation, segment_length=5, implementation=implementation)
    before, _ = run(**arguments, **choice)
    again, _ = run(**arguments, **choice)
    assert torch.equal(before, again)
    changed = {name: t.clone() for name, t in arguments.items()}
    for name in set(TOKENS) & set(arguments):
        changed[name][0, 9:] *= 0.5
    after, _ = run(**changed, **choice)
    assert torch.equal(before[0, :9], after[0, :9])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 9:], after[0, 9:])


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("implementation", FORMS)
def test_any_split_equals_one_pass(implementation, aggregation, restart):
    arguments = example(2, 14, 1)
    choice = options(aggregation, segment_length=5, restart=restart, output_final_state=True, implementation=implementation)
    whole, last = call(**arguments, **choice)
    for sizes in ([1] * 14, [6, 1, 7]) if implementation == "chunked" else ([1, 6, 7],):
        state, outputs, at = None, [], 0
        for size in sizes:
            piece = {name: t[:, at : at + size] if name in TOKENS else t for name, t in arguments.items()}
            y, state = call(**piece, **choice, initial_state=state)
            outputs.append(y)
            at += size
        assert_close(torch.cat(outputs, 1), whole)
        for part, expected in zip(parts(state), parts(last)):
            assert_close(part, expected)


@pytest.mark.parametrize("segment_length", [4, "log"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("implementation", FORMS)
def test_packed_equals_separate(implementation, aggregation, segment_length):
    """And what follows on the packed sequences' states, whose positions and counts differ."""
    cu_seqlens, lengths = packed_example([0, 6, 1, 8, 3])
    arguments = example(1, sum(lengths), 1)
    keep = segment_length != "log"
    choice = options(aggregation, "submax", segment_length, output_final_state=keep, implementation=implementation)
    y, state = call(**arguments, **choice, cu_seqlens=cu_seqlens)
    following = example(len(lengths), 3, 1) | {name: t for name, t in arguments.items() if name not in TOKENS}
    if keep:
        assert state.position.tolist() == [0, 2, 1, 0, 3] and state.count.tolist() == [0, 1, 0, 2, 0]
        later, last = call(**following, **choice, initial_state=state)
    for n, length in enumerate(lengths):
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        alone = {name: t[:, rows] if name in TOKENS else t for name, t in arguments.items()}
        if length:
            assert_close(y[:, rows], call(**alone, **{**choice, "implementation": "reference"})[0])
        if keep:
            alone = {name: torch.cat((t, following[name][n : n + 1]), 1) if name in TOKENS else t for name, t in alone.items()}
            expected, end = call(**alone, **{**choice, "implementation": "reference"})
            assert_close(later[n : n + 1], expected[:, length:])
            for part, wanted in zip(itertools.chain(*last.memory[:3]), itertools.chain(*end.memory[:3])):
                assert_close(part[n], wanted[0])
            for part, wanted in zip(last.cached, end.cached):
                assert_close(part[n, : wanted.shape[1]], wanted[0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_gradients(aggregation):
    cu_seqlens, lengths = packed_example([6, 0, 1, 9, 2])
    assert_grads_close(run, example(1, sum(lengths), 1), options(aggregation, cu_seqlens=cu_seqlens), "chunked")


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("aggregation", ["residual", "gated", "soup"])
def test_segments_start_from_a_given_state(aggregation, restart):
    """Weights, momentum and an open chunk, with their gradients; the definition's first segment is neural_memory's on that state."""
    arguments = example(2, 11)
    for part, i in itertools.product(PARTS, range(2)):
        weight = arguments[f"weights.{i}"]
        arguments[f"start.{part}.{i}"] = weight[None] + 0.1 * torch.randn(1, *weight.shape).double()
    choice = options(aggregation, restart=restart, start_position=2)
    assert_grads_close(run, arguments, choice, "chunked")
    y, _ = call(**arguments, **choice, implementation="reference")
    held = [tuple(arguments[f"start.{part}.{i}"].expand(2, -1, -1, -1) for i in range(2)) for part in PARTS]
    tokens = [arguments[name][:, :4] for name in ("q", "k", "v", "lr", "momentum", "decay")]
    weights = (arguments["weights.0"], arguments["weights.1"])
    start = NeuralMemoryState(*held, torch.tensor([2, 2]))
    expected, _ = neural_memory(*tokens, weights, chunk_size=3, initial_state=start, implementation="reference")
    assert_close(y[:, :4], expected)


@pytest.mark.parametrize("aggregation", ["gated", "soup", "sparse"])
def test_at_most_max_segments_are_kept(aggregation):
    for limit, segment_length in ((1, 3), (2, 2)):
        arguments, choice = example(1, 9), options(aggregation, "submax", segment_length, max_segments=limit)
        assert_grads_close(run, arguments, choice, "chunked")
        whole, last = run(**arguments, **choice, implementation="reference")
        y, state = run(**arguments, **choice, sizes=[1] * 9, implementation="chunked")
        for actual, expected in zip((y, *state), (whole, *last)):
            assert_close(actual, expected)


def test_a_single_token_touches_the_chosen_memories_only():
    """The others may lie anywhere and stay there: here they are NaN."""
    arguments = example(2, 20)
    choice = options("sparse", implementation="chunked", output_final_state=True)
    past, token = ({n: t[:, at] if n in TOKENS else t for n, t in arguments.items()} for at in (slice(19), slice(19, 20)))
    _, state = call(**past, **choice)
    expected, _ = call(**token, **choice, initial_state=state)
    means = arguments["k"][:, :16].unflatten(1, (4, 4)).mean(2)
    chosen = torch.einsum("nhd,nshd->nhs", arguments["u"][:, 19], means).argmax(-1)
    unread = F.one_hot(chosen, 4).transpose(1, 2)[..., None, None] == 0
    cached = tuple(w.masked_fill(unread, torch.nan) for w in state.cached)
    y, _ = call(**token, **choice, initial_state=state._replace(cached=cached))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("aggregation", ["residual", "soup"])
def test_finite_for_long_input(aggregation):
    arguments = example(1, 65_536, 1, hidden=16, dtype=torch.float32)
    with torch.no_grad():
        y, state = call(**arguments, **options(aggregation, "mean", 8192, 64, max_grad_norm=1.0), output_final_state=True)
    assert all(torch.isfinite(t).all() for t in (y, *parts(state)))
    assert y[:, -2048:].abs().max() < 20 * y[:, :2048].abs().max()  # of residual reads there are eight


@pytest.mark.parametrize("aggregation", ["residual", "gated", "soup"])
def test_gradcheck_of_the_definition(aggregation):
    arguments = {name: t.requires_grad_() for name, t in example(1, 5, 1, hidden=16).items()}
    if aggregation == "residual":
        del arguments["u"]

    def outputs(*values):
        given = dict(zip(arguments, values))
        y, state = run(
            **given, **options(aggregation, segment_length=2, chunk_size=2, max_grad_norm=1.0), implementation="reference"
        )
        return (y, *(t for t in state if t.requires_grad))

    assert torch.autograd.gradcheck(outputs, list(arguments.values()), fast_mode=True)


@pytest.mark.parametrize("aggregation", ["gated", "soup"])
def test_compiles_to_one_graph(aggregation):
    arguments = example(1, 5, 1, depth=1, dtype=torch.float32)
    choice = options(aggregation, output_final_state=True, implementation="chunked")

    def loss(**tensors):
        y, state = call(**tensors, **choice)
        return y.square().sum() + sum(t.sum() for t in state.cached)

    tensors = {name: t.requires_grad_() for name, t in arguments.items()}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = (
        torch.autograd.grad(f(**tensors), list(tensors.values()), materialize_grads=True, allow_unused=True)
        for f in (loss, compiled)
    )
    for a, e in zip(actual, expected):
        assert_close(a, e)


@pytest.mark.parametrize("implementation", FORMS)
def test_mixed_types(implementation):
    arguments = example(1, 13, dtype=torch.float32)
    half = {name: t.bfloat16() if name in "qkvu" else t for name, t in arguments.items()}
    y, state = call(**half, **options("soup"), output_final_state=True, implementation=implementation)
    wide = {name: t.double() for name, t in half.items()}
    expected, last = call(**wide, **options("soup"), output_final_state=True, implementation="reference")
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in parts(state)[:-3])
    assert_close(y, expected, bound=2e-2)
    for part, wanted in zip(parts(state), parts(last)):
        assert_close(part, wanted, bound=1e-4)


def zeros(*shape):
    return torch.zeros(shape)


def a_state(heads=1, layers=((16, 24), (24, 16)), slots=5, count=2, **change):
    weights = tuple(zeros(count, heads, *layer) for layer in layers)
    memory = NeuralMemoryState(weights, weights, weights, torch.zeros(count, dtype=torch.int64))
    cached = tuple(zeros(count, slots, heads, *layer) for layer in layers)
    state = MemoryCachingState(memory, cached, zeros(count, heads, 1, 16), zeros(count, slots, heads, 16), 1, slots)
    return state._replace(**change)


ZERO = {
    **{name: zeros(2, 3, 1, 16) for name in "qkvu"}, **{name: zeros(2, 3, 1) for name in ("lr", "momentum", "decay")},
    "weights": (zeros(1, 16, 24), zeros(1, 24, 16)), "chunk_size": 3, "segment_length": 4,
}  # fmt: skip
OTHER = a_state().memory._replace(momentum=())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": zeros(2, 3, 1, 24)}, "k has shape [2, 3, 1, 24], needs [B, T, H, D] = [2, 3, 1, 16]"),
        ({"weights": (zeros(1, 16, 24),)}, "weights[0] has shape [1, 16, 24], needs [H, Din, Dout] = [1, 16, 16]"),
        ({"chunk_size": 0}, "chunk_size is 0, needs an integer of at least 1"),
        ({"loss": "mse"}, "loss is 'mse', needs one of l2, dot"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
        ({"segment_length": 0}, "segment_length is 0, needs an integer of at least 1, or 'log'"),
        ({"aggregation": "grm"}, "aggregation is 'grm', needs one of residual, gated, soup, sparse, average"),
        ({"aggregation": "sparse"}, "top_k is None, needs an integer from 1 to 16 with aggregation 'sparse'"),
        ({"u": None}, "u is None, needs connectors [B, T, H, R] with aggregation 'gated'"),
        ({"u": zeros(2, 3, 1, 24)}, "routing_keys has shape [2, 3, 1, 16], needs [B, T, H, R] as u = [2, 3, 1, 24]"),
        ({"u": zeros(2, 3, 1, 16).half()}, "u has dtype torch.float16, q has torch.float32"),
        ({"start": a_state().memory}, "start.weights[0] has shape [2, 1, 16, 24], needs [N, H, Din, Dout] = [1, 1, 16, 24]"),
        ({"initial_state": a_state().memory}, "initial_state must be a MemoryCachingState, got NeuralMemoryState"),
        ({"initial_state": a_state(layers=((16, 16),))}, "initial_state.cached has 1 tensors, needs 2"),
        ({"initial_state": a_state(heads=2)}, "initial_state.cached[0] has shape [2, 5, 2, 16, 24], needs [N, S, H, ...]"),
        ({"initial_state": a_state(memory=OTHER)}, "initial_state.memory.momentum has 0 layers, needs 2"),
        ({"initial_state": a_state(position=4)}, "initial_state.position is 4, needs 0 to segment_length - 1 = 3"),
        ({"initial_state": a_state(count=6, slots=5)}, "initial_state.cached[0] has shape [6, 5, 1, 16, 24]"),
        ({"aggregation": "average", "initial_state": a_state()}, "initial_state.cached has 5 memories, needs 1 with 'average', their sum"),
        ({"implementation": "triton", "aggregation": "soup"}, "implementation 'triton' has no aggregation 'soup'; use 'chunked'"),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs one of triton, chunked, reference"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(change, message):
    with pytest.raises((ValueError, TypeError)) as error:
        neural_memory_caching(**{**ZERO, **change})
    assert message in str(error.value)
    assert str(error.value).startswith("neural_memory_caching: ") and "\n" not in str(error.value)
