"""neural_memory: its two torch forms against the paper's equations and each other, the properties of every operator, and bad input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given, settings
from hypothesis import strategies as st

from memzoo.kernels import NeuralMemoryState, delta_rule, linear_attention, neural_memory

FORMS = ["reference", "chunked"]
PARTS = NeuralMemoryState._fields[:3]
TOKENS = ("q", "k", "v", "lr", "momentum", "decay")


def example(
    batch=2, length=11, heads=2, dim=16, depth=2, value_dim=None, hidden=24, dtype=torch.float64, state=True, count=None, lr=0.3
):
    """Tensors by name: tokens, `weights.i`, and with `state` each tensor of a state, `momentum.i` at a tenth of the weights' size."""
    count = batch if count is None else count
    value_dim = dim if value_dim is None else value_dim
    sizes = [dim, *[hidden] * (depth - 1), value_dim]
    tensors = {
        "q": F.normalize(torch.randn(batch, length, heads, dim, dtype=dtype), dim=-1),
        "k": F.normalize(torch.randn(batch, length, heads, dim, dtype=dtype), dim=-1),
        "v": torch.randn(batch, length, heads, value_dim, dtype=dtype),
        "lr": lr * torch.rand(batch, length, heads, dtype=dtype),
        "momentum": torch.rand(batch, length, heads, dtype=dtype),
        "decay": 0.5 * torch.rand(batch, length, heads, dtype=dtype),
    }
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        tensors[f"weights.{i}"] = torch.randn(heads, a, b, dtype=dtype) * a**-0.5
        if state:
            for part in PARTS:
                size = 0.1 if part == "momentum" else 1.0
                tensors[f"state.{part}.{i}"] = size * torch.randn(count, heads, a, b, dtype=dtype) * a**-0.5
    return tensors


def run(*, implementation=None, position=None, **given):
    """neural_memory with tensors named as `example` names them; `position` is the state's, zeros if None."""
    depth = sum(name.startswith("weights.") for name in given)
    layers = tuple(given.pop(f"weights.{i}") for i in range(depth))
    if "state.weights.0" in given:
        parts = [tuple(given.pop(f"state.{part}.{i}") for i in range(depth)) for part in PARTS]
        if position is None:
            position = torch.zeros(parts[0][0].shape[0], dtype=torch.int64)
        given["initial_state"] = NeuralMemoryState(*parts, position)
    return neural_memory(weights=layers, implementation=implementation, **given)


def run_floats(**given):
    """As `run`, without the final position, which has no gradient."""
    output, state = run(**given)
    return output, (None if state is None else state[:3])


def cut(args, start, stop):
    """The tokens from start to stop of `example`'s tensors."""
    return {name: t[:, start:stop] if name in TOKENS else t for name, t in args.items()}


def named_state(state):
    """A final state as `run` takes it."""
    named = {f"state.{part}.{i}": t for part in PARTS for i, t in enumerate(getattr(state, part))}
    return named | {"position": state.position}


def assert_states_close(actual, expected, bound=None):
    assert torch.equal(actual.position, expected.position)
    for part in PARTS:
        for i, (a, e) in enumerate(zip(getattr(actual, part), getattr(expected, part))):
            assert_close(a, e, bound, f"{part} of layer {i}")


def by_the_paper(q, k, v, theta, eta, alpha, weights, chunk_size, residual, loss, max_grad_norm=None):
    """One head, straight from the paper: Eq. 12 as a loss, autograd's gradient of it at the chunk's first weights, Eq. 13 and 14 written
    out, Eq. 15 as a forward pass. Tensors are [T, D] and [T]; returns outputs, weights, momentum and the gradients' norms."""

    def memory(layers, x):
        y = layers[0].T @ x
        for layer in layers[1:]:
            y = layer.T @ (0.5 * y * (1 + torch.erf(y / math.sqrt(2))))
        return x + y if residual else y

    M, S = list(weights), [torch.zeros_like(w) for w in weights]
    outputs, norms = [], []
    for t in range(len(q)):
        if t % chunk_size == 0:
            at = M
        prediction = memory(at, k[t])
        objective = -(prediction @ v[t]) if loss == "dot" else (prediction - v[t]).pow(2).sum() / 2
        gradient = torch.autograd.grad(objective, at, create_graph=True)
        norms.append(torch.cat([g.flatten() for g in gradient]).norm())
        step = theta[t]
        if max_grad_norm is not None and norms[-1] > max_grad_norm:
            step = step * max_grad_norm / norms[-1]
        for i in range(len(M)):
            S[i] = eta[t] * S[i] - step * gradient[i]
        M = [(1 - alpha[t]) * m + s for m, s in zip(M, S)]
        outputs.append(memory(M, q[t]))
    return torch.stack(outputs), M, S, torch.stack(norms)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("loss", ["l2", "dot"])
@pytest.mark.parametrize(
    ("depth", "residual", "chunk_size"),
    [(1, False, 1), (1, False, 4), (1, True, 4), (2, True, 1), (2, True, 4), (3, False, 4), (4, True, 16)],
)  # fmt: skip
def test_follows_the_papers_equations(implementation, clamp, loss, depth, residual, chunk_size):
    """Outputs, states and all outer gradients against the equations with autograd's inner gradient."""
    args = example(1, 10, 2, depth=depth, state=False)
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    inner = (chunk_size, residual, loss)

    def paper(max_grad_norm):
        heads = []
        for h in range(2):
            layers = [leaves[f"weights.{i}"][h] for i in range(depth)]
            heads.append(by_the_paper(*(leaves[name][0, :, h] for name in TOKENS), layers, *inner, max_grad_norm))
        return heads

    bound = None
    if clamp:  # half of the tokens are clamped
        norms = torch.cat([head[3] for head in paper(None)]).detach()
        bound = norms.sort().values[len(norms) // 2 - 1 : len(norms) // 2 + 1].mean().item()
    heads = paper(bound)
    if clamp:
        clamped = torch.cat([head[3] for head in heads]) > bound
        assert clamped.any() and not clamped.all()
    expected = [torch.stack([head[0] for head in heads], 1)[None]]
    expected += [torch.stack([head[part][i] for head in heads])[None] for part in (1, 2) for i in range(depth)]
    output, state = run(
        **leaves, chunk_size=chunk_size, residual=residual, loss=loss, max_grad_norm=bound, output_final_state=True,
        implementation=implementation,
    )  # fmt: skip
    assert state.position.tolist() == [10 % chunk_size]
    actual = [output, *state.weights, *state.momentum]
    gradients = []
    for outputs in (actual, expected):
        total = sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).cos().view(o.shape)).sum() for o in outputs)
        gradients.append(torch.autograd.grad(total, list(leaves.values())))
    for a, e in zip(actual, expected):
        assert_close(a, e)
    for name, a, e in zip(leaves, *gradients):
        assert e.any(), f"{name} has no gradient"
        assert_close(a, e, 1e-9, f"gradient of {name}")


@settings(max_examples=40)
@given(
    batch=st.integers(1, 2), length=st.sampled_from([1, 2, 7, 16, 17, 31, 48]), heads=st.integers(1, 2),
    dim=st.sampled_from([16, 24, 40]), value_dim=st.sampled_from([None, None, 32]), depth=st.integers(1, 4),
    hidden=st.sampled_from([16, 33, 64]), residual=st.booleans(), loss=st.sampled_from(["l2", "dot"]),
    chunk_size=st.sampled_from([1, 3, 8, 16, 100]), state=st.booleans(), final=st.booleans(),
    max_grad_norm=st.sampled_from([None, 0.5, 2.0]), data=st.data(),
)  # fmt: skip
def test_chunked_agrees_with_the_definition(
    batch, length, heads, dim, value_dim, depth, hidden, residual, loss, chunk_size, state, final, max_grad_norm, data
):
    args = example(batch, length, heads, dim, depth, value_dim, hidden, state=state)
    options = {"chunk_size": chunk_size, "residual": residual and value_dim is None, "loss": loss, "output_final_state": final}
    if state:
        options["position"] = torch.tensor(data.draw(st.lists(st.integers(0, chunk_size - 1), min_size=batch, max_size=batch)))
    assert_grads_close(run_floats, args, {**options, "max_grad_norm": max_grad_norm}, "chunked", gradient_bound=1e-8)


def test_more_chunks_than_are_read_at_once():
    args = example(1, 170, 1, state=False, lr=0.1)
    assert_grads_close(run_floats, args, {"chunk_size": 4, "output_final_state": True}, "chunked", gradient_bound=1e-8)


@pytest.mark.parametrize(("dtype", "bound", "gradient_bound"), [(torch.float32, 2e-5, 2e-4), (torch.bfloat16, 2e-2, 5e-2)])
def test_chunked_in_other_types(dtype, bound, gradient_bound):
    args = {name: t.to(dtype) for name, t in example(1, 40, 2).items()}
    for name in ("lr", "momentum", "decay"):
        args[name] = args[name].float()  # gates may have a type of their own
    options = {"chunk_size": 16, "max_grad_norm": 1.0, "output_final_state": True, "position": torch.tensor([5])}
    assert_grads_close(run_floats, args, options, "chunked", bound=bound, gradient_bound=gradient_bound)
    output, state = run(**args, **options)
    assert output.dtype == dtype and {t.dtype for part in state[:3] for t in part} == {torch.float32}


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(("depth", "loss", "max_grad_norm"), [(1, "l2", 1.0), (2, "l2", None), (2, "dot", 0.5), (3, "l2", 2.0)])
def test_gradcheck(implementation, depth, loss, max_grad_norm):
    args = {name: t.requires_grad_() for name, t in example(1, 6, 1, depth=depth, hidden=16).items()}
    names, tensors = list(args), list(args.values())

    def function(*values):
        output, state = run_floats(
            **dict(zip(names, values)), chunk_size=4, loss=loss, max_grad_norm=max_grad_norm, output_final_state=True,
            position=torch.tensor([3]), implementation=implementation,
        )  # fmt: skip
        return (output, *itertools.chain(*state))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("given_none", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1e-200, 1.0), (None, None)])
def test_gates_of_exactly_0_and_1(momentum, decay, given_none):
    """Where quotients of products would divide by 0: alpha = 1 forgets everything, eta = 0 drops the momentum; None is a mix.

    Also of gates so small that products of two are 0."""
    args = example(1, 21, 1, lr=0.1)
    for name, value in (("momentum", momentum), ("decay", decay)):
        mixed = torch.tensor([0, 1e-160, 1, 1], dtype=torch.float64)[torch.randint(4, args[name].shape)]
        args[name] = mixed if value is None else torch.full_like(args[name], value)
    options = {"chunk_size": 8, "output_final_state": True, "position": torch.tensor([3])}
    if given_none:  # None stands for a gate of 0
        for name, value in (("momentum", momentum), ("decay", decay)):
            if value == 0:
                expected, _ = run(**args, **options)
                args.pop(name)
                options[name] = None
                assert torch.equal(run(**args, **options)[0], expected)
    assert_grads_close(run_floats, args, options, "chunked", gradient_bound=1e-8)


@pytest.mark.parametrize("implementation", FORMS)
def test_full_decay_forgets_everything_before(implementation):
    args = example(1, 12, 1, depth=2)
    args["decay"][:, 7] = 1.0
    args["momentum"][:, 7] = 0.0
    before, _ = run(**args, chunk_size=1, implementation=implementation)
    for name in ("k", "v"):
        args[name][:, :6] += 1.0  # token 6 stays: token 7's gradient is taken at the weights before it
    args["state.weights.0"] *= 2
    after, _ = run(**args, chunk_size=12, implementation=implementation)
    assert not torch.allclose(before[:, :7], after[:, :7])


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("state", [False, True])
def test_packed_equals_separate(implementation, state):
    cu_seqlens, lengths = packed_example([5, 0, 1, 40, 0, 8, 0])
    args = example(1, sum(lengths), count=len(lengths), state=state)
    position = torch.tensor([3, 2, 7, 0, 0, 6, 1]) if state else None
    options = {"chunk_size": 8, "max_grad_norm": 2.0, "output_final_state": True, "implementation": implementation}
    output, last = run(**args, position=position, cu_seqlens=cu_seqlens, **options)
    for n, length in enumerate(lengths):
        mine = {name: t[n : n + 1] if name.startswith("state.") else t for name, t in args.items()}
        mine_last = NeuralMemoryState(*(tuple(t[n : n + 1] for t in part) for part in last[:3]), last.position[n : n + 1])
        if length == 0:
            first = [args[f"state.weights.{i}"][n] if state else args[f"weights.{i}"] for i in range(2)]
            for i in range(2):
                assert torch.equal(last.weights[i][n], first[i])
                assert torch.equal(last.momentum[i][n], args[f"state.momentum.{i}"][n] if state else torch.zeros_like(first[i]))
                open_start = args[f"state.start.{i}"][n] if state and position[n] else first[i]
                assert torch.equal(last.start[i][n], open_start)
            assert last.position[n] == (position[n] if state else 0)
            continue
        start, stop = int(cu_seqlens[n]), int(cu_seqlens[n + 1])
        alone, alone_last = run(
            **cut(mine, start, stop), position=position[n : n + 1] if state else None, **{**options, "implementation": "reference"}
        )
        assert_close(output[:, start:stop], alone)
        assert_states_close(mine_last, alone_last)


@pytest.mark.parametrize("state", [False, True])
def test_packed_gradients(state):
    cu_seqlens, lengths = packed_example([5, 0, 1, 40, 2])
    args = example(1, sum(lengths), count=len(lengths), state=state)
    options = {"chunk_size": 8, "max_grad_norm": 2.0, "output_final_state": True, "cu_seqlens": cu_seqlens}
    if state:
        options["position"] = torch.tensor([3, 2, 7, 0, 6])
    assert_grads_close(run_floats, args, options, "chunked", gradient_bound=1e-8)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(("depth", "chunk_size"), [(1, 16), (2, 16), (2, 64), (3, 5)])
def test_causal_batch_independent_and_repeatable(implementation, depth, chunk_size):
    args = example(length=40, depth=depth)
    options = {"chunk_size": chunk_size, "max_grad_norm": 2.0, "implementation": implementation}
    held = {name: t.clone() for name, t in args.items()}
    before, _ = run(**args, **options)
    again, _ = run(**args, **options)
    assert torch.equal(before, again)
    assert all(torch.equal(args[name], t) for name, t in held.items())
    for first in (1, 17, 32):
        changed = {name: t.clone() for name, t in args.items()}
        for name in TOKENS:
            changed[name][0, first:] = 0.9 * changed[name][0, first:].flip(0) + 0.05
        after, _ = run(**changed, **options)
        assert torch.equal(before[0, :first], after[0, :first])
        assert torch.equal(before[1], after[1])
        assert (before[0, first:] != after[0, first:]).any(-1).all()
    changed = {name: t.clone() for name, t in args.items()}
    for name in args:
        if name.startswith("state."):
            changed[name][0] += 0.1
    after, _ = run(**changed, **options)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])


@pytest.mark.parametrize("implementation", FORMS)
@given(
    cuts=st.lists(st.integers(1, 29), max_size=6, unique=True).map(sorted),
    depth=st.integers(1, 3), chunk_size=st.sampled_from([1, 4, 7, 16, 64]), state=st.booleans(), data=st.data(),
)  # fmt: skip
def test_any_split_equals_one_pass(implementation, cuts, depth, chunk_size, state, data):
    args = example(2, 30, 1, depth=depth, state=state)
    position = torch.tensor(data.draw(st.lists(st.integers(0, chunk_size - 1), min_size=2, max_size=2))) if state else None
    options = {"chunk_size": chunk_size, "max_grad_norm": 2.0, "output_final_state": True, "implementation": implementation}
    whole, last = run(**args, position=position, **options)
    given_state = {name: t.clone() for name, t in args.items()}
    parts, held = [], {"position": position}
    for start, stop in itertools.pairwise([0, *cuts, 30]):
        part, state_after = run(**{**cut(args, start, stop), **held}, **options)
        held = named_state(state_after)
        parts.append(part)
    assert_close(torch.cat(parts, 1), whole)
    assert_states_close(state_after, last)
    assert all(torch.equal(args[name], t) for name, t in given_state.items())


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 5, 8])
def test_token_by_token_equals_one_pass(implementation, chunk_size):
    args = example(2, 17, 1, state=False)
    options = {"chunk_size": chunk_size, "max_grad_norm": 2.0, "output_final_state": True, "implementation": implementation}
    whole, last = run(**args, **options)
    parts, held = [], {}
    for t in range(17):
        part, state = run(**{**cut(args, t, t + 1), **held}, **options)
        assert state.position.tolist() == [(t + 1) % chunk_size] * 2
        held = named_state(state)
        parts.append(part)
    assert_close(torch.cat(parts, 1), whole)
    assert_states_close(state, last)


def test_packed_prompts_of_different_lengths_go_on_as_a_batch():
    """What a padded batch of prompts does: every sequence is then at a place of its own in its chunk."""
    lengths, more = [3, 8, 12], 7
    rows = [example(1, n + more, 1, state=False) for n in lengths]
    shared = {name: t for name, t in rows[0].items() if name.startswith("weights.")}
    options = {"chunk_size": 8, "output_final_state": True}
    cu_seqlens, _ = packed_example(lengths)
    packed = {name: torch.cat([row[name][:, :n] for row, n in zip(rows, lengths)], 1) for name in TOKENS}
    _, state = run(**packed, **shared, cu_seqlens=cu_seqlens, **options)
    assert state.position.tolist() == [3, 0, 4]
    following = {name: torch.cat([row[name][:, n:] for row, n in zip(rows, lengths)]) for name in TOKENS}
    output, last = run(**following, **shared, **named_state(state), **options)
    for n, (row, length) in enumerate(zip(rows, lengths)):
        alone, alone_last = run(**row | shared, **options, implementation="reference")
        assert_close(output[n], alone[0, length:])
        mine = NeuralMemoryState(*(tuple(t[n : n + 1] for t in part) for part in last[:3]), last.position[n : n + 1])
        assert_states_close(mine, alone_last)


@pytest.mark.parametrize("implementation", FORMS)
def test_where_no_chunk_is_open_the_start_is_not_read(implementation):
    args = example(2, 5, 1)
    options = {"chunk_size": 4, "position": torch.tensor([0, 3]), "output_final_state": True, "implementation": implementation}
    before, state = run(**args, **options)
    for i in range(2):
        args[f"state.start.{i}"][0] = float("nan")
    after, state_after = run(**args, **options)
    assert torch.equal(before, after)
    assert_states_close(state_after, state)


@pytest.mark.parametrize("implementation", FORMS)
def test_orthonormal_keys_store_values(implementation):
    """With theta = 1 one write stores its value whole, and orthogonal keys do not disturb each other, whatever the chunk."""
    keys = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0][None, :, None]
    values, start = torch.randn(1, 16, 1, 24, dtype=torch.float64), torch.randn(1, 16, 24, dtype=torch.float64)
    for chunk_size in (1, 5, 64):
        output, state = neural_memory(
            keys, keys, values, torch.ones(1, 16, 1), None, None, (start,), chunk_size=chunk_size, output_final_state=True,
            implementation=implementation,
        )  # fmt: skip
        assert_close(output, values)
        assert_close(torch.einsum("bhkv,bthk->bthv", state.weights[0], keys), values)


@pytest.mark.parametrize("implementation", FORMS)
def test_defaults(implementation):
    for depth, residual in ((1, False), (2, True)):
        args = example(1, 9, 1, depth=depth)
        expected, _ = run(**args, chunk_size=4, residual=residual, loss="l2", max_grad_norm=None, implementation=implementation)
        output, state = run(**args, chunk_size=4, implementation=implementation)
        assert torch.equal(output, expected) and state is None
        assert not torch.equal(output, run(**args, chunk_size=4, residual=not residual, implementation=implementation)[0])


def matrix_example(length=30):
    args = example(2, length, 2, depth=1, value_dim=24, state=False)
    return args, args["weights.0"].expand(2, 2, 16, 24)


@pytest.mark.parametrize("implementation", FORMS)
def test_a_matrix_without_momentum_and_decay_is_the_delta_rule(implementation):
    args, start = matrix_example()
    args["momentum"] = args["decay"] = None
    output, state = run(**args, chunk_size=1, output_final_state=True, implementation=implementation)
    expected, last = delta_rule(
        args["q"], args["k"], args["v"], args["lr"], initial_state=start, output_final_state=True, implementation=implementation
    )
    assert_close(output, expected)
    assert_close(state.weights[0], last)


@pytest.mark.parametrize("implementation", FORMS)
def test_a_matrix_without_momentum_is_the_gated_delta_rule_of_other_gates(implementation):
    """Titans decays after the gradient, the gated delta rule before it: equal with beta = theta / (1 - alpha) and (1 - alpha) v."""
    args, start = matrix_example()
    args["momentum"] = None
    output, state = run(**args, chunk_size=1, output_final_state=True, implementation=implementation)
    keep = 1 - args["decay"]
    expected, last = delta_rule(
        args["q"], args["k"], keep[..., None] * args["v"], args["lr"] / keep, keep.log(), initial_state=start,
        output_final_state=True, implementation=implementation,
    )  # fmt: skip
    assert_close(output, expected)
    assert_close(state.weights[0], last)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_a_matrix_with_the_dot_loss_is_linear_attention_with_decay(implementation, chunk_size):
    """The gradient -k v^T does not depend on the weights, so that the chunk does not matter, and theta scales the write."""
    args, start = matrix_example()
    args["momentum"] = None
    options = {"chunk_size": chunk_size, "loss": "dot", "output_final_state": True, "implementation": implementation}
    output, state = run(**args, **options)
    k, g = args["lr"][..., None] * args["k"], (1 - args["decay"]).log()
    expected, last = linear_attention(
        args["q"], k, args["v"], g, initial_state=start, output_final_state=True, implementation=implementation
    )
    assert_close(output, expected)
    assert_close(state.weights[0], last)


@pytest.mark.parametrize("implementation", FORMS)
def test_one_chunk_from_zero_is_linear_attention(implementation):
    """At zero weights the gradient of the l2 loss is -k v^T too: one chunk over everything is batch gradient descent."""
    args, _ = matrix_example()
    args["momentum"] = args["decay"] = None
    args["weights.0"] = torch.zeros_like(args["weights.0"])
    output, _ = run(**args, chunk_size=30, implementation=implementation)
    expected, _ = linear_attention(args["q"], args["lr"][..., None] * args["k"], args["v"], implementation=implementation)
    assert_close(output, expected)


EXTREMES = {"zero": 0.0, "near zero": 1e-6, "near one": 1 - 1e-6, "one": 1.0, "mixed": None}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("decay", EXTREMES)
def test_finite_for_long_input_at_extreme_gates(decay, depth):
    """65,536 tokens in bfloat16 with the layer's clamp, a sequence a kind of momentum; the second head gets the same key every time.

    Where no momentum is lost and nothing forgotten, a memory grows, but no faster than the clamp allows."""
    length, rows = 65_536, len(EXTREMES)
    args = example(rows, length, 2, depth=depth, hidden=16, dtype=torch.float32, state=False, lr=1.0)
    args["k"][:, :, 1] = args["k"][:, :1, 1]
    args |= {name: args[name].bfloat16() for name in ("q", "k", "v")}
    gates = torch.tensor([0, 1e-6, 0.5, 1 - 1e-6, 1])
    for row, extreme in enumerate(EXTREMES.values()):
        args["momentum"][row] = gates[torch.randint(5, (length, 2))] if extreme is None else extreme
    extreme = EXTREMES[decay]
    args["decay"] = gates[torch.randint(5, (rows, length, 2))] if extreme is None else torch.full((rows, length, 2), extreme)
    with torch.no_grad():
        output, state = run(**args, chunk_size=32, max_grad_norm=1.0, output_final_state=True)
    assert torch.isfinite(output).all()
    for part in state[:3]:
        assert all(torch.isfinite(t).all() for t in part)


def test_does_not_grow_for_long_input():
    """At gates as a layer starts with, the last outputs of 65,536 tokens are as large as early ones, and gradients are finite."""
    length = 65_536
    args = example(1, length, 1, hidden=16, dtype=torch.float32, state=False, lr=0.1)
    args["momentum"], args["decay"] = 0.9 * torch.ones(1, length, 1), 0.01 * torch.ones(1, length, 1)
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    output, _ = run(**leaves, chunk_size=64, max_grad_norm=1.0)
    assert output[:, -1000:].abs().max() < 3 * output[:, 1000:2000].abs().max()
    for name, gradient in zip(leaves, torch.autograd.grad(output.square().mean(), list(leaves.values()))):
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize(("length", "depth", "state"), [(1, 2, False), (1, 2, True), (9, 1, False), (12, 2, True)])
def test_compiles_to_one_graph_and_takes_meta_tensors(length, depth, state):
    args = example(length=length, depth=depth, dtype=torch.float32, state=state)
    options = {"chunk_size": 8, "max_grad_norm": 1.0, "output_final_state": True, "implementation": "chunked"}
    position = torch.tensor([3, 0]) if state else None

    def function(position=position, **tensors):
        output, last = run(**tensors, position=position, **options)
        return (output, *itertools.chain(*last[:3]), last.position)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = {name: t.clone().requires_grad_() for name, t in args.items()}
    results, gradients = [], []
    for f in (compiled, function):
        results.append(f(**leaves))
        loss = sum(t.square().sum() for t in results[-1][:-1])
        gradients.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
    for actual, expected in zip(*results):
        assert_close(actual.double(), expected.double(), 2e-5)
    for name, actual, expected in zip(leaves, *gradients):
        assert_close(actual, expected, 1e-4, name)
    meta = {name: t.to("meta") for name, t in args.items()}
    outputs = function(position=None if position is None else position.to("meta"), **meta)
    assert [t.shape for t in outputs] == [t.shape for t in function(**args)] and {t.device.type for t in outputs} == {"meta"}


@pytest.mark.parametrize("implementation", FORMS)
def test_gradient_of_one_output_alone(implementation):
    args = {name: t.requires_grad_() for name, t in example(1, 5).items()}
    output, state = run(**args, chunk_size=4, output_final_state=True, implementation=implementation)
    for result in (output, *state.weights, *state.momentum):
        (gradient,) = torch.autograd.grad(result.sum(), args["v"], retain_graph=True)
        assert torch.isfinite(gradient).all() and gradient.any()


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def a_state(layers=((16, 24), (24, 16)), count=2, position=(0, 0), **options):
    part = tuple(zeros(count, 1, *layer, **options) for layer in layers)
    return NeuralMemoryState(part, part, part, torch.tensor(position))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 3, 16)}, "q has shape [2, 3, 16], needs 4 dimensions [B, T, H, D]"),
        ({"q": None}, "q must be a torch.Tensor, got NoneType"),
        ({"q": zeros(2, 0, 1, 16)}, "B and T must both be at least 1"),
        ({"q": zeros(2, 3, 1, 24)}, "k has shape [2, 3, 1, 16], needs [B, T, H, D] = [2, 3, 1, 24]"),
        ({"q": zeros(2, 3, 1, 20), "k": zeros(2, 3, 1, 20)}, "q has head dimension 20, needs a multiple of 8 from 16 to 256"),
        ({"v": zeros(2, 3, 1, 12)}, "v has head dimension 12, needs a multiple of 8 from 16 to 256"),
        ({"v": zeros(2, 3, 1, 24)}, "weights[1] has shape [1, 24, 16], needs [H, Din, Dout] = [1, 24, 24]"),
        ({"v": zeros(2, 3, 1, 16).half()}, "v has dtype torch.float16, q has torch.float32"),
        ({"lr": None}, "lr must be a torch.Tensor, got NoneType"),
        ({"lr": zeros(2, 3)}, "lr has shape [2, 3], needs [B, T, H] = [2, 3, 1]"),
        ({"momentum": zeros(2, 3, 2)}, "momentum has shape [2, 3, 2], needs [B, T, H] = [2, 3, 1]"),
        ({"decay": zeros(2, 1, 1)}, "decay has shape [2, 1, 1], needs [B, T, H] = [2, 3, 1]"),
        ({"decay": zeros(2, 3, 1).long()}, "decay has dtype torch.int64"),
        ({"momentum": zeros(2, 3, 1, device="meta")}, "momentum is on meta, q is on cpu"),
        ({"weights": zeros(1, 16, 16)}, "weights must be a sequence of tensors [H, Din, Dout], got Tensor"),
        ({"weights": ()}, "weights must be a sequence of tensors [H, Din, Dout], got"),
        ({"weights": (zeros(16, 16),)}, "weights[0] has shape [16, 16], needs 3 dimensions [H, Din, Dout]"),
        ({"weights": (zeros(2, 16, 16),)}, "weights[0] has shape [2, 16, 16], needs [H, Din, Dout] = [1, 16, 16]"),
        ({"weights": (zeros(1, 16, 24), zeros(1, 16, 16))}, "weights[1] has shape [1, 16, 16], needs [H, Din, Dout] = [1, 24, 16]"),
        ({"weights": (zeros(1, 16, 16).int(),)}, "weights[0] has dtype torch.int32"),
        ({"weights": (zeros(1, 16, 24), None)}, "weights[1] must be a torch.Tensor, got NoneType"),
        ({"weights": (zeros(1, 16, 0), zeros(1, 0, 16))}, "weights[0] has shape [1, 16, 0]: Dout must be at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0, needs an integer of at least 1"),
        ({"chunk_size": 2.5}, "chunk_size is 2.5, needs an integer of at least 1"),
        ({"v": zeros(2, 3, 1, 24), "weights": (zeros(1, 16, 24),), "residual": True}, "residual needs Dv = D, got 24 and 16"),
        ({"loss": "cosine"}, "loss is 'cosine', needs one of l2, dot"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0, needs a number above 0, or None"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan, needs a number above 0, or None"),
        ({"max_grad_norm": "1"}, "max_grad_norm is '1', needs a number above 0, or None"),
        ({"initial_state": zeros(2, 1, 16, 16)}, "initial_state must be a NeuralMemoryState, got Tensor"),
        ({"initial_state": a_state(((16, 16),))}, "initial_state.weights has 1 layers, needs 2"),
        ({"initial_state": a_state(count=3)}, "weights[0] has shape [3, 1, 16, 24], needs [N, H, Din, Dout] = [2, 1, 16, 24]"),
        ({"initial_state": a_state(position=(0,))}, "initial_state.position has shape [1], needs [N] = [2]"),
        ({"initial_state": a_state(position=(0.0, 0.0))}, "initial_state.position has dtype torch.float32, needs int64"),
        ({"initial_state": a_state(position=(0, 8))}, "initial_state.position is [0, 8], needs 0 to chunk_size - 1 = 7"),
        ({"initial_state": a_state(position=(0, -1))}, "initial_state.position is [0, -1], needs 0 to chunk_size - 1 = 7"),
        ({"initial_state": a_state(dtype=torch.int64)}, "initial_state.weights[0] has dtype torch.int64"),
        ({"initial_state": a_state(device="meta")}, "initial_state.weights[0] is on meta, q is on cpu"),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs one of triton, chunked, reference"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(change, message):
    args = {name: zeros(2, 3, 1, 16) for name in ("q", "k", "v")} | {name: zeros(2, 3, 1) for name in ("lr", "momentum", "decay")}
    args |= {"weights": (zeros(1, 16, 24), zeros(1, 24, 16)), "chunk_size": 8} | change
    with pytest.raises((ValueError, TypeError)) as error:
        neural_memory(**args)
    assert message in str(error.value)
    assert str(error.value).startswith("neural_memory: ") and "\n" not in str(error.value)
