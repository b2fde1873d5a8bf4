"""gru: its three forms against each other and torch.nn.GRU, the properties of every operator, and bad input."""

import pytest
import torch
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given
from hypothesis import strategies as st

from memzoo.kernels import gru

FORMS = ["reference", "chunked", "triton"]
FAST_FORMS = ["chunked", "triton"]


def example(batch=2, length=11, heads=2, dim=16, dtype=torch.float32, bias=True, state=True, count=None, scale=1.0):
    count = batch if count is None else count
    tensors = {
        "x": torch.randn(batch, length, heads, 3, dim, dtype=dtype),
        "weight": scale * dim**-0.5 * torch.randn(heads, dim, 3, dim, dtype=dtype),
        "bias": torch.randn(heads, dim, dtype=dtype) if bias else None,
        "initial_state": torch.randn(count, heads, dim, dtype=dtype).tanh() if state else None,
    }
    return {name: t for name, t in tensors.items() if t is not None}


def form_dtype(implementation):
    return torch.float32 if implementation == "triton" else torch.float64


@pytest.mark.parametrize("implementation", FAST_FORMS)
@given(
    batch=st.sampled_from([1, 2, 17]), length=st.sampled_from([1, 2, 7]), heads=st.integers(1, 2),
    dim=st.sampled_from([16, 24, 32, 40]), bias=st.booleans(), state=st.booleans(), final=st.booleans(),
)  # fmt: skip
def test_forms_agree_with_the_definition(implementation, batch, length, heads, dim, bias, state, final):
    if batch > 2:  # the interpreter is slow
        length = min(length, 2)
    args = example(batch, length, heads, dim, form_dtype(implementation), bias, state)
    assert_grads_close(gru, args, {"output_final_state": final}, implementation)


@pytest.mark.parametrize("dim", [72, 128])
def test_large_heads(dim):
    args = example(1, 4, 1, dim, torch.float16)
    args["initial_state"] = args["initial_state"].float()
    assert_grads_close(gru, args, {"output_final_state": True}, "triton", bound=4e-3, gradient_bound=1e-2)


def torch_gru(x, weight, bias, initial_state):
    """torch.nn.GRU of one head: the identity as its input's projection."""
    dim = weight.shape[1]
    module = torch.nn.GRU(3 * dim, dim, batch_first=True, dtype=x.dtype)
    parameters = {
        "weight_ih_l0": torch.eye(3 * dim, dtype=x.dtype),
        "weight_hh_l0": weight[0].flatten(1).T,
        "bias_ih_l0": x.new_zeros(3 * dim),
        "bias_hh_l0": torch.cat((x.new_zeros(2 * dim), bias[0])),
    }
    y, last = torch.func.functional_call(module, parameters, (x.flatten(2), initial_state.transpose(0, 1)))
    return y[:, :, None], last.transpose(0, 1)


@pytest.mark.parametrize("implementation", FORMS)
def test_one_head_is_torch_gru(implementation):
    def run(x, weight, bias, initial_state, implementation):
        if implementation == "reference":
            return torch_gru(x, weight, bias, initial_state)
        form = implementation.removeprefix("our ")
        return gru(x, weight, bias, initial_state=initial_state, output_final_state=True, implementation=form)

    assert_grads_close(run, example(3, 9, 1, 24, form_dtype(implementation)), {}, f"our {implementation}")


@pytest.mark.parametrize("implementation", FORMS)
def test_heads_do_not_mix(implementation):
    args = example(heads=3)
    whole, _ = gru(**args, implementation=implementation)
    axis = {"x": 2, "weight": 0, "bias": 0, "initial_state": 1}
    for head in range(3):
        own = {name: t.narrow(axis[name], head, 1) for name, t in args.items()}
        assert_close(gru(**own, implementation=implementation)[0], whole[:, :, head : head + 1])


@pytest.mark.parametrize("implementation", FORMS)
def test_packed_equals_separate(implementation):
    cu_seqlens, lengths = packed_example([5, 0, 1, 9, 0, 2, 0, *[1, 2, 3] * 4])  # more sequences than a tile has rows
    args = example(1, sum(lengths), count=len(lengths))
    y, state = gru(**args, output_final_state=True, cu_seqlens=cu_seqlens, implementation=implementation)
    for n, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(state[n], args["initial_state"][n])
            continue
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        alone = args | {"x": args["x"][:, rows], "initial_state": args["initial_state"][n : n + 1]}
        y_alone, state_alone = gru(**alone, output_final_state=True, implementation="reference")
        assert_close(y[:, rows], y_alone)
        assert_close(state[n], state_alone[0])


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("state", [False, True])
def test_packed_gradients(implementation, state):
    cu_seqlens, lengths = packed_example([3, 0, 1, 7, 0, 2, 0, *[1, 2] * 6])
    args = example(1, sum(lengths), dtype=form_dtype(implementation), state=state, count=len(lengths))
    assert_grads_close(gru, args, {"output_final_state": True, "cu_seqlens": cu_seqlens}, implementation)


@pytest.mark.parametrize("implementation", FORMS)
def test_causal_batch_independent_and_repeatable(implementation):
    args = example(length=9)
    before, _ = gru(**args, implementation=implementation)
    again, _ = gru(**args, implementation=implementation)
    assert torch.equal(before, again)
    changed = {name: t.clone() for name, t in args.items()}
    changed["x"][0, 5:] += 1
    after, _ = gru(**changed, implementation=implementation)
    assert torch.equal(before[0, :5], after[0, :5])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 5:], after[0, 5:])


@pytest.mark.parametrize("implementation", FORMS)
def test_any_split_equals_one_pass(implementation):
    args = example(1, 5)
    whole, last = gru(**args, output_final_state=True, implementation=implementation)
    for split in range(1, 5):
        given_state, state, parts = args["initial_state"].clone(), args["initial_state"], []
        for start, stop in ((0, split), *((t, t + 1) for t in range(split, 5))):
            piece = args | {"x": args["x"][:, start:stop], "initial_state": state}
            part, state = gru(**piece, output_final_state=True, implementation=implementation)
            parts.append(part)
        assert_close(torch.cat(parts, dim=1), whole)
        assert_close(state, last)
        assert torch.equal(given_state, args["initial_state"])


def test_gradcheck_of_the_definition():
    args = {name: t.requires_grad_() for name, t in example(1, 4, 1, 16, torch.float64).items()}

    def run(*values):
        return gru(**dict(zip(args, values)), output_final_state=True, implementation="reference")

    assert torch.autograd.gradcheck(run, list(args.values()), fast_mode=True)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # meant: 1 / (1 + inf) is the gate's 0
@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_saturated_gates(implementation):
    """Gates at 0 and 1, without an overflow in an exponential; an update gate of 1 keeps the state exactly."""
    args = example(1, 9, 1, dtype=form_dtype(implementation))
    args["x"] *= 200
    assert_grads_close(gru, args, {"output_final_state": True}, implementation)
    args["x"][:, :, :, 1] = 200.0
    _, state = gru(**args, output_final_state=True, implementation=implementation)
    assert_close(state, args["initial_state"])


def test_finite_for_long_input():
    y, state = gru(**example(1, 65_536, 1, state=False), output_final_state=True)
    assert torch.isfinite(y).all() and torch.isfinite(state).all()
    assert y.abs().max() <= 1


def test_bfloat16_in_the_interpreter():
    args = example(2, 9, 1, dtype=torch.bfloat16)
    args["initial_state"] = args["initial_state"].float()
    assert_grads_close(gru, args, {"output_final_state": True}, "triton", bound=2e-2, gradient_bound=5e-2)


@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_parameters_may_have_a_type_of_their_own(implementation):
    args = example(2, 6, dtype=torch.bfloat16)
    args |= {name: args[name].float() for name in ("weight", "bias", "initial_state")}
    assert_grads_close(gru, args, {"output_final_state": True}, implementation, bound=2e-2, gradient_bound=5e-2)
    y, state = gru(**args, output_final_state=True, implementation=implementation)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("length", [1, 9])
def test_compiles_to_one_graph_and_takes_meta_tensors(implementation, length):
    args = example(length=length)

    def run(**tensors):
        return gru(**tensors, output_final_state=True, implementation=implementation)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(**args), run(**args)):
        assert_close(actual, expected)
    leaves = {name: t.clone().requires_grad_() for name, t in args.items()}
    gradients = [
        torch.autograd.grad(sum(o.square().sum() for o in function(**leaves)), list(leaves.values()))
        for function in (compiled, run)
    ]
    for actual, expected in zip(*gradients):
        assert_close(actual, expected)
    y, state = run(**{name: t.to("meta") for name, t in args.items()})
    assert y.shape == (2, length, 2, 16) and y.device.type == "meta"
    assert state.shape == (2, 2, 16)


@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_gradient_of_one_output_alone(implementation):
    args = {name: t.requires_grad_() for name, t in example(1, 5).items()}
    outputs = gru(**args, output_final_state=True, implementation=implementation)
    for actual, expected in zip(outputs, gru(**args, output_final_state=True, implementation="reference")):
        grads = [torch.autograd.grad(o.square().sum(), list(args.values()), retain_graph=True) for o in (actual, expected)]
        for a, e in zip(*grads):
            assert_close(a, e, bound=1e-4)


def test_operators_pass_opcheck():
    from memzoo.kernels.gru import kernel

    cu_seqlens, lengths = packed_example([3, 0, 2])
    args = example(1, sum(lengths), count=3)
    inputs = (*args.values(), cu_seqlens)
    torch.library.opcheck(kernel._forward, inputs, test_utils=("test_schema", "test_faketensor"))
    y, state = kernel._forward(*inputs)
    backward = (y, state, *args.values(), y, cu_seqlens)
    torch.library.opcheck(kernel._backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 3, 16)}, "x has shape [2, 3, 3, 16], needs 5 dimensions [B, T, H, 3, D]"),
        ({"x": torch.zeros(2, 3, 1, 4, 16)}, "x has shape [2, 3, 1, 4, 16], needs [B, T, H, 3, D] = [2, 3, 1, 3, 16]"),
        ({"x": torch.zeros(2, 0, 1, 3, 16)}, "B and T must both be at least 1"),
        ({"x": torch.zeros(2, 3, 1, 3, 20), "weight": torch.zeros(1, 20, 3, 20)}, "x has head dimension 20, needs a multiple of 8"),
        ({"weight": torch.zeros(1, 3, 16, 16)}, "weight has shape [1, 3, 16, 16], needs [H, D, 3, D] = [1, 16, 3, 16]"),
        ({"weight": torch.zeros(1, 16, 3, 16, dtype=torch.int64)}, "weight has dtype torch.int64"),
        ({"bias": torch.zeros(3, 16)}, "bias has shape [3, 16], needs [H, D] = [1, 16]"),
        ({"bias": torch.zeros(1, 16, device="meta")}, "bias is on meta, x is on cpu"),
        ({"initial_state": (torch.zeros(2, 1, 16),) * 2}, "initial_state must be a torch.Tensor, got tuple"),
        ({"initial_state": torch.zeros(1, 16)}, "initial_state has shape [1, 16], needs [N, H, D] = [2, 1, 16]"),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs one of triton, chunked, reference"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
        (
            {"x": torch.zeros(1, 1, 1, 3, 136), "weight": torch.zeros(1, 136, 3, 136), "implementation": "triton"},
            "x has head dimension 136 in torch.float32, implementation 'triton' holds at most 128 in half precision and 64 in float32; "
            "use more heads, half precision or implementation='chunked'",
        ),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    args = {"x": torch.zeros(2, 3, 1, 3, 16), "weight": torch.zeros(1, 16, 3, 16)} | change
    with pytest.raises((ValueError, TypeError)) as error:
        gru(**args)
    assert message in str(error.value)
    assert str(error.value).startswith("gru: ") and "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 128])
def test_gpu_bfloat16_at_real_size(dim, packed):
    cu_seqlens, lengths = packed_example([100, 1, 0, 200, *range(60)]) if packed else (None, [200] * 40)
    args = example(1 if packed else 40, sum(lengths) if packed else 200, 8, dim, torch.bfloat16, count=len(lengths))
    args = {name: t.cuda() for name, t in args.items()}
    args["initial_state"] = args["initial_state"].float()
    options = {"output_final_state": True, "cu_seqlens": cu_seqlens.cuda() if packed else None}
    assert_grads_close(gru, args, options, "triton", against="chunked", bound=2e-2, gradient_bound=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 32, 64])
def test_gpu_float32(dim):
    args = {name: t.cuda() for name, t in example(20, 40, 4, dim).items()}
    assert_grads_close(gru, args, {"output_final_state": True}, "triton", against="chunked", bound=1e-4, gradient_bound=5e-4)


@pytest.mark.gpu
def test_gpu_long_input():
    y, _ = gru(**{name: t.cuda() for name, t in example(1, 65_536, 2, 64, torch.bfloat16, state=False).items()})
    assert torch.isfinite(y).all() and y.abs().max() <= 1
