"""lstm: its three forms against each other and torch.nn.LSTM, the properties of every operator, and bad input."""

import pytest
import torch
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given
from hypothesis import strategies as st

from memzoo.kernels import lstm as operator

FORMS = ["reference", "chunked", "triton"]
FAST_FORMS = ["chunked", "triton"]
OVERFLOWS = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # meant: 1 / (1 + inf) is the gate's 0


def lstm(x, weight, h=None, c=None, **options):
    """The operator with the two initial states as arguments of their own, so that each has its gradient checked."""
    return operator(x, weight, initial_state=None if h is None else (h, c), **options)


def example(batch=2, length=11, heads=2, dim=16, dtype=torch.float32, state=True, count=None, scale=1.0):
    count = batch if count is None else count
    tensors = {
        "x": torch.randn(batch, length, heads, 4, dim, dtype=dtype),
        "weight": scale * dim**-0.5 * torch.randn(heads, dim, 4, dim, dtype=dtype),
    }
    if state:
        tensors |= {"h": torch.randn(count, heads, dim, dtype=dtype).tanh(), "c": torch.randn(count, heads, dim, dtype=dtype)}
    return tensors


def form_dtype(implementation):
    return torch.float32 if implementation == "triton" else torch.float64


@pytest.mark.parametrize("implementation", FAST_FORMS)
@given(
    batch=st.sampled_from([1, 2, 17]), length=st.sampled_from([1, 2, 7]), heads=st.integers(1, 2),
    dim=st.sampled_from([16, 24, 32, 40]), state=st.booleans(), final=st.booleans(), cells=st.booleans(),
)  # fmt: skip
def test_forms_agree_with_the_definition(implementation, batch, length, heads, dim, state, final, cells):
    if batch > 2:  # the interpreter is slow
        length = min(length, 2)
    args = example(batch, length, heads, dim, form_dtype(implementation), state)
    assert_grads_close(lstm, args, {"output_final_state": final, "return_cells": cells}, implementation)


@pytest.mark.parametrize("dim", [72, 128])
def test_large_heads(dim):
    args = example(1, 4, 1, dim, torch.float16)
    args |= {"h": args["h"].float(), "c": args["c"].float()}
    assert_grads_close(lstm, args, {"output_final_state": True}, "triton", bound=4e-3, gradient_bound=1e-2)


def torch_lstm(x, weight, h, c):
    """torch.nn.LSTM of one head: the identity as its input's projection."""
    dim = weight.shape[1]
    module = torch.nn.LSTM(4 * dim, dim, batch_first=True, bias=False, dtype=x.dtype)
    recurrent = weight[0].flatten(1).T
    parameters = {"weight_ih_l0": torch.eye(4 * dim, dtype=x.dtype), "weight_hh_l0": recurrent}
    y, (last_h, last_c) = torch.func.functional_call(module, parameters, (x.flatten(2), (h.transpose(0, 1), c.transpose(0, 1))))
    return y[:, :, None], (last_h.transpose(0, 1), last_c.transpose(0, 1))


@pytest.mark.parametrize("implementation", FORMS)
def test_one_head_is_torch_lstm(implementation):
    dtype = form_dtype(implementation)
    args = example(3, 9, 1, 24, dtype)

    def run(x, weight, h, c, implementation, output_final_state):
        if implementation == "reference":
            return torch_lstm(x, weight, h, c)
        return lstm(x, weight, h, c, implementation=implementation.removeprefix("our "), output_final_state=True)

    assert_grads_close(run, args, {"output_final_state": True}, f"our {implementation}")


@pytest.mark.parametrize("implementation", FORMS)
def test_cells_before_the_output_gate(implementation):
    args = example()
    h, last = lstm(**args, output_final_state=True, implementation=implementation)
    (gate, cell), last_too = lstm(**args, output_final_state=True, return_cells=True, implementation=implementation)
    assert_close(gate * cell.tanh(), h)
    assert torch.equal(cell[:, -1], last[1])
    assert all(torch.equal(a, b) for a, b in zip(last, last_too))


@pytest.mark.parametrize("implementation", FORMS)
def test_heads_do_not_mix(implementation):
    args = example(heads=3)
    whole, _ = lstm(**args, implementation=implementation)
    for head in range(3):
        own = {n: t[head : head + 1] if n == "weight" else t.narrow(2 if n == "x" else 1, head, 1) for n, t in args.items()}
        assert_close(lstm(**own, implementation=implementation)[0], whole[:, :, head : head + 1])


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("cells", [False, True])
def test_packed_equals_separate(implementation, cells):
    cu_seqlens, lengths = packed_example([5, 0, 1, 9, 0, 2, 0, *[1, 2, 3] * 4])  # more sequences than a tile has rows
    args = example(1, sum(lengths), count=len(lengths))
    options = {"output_final_state": True, "return_cells": cells}
    output, state = lstm(**args, cu_seqlens=cu_seqlens, implementation=implementation, **options)
    for n, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(state[0][n], args["h"][n]) and torch.equal(state[1][n], args["c"][n])
            continue
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        alone = {"x": args["x"][:, rows], "weight": args["weight"], "h": args["h"][n : n + 1], "c": args["c"][n : n + 1]}
        output_alone, state_alone = lstm(**alone, implementation="reference", **options)
        for a, e in zip(output if cells else (output,), output_alone if cells else (output_alone,)):
            assert_close(a[:, rows], e)
        for a, e in zip(state, state_alone):
            assert_close(a[n], e[0])


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("state", [False, True])
def test_packed_gradients(implementation, state):
    cu_seqlens, lengths = packed_example([3, 0, 1, 7, 0, 2, 0, *[1, 2] * 6])
    args = example(1, sum(lengths), dtype=form_dtype(implementation), state=state, count=len(lengths))
    for cells in (False, True):
        options = {"output_final_state": True, "cu_seqlens": cu_seqlens, "return_cells": cells}
        assert_grads_close(lstm, args, options, implementation)


@pytest.mark.parametrize("implementation", FORMS)
def test_causal_batch_independent_and_repeatable(implementation):
    args = example(length=9)
    before, _ = lstm(**args, implementation=implementation)
    again, _ = lstm(**args, implementation=implementation)
    assert torch.equal(before, again)
    changed = {name: t.clone() for name, t in args.items()}
    changed["x"][0, 5:] += 1
    after, _ = lstm(**changed, implementation=implementation)
    assert torch.equal(before[0, :5], after[0, :5])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 5:], after[0, 5:])


@pytest.mark.parametrize("implementation", FORMS)
def test_any_split_equals_one_pass(implementation):
    args = example(1, 5)
    whole, last = lstm(**args, output_final_state=True, implementation=implementation)
    for split in range(1, 5):
        given_state, state, parts = (args["h"].clone(), args["c"].clone()), (args["h"], args["c"]), []
        for start, stop in ((0, split), *((t, t + 1) for t in range(split, 5))):
            piece = args["x"][:, start:stop]
            part, state = lstm(piece, args["weight"], *state, output_final_state=True, implementation=implementation)
            parts.append(part)
        assert_close(torch.cat(parts, dim=1), whole)
        assert_close(state[0], last[0])
        assert_close(state[1], last[1])
        assert torch.equal(given_state[0], args["h"]) and torch.equal(given_state[1], args["c"])


@pytest.mark.parametrize("cells", [False, True])
def test_gradcheck_of_the_definition(cells):
    args = {name: t.requires_grad_() for name, t in example(1, 4, 1, 16, torch.float64).items()}
    options = {"output_final_state": True, "return_cells": cells, "implementation": "reference"}

    def run(*values):
        output, state = lstm(*values, **options)
        return (*(output if cells else (output,)), *state)

    assert torch.autograd.gradcheck(run, list(args.values()), fast_mode=True)


@OVERFLOWS
@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_saturated_gates(implementation):
    """Gates at 0 and 1 and cells that grow with every token, without an overflow in an exponential."""
    args = example(1, 12, 1, dtype=form_dtype(implementation))
    args["x"] *= 200
    assert_grads_close(lstm, args, {"output_final_state": True}, implementation)
    args["x"][:, :, :, :3] = 200.0
    y, (_, c) = lstm(**args, output_final_state=True, implementation=implementation)
    assert torch.isfinite(y).all()
    assert_close(c, args["c"] + 12)


def test_finite_for_long_input():
    (gate, cell), state = lstm(**example(1, 65_536, 1, state=False), output_final_state=True, return_cells=True)
    assert all(torch.isfinite(t).all() for t in (gate, cell, *state))
    assert cell[:, -1000:].abs().max() < 10 * cell[:, 1000:2000].abs().max()


@OVERFLOWS
def test_no_gradient_reaches_a_step_far_back_through_closed_gates():
    """A forget gate that is shut cuts the cell's gradient exactly, in every form."""
    for implementation in FORMS:
        args = {name: t.requires_grad_() for name, t in example(1, 6, 1, scale=0.0).items()}
        shut = args["x"].clone()
        shut[:, 3, :, 1] = -1000.0
        y, _ = lstm(shut, args["weight"], args["h"], args["c"], implementation=implementation)
        (gradient,) = torch.autograd.grad(y[:, 4:].sum(), args["x"])
        assert not gradient[:, :3].any() and gradient[:, 4].any()


@pytest.mark.parametrize("cells", [False, True])
def test_bfloat16_in_the_interpreter(cells):
    args = example(2, 9, 1, dtype=torch.bfloat16)
    args |= {"h": args["h"].float(), "c": args["c"].float()}
    options = {"output_final_state": True, "return_cells": cells}
    assert_grads_close(lstm, args, options, "triton", bound=2e-2, gradient_bound=5e-2)


@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_parameters_may_have_a_type_of_their_own(implementation):
    args = example(2, 6, dtype=torch.bfloat16)
    args |= {name: args[name].float() for name in ("weight", "h", "c")}
    assert_grads_close(lstm, args, {"output_final_state": True}, implementation, bound=2e-2, gradient_bound=5e-2)
    y, (h, _) = lstm(**args, output_final_state=True, implementation=implementation)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("length", [1, 9])
def test_compiles_to_one_graph_and_takes_meta_tensors(implementation, length):
    args = example(length=length)

    def run(**tensors):
        (gate, cell), (h, c) = lstm(**tensors, output_final_state=True, return_cells=True, implementation=implementation)
        y, _ = lstm(**tensors, implementation=implementation)
        return gate, cell, h, c, y

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
    outputs = run(**{name: t.to("meta") for name, t in args.items()})
    assert all(o.device.type == "meta" for o in outputs)
    shapes = [(2, length, 2, 16)] * 2 + [(2, 2, 16)] * 2 + [(2, length, 2, 16)]
    assert [tuple(o.shape) for o in outputs] == shapes


@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_gradient_of_one_output_alone(implementation):
    args = {name: t.requires_grad_() for name, t in example(1, 5).items()}

    def outputs(form):
        (gate, cell), (h, c) = lstm(**args, output_final_state=True, return_cells=True, implementation=form)
        return gate, cell, h, c, lstm(**args, implementation=form)[0]

    for actual, expected in zip(outputs(implementation), outputs("reference")):
        grads = [torch.autograd.grad(o.square().sum(), list(args.values()), retain_graph=True) for o in (actual, expected)]
        for a, e in zip(*grads):
            assert_close(a, e, bound=1e-4)


def test_operators_pass_opcheck():
    from memzoo.kernels.lstm import kernel

    cu_seqlens, lengths = packed_example([3, 0, 2])
    args = example(1, sum(lengths), count=3)
    for cells in (False, True):
        inputs = (*args.values(), cells, cu_seqlens)
        torch.library.opcheck(kernel._forward, inputs, test_utils=("test_schema", "test_faketensor"))
        y, c, h, last = kernel._forward(*inputs)
        backward = (y, c if cells else None, h, last, *args.values(), y, c, cu_seqlens)
        torch.library.opcheck(kernel._backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 16)}, "x has shape [2, 3, 4, 16], needs 5 dimensions [B, T, H, 4, D]"),
        ({"x": torch.zeros(2, 3, 1, 3, 16)}, "x has shape [2, 3, 1, 3, 16], needs [B, T, H, 4, D] = [2, 3, 1, 4, 16]"),
        ({"x": torch.zeros(2, 0, 1, 4, 16)}, "B and T must both be at least 1"),
        ({"x": torch.zeros(2, 3, 1, 4, 20), "weight": torch.zeros(1, 20, 4, 20)}, "x has head dimension 20, needs a multiple of 8"),
        ({"weight": torch.zeros(1, 4, 16, 16)}, "weight has shape [1, 4, 16, 16], needs [H, D, 4, D] = [1, 16, 4, 16]"),
        ({"weight": torch.zeros(1, 16, 4, 16, dtype=torch.int64)}, "weight has dtype torch.int64"),
        ({"weight": torch.zeros(1, 16, 4, 16, device="meta")}, "weight is on meta, x is on cpu"),
        ({"initial_state": torch.zeros(2, 1, 16)}, "initial_state is a Tensor, needs a pair (h, c) of tensors [N, H, D]"),
        ({"initial_state": (None, torch.zeros(2, 1, 16))}, "initial_state[0] must be a torch.Tensor, got NoneType"),
        (
            {"initial_state": (torch.zeros(2, 1, 16), torch.zeros(1, 16))},
            "initial_state[1] has shape [1, 16], needs [N, H, D] = [2, 1, 16]",
        ),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs one of triton, chunked, reference"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
        (
            {"x": torch.zeros(1, 1, 1, 4, 136), "weight": torch.zeros(1, 136, 4, 136), "implementation": "triton"},
            "x has head dimension 136 in torch.float32, implementation 'triton' holds at most 128 in half precision and 64 in float32; "
            "use more heads, half precision or implementation='chunked'",
        ),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    args = {"x": torch.zeros(2, 3, 1, 4, 16), "weight": torch.zeros(1, 16, 4, 16)} | change
    with pytest.raises((ValueError, TypeError)) as error:
        operator(**args)
    assert message in str(error.value)
    assert str(error.value).startswith("lstm: ") and "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 128])
def test_gpu_bfloat16_at_real_size(dim, packed, cells):
    cu_seqlens, lengths = packed_example([100, 1, 0, 200, *range(60)]) if packed else (None, [200] * 40)
    args = example(1 if packed else 40, sum(lengths) if packed else 200, 8, dim, torch.bfloat16, count=len(lengths))
    args = {name: t.cuda() for name, t in args.items()}
    args |= {"h": args["h"].float(), "c": args["c"].float()}
    options = {"output_final_state": True, "return_cells": cells, "cu_seqlens": cu_seqlens.cuda() if packed else None}
    assert_grads_close(lstm, args, options, "triton", against="chunked", bound=2e-2, gradient_bound=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 32, 64])
def test_gpu_float32(dim):
    args = {name: t.cuda() for name, t in example(20, 40, 4, dim).items()}
    assert_grads_close(lstm, args, {"output_final_state": True}, "triton", against="chunked", bound=1e-4, gradient_bound=5e-4)


@pytest.mark.gpu
def test_gpu_long_input():
    y, _ = lstm(**{name: t.cuda() for name, t in example(1, 65_536, 2, 64, torch.bfloat16, state=False).items()})
    assert torch.isfinite(y).all() and y.abs().max() <= 1
