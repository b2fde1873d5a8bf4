"""gated_scan: its three forms against each other and the recurrence's closed form, the properties of every operator, bad input."""

import importlib

import pytest
import torch
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given
from hypothesis import strategies as st

from memzoo.kernels import gated_scan


@pytest.fixture(autouse=True)
def _short_spans(request, monkeypatch):
    """Spans of one group of tokens, so that small examples cross their boundaries."""
    if "gpu" not in request.keywords:
        kernel = importlib.import_module("memzoo.kernels.gated_scan.kernel")
        monkeypatch.setattr(kernel, "MIN_SPAN", 16)


def example(batch=2, length=11, dim=5, dtype=torch.float64, state=True, count=None, gates="unit"):
    """Gates mostly near 1, so that much of a state outlives a span, a few exactly 0 or 1; or, with "any", of either sign up to 1.1."""
    count = batch if count is None else count
    shape = (batch, length, dim)
    a = 0.8 + 0.2 * torch.rand(*shape, dtype=dtype)
    if gates == "any":
        a = 1.1 * a * torch.randn(*shape, dtype=dtype).sign()
    choice = torch.rand(*shape)
    a = a.masked_fill(choice < 0.03, 0.0).masked_fill(choice > 0.97, 1.0)
    tensors = {"a": a, "b": torch.randn(*shape, dtype=dtype)}
    return tensors | ({"initial_state": torch.randn(count, dim, dtype=dtype)} if state else {})


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@given(
    batch=st.integers(1, 2), length=st.integers(2, 50), dim=st.sampled_from([1, 3, 16, 130]), state=st.booleans(),
    gates=st.sampled_from(["unit", "any"]), last=st.booleans(),
)  # fmt: skip
def test_forms_agree_with_the_definition(implementation, batch, length, dim, state, gates, last):
    dtype = torch.float32 if implementation == "triton" else torch.float64
    args = example(batch, length, dim, dtype, state, gates=gates)
    assert_grads_close(gated_scan, args, {"output_final_state": last}, implementation)


@pytest.mark.parametrize(("implementation", "dtype"), [("chunked", torch.float64), ("triton", torch.float32)])
def test_one_token(implementation, dtype):
    args = example(length=1, dtype=dtype)
    assert_grads_close(gated_scan, args, {"output_final_state": True}, implementation)
    h, state = gated_scan(**args, output_final_state=True, implementation=implementation)  # without gradients: the step
    assert_close(h[:, 0], args["a"][:, 0] * args["initial_state"] + args["b"][:, 0])
    assert torch.equal(h[:, 0], state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_in_half_precision(dtype):
    args = example(1, 50, 8, torch.float32)
    args = {name: t.to(dtype) if name != "initial_state" else t for name, t in args.items()}
    assert_grads_close(gated_scan, args, {"output_final_state": True}, "triton", bound=2e-2, gradient_bound=5e-2)


LENGTHS = [
    0,
    5,
    1,
    0,
    0,
    40,
    16,
    10,
    0,
]  # with spans of 16: starts inside a span and on its edge, one over several spans, empty ones


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_packed_equals_separate(implementation):
    cu_seqlens, lengths = packed_example(LENGTHS)
    args = example(1, sum(lengths), dtype=torch.float32, count=len(lengths))
    h, state = gated_scan(**args, output_final_state=True, cu_seqlens=cu_seqlens, implementation=implementation)
    assert h.shape == args["b"].shape and state.shape == args["initial_state"].shape
    for n, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(state[n], args["initial_state"][n])
            continue
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        alone = {name: t[n : n + 1] if name == "initial_state" else t[:, rows] for name, t in args.items()}
        h_alone, state_alone = gated_scan(**alone, output_final_state=True, implementation="reference")
        assert_close(h[:, rows], h_alone)
        assert_close(state[n], state_alone[0])
    options = {"output_final_state": True, "cu_seqlens": cu_seqlens, "implementation": implementation}
    _, state = gated_scan(args["a"], args["b"], **options)
    assert not state[0].any() and not state[3:5].any() and not state[-1].any() and state[5:8].all()


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("implementation", "dtype"), [("chunked", torch.float64), ("triton", torch.float32)])
def test_packed_gradients(implementation, dtype, state, last):
    cu_seqlens, lengths = packed_example(LENGTHS)
    args = example(1, sum(lengths), dtype=dtype, state=state, count=len(lengths))
    options = {"output_final_state": last, "cu_seqlens": cu_seqlens}
    assert_grads_close(gated_scan, args, options, implementation)


def test_definition_is_the_sum_over_earlier_tokens():
    """h_t = sum_{s <= t} (prod_{s < r <= t} a_r) b_s + (prod_{r <= t} a_r) h_{-1}."""
    args = example()
    h, _ = gated_scan(**args, implementation="reference")
    a, b, first = args["a"], args["b"], args["initial_state"]
    expected = torch.zeros_like(b)
    for t in range(b.shape[1]):
        expected[:, t] = a[:, : t + 1].prod(1) * first
        for s in range(t + 1):
            expected[:, t] += a[:, s + 1 : t + 1].prod(1) * b[:, s]
    assert_close(h, expected)


@pytest.mark.parametrize("gates", ["unit", "any"])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_gradcheck(implementation, gates):
    args = example(1, 7, 2, gates=gates)
    args["a"][0, 3, 0], args["a"][0, 4, 1] = 0.0, 1.0
    names, tensors = list(args), [t.requires_grad_() for t in args.values()]

    def outputs(*values):
        return gated_scan(**dict(zip(names, values)), output_final_state=True, implementation=implementation)

    assert torch.autograd.gradcheck(outputs, tensors)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_a_gate_of_zero_resets_exactly(implementation):
    """What follows is bit for bit what it is alone, no gradient passes, and the gate's own gradient is the state it forgot."""
    args = example(1, 40, dtype=torch.float32)
    args["a"] = args["a"].clamp(min=0.1)
    args["a"][:, 20] = 0.0
    tensors = {name: t.clone().requires_grad_() for name, t in args.items()}
    h, _ = gated_scan(**tensors, implementation=implementation)
    assert torch.equal(h[:, 20], args["b"][:, 20])
    alone, _ = gated_scan(args["a"][:, 20:], args["b"][:, 20:], implementation="reference")
    assert_close(h[:, 20:].detach(), alone)
    h[:, 20:].sum().backward()
    assert not tensors["b"].grad[:, :20].any() and not tensors["a"].grad[:, :20].any() and not tensors["initial_state"].grad.any()
    assert_close(tensors["a"].grad[:, 20], (h[:, 19] * tensors["b"].grad[:, 20]).detach())


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_gates_of_one_add_up(implementation):
    b = torch.randint(-8, 9, (2, 70, 3)).float()
    h, last = gated_scan(torch.ones_like(b), b, output_final_state=True, implementation=implementation)
    assert torch.equal(h, b.cumsum(1)) and torch.equal(last, b.sum(1))


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_causal_batch_independent_and_repeatable(implementation):
    args = example(length=70, dtype=torch.float32)
    before, _ = gated_scan(**args, implementation=implementation)
    again, _ = gated_scan(**args, implementation=implementation)
    assert torch.equal(before, again)
    changed = {name: t.clone() for name, t in args.items()}
    for name in ("a", "b"):
        changed[name][0, 50:] *= 1.5
    after, _ = gated_scan(**changed, implementation=implementation)
    assert torch.equal(before[0, :50], after[0, :50])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 50:], after[0, 50:])


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_packed_sequences_are_independent_bit_for_bit(implementation):
    cu_seqlens, lengths = packed_example([20, 33, 1, 16])
    args = example(1, sum(lengths), dtype=torch.float32, count=len(lengths))
    options = {"cu_seqlens": cu_seqlens, "output_final_state": True, "implementation": implementation}
    before, last = gated_scan(**args, **options)
    changed = {name: t.clone() for name, t in args.items()}
    for name in ("a", "b"):
        changed[name][:, 20:53] *= 1.5
    changed["initial_state"][1] *= 2
    after, changed_last = gated_scan(**changed, **options)
    others = torch.arange(sum(lengths)).lt(20) | torch.arange(sum(lengths)).ge(53)
    assert torch.equal(before[:, others], after[:, others]) and torch.equal(last[[0, 2, 3]], changed_last[[0, 2, 3]])
    assert not torch.equal(before[:, 20:53], after[:, 20:53])


def test_an_infinite_sequence_spoils_no_other_in_triton():
    cu_seqlens, lengths = packed_example([20, 33, 40, 5])
    args = example(1, sum(lengths), dtype=torch.float32, count=len(lengths))
    args["b"][:, 22] = torch.inf
    args["b"][:, 23] = -torch.inf
    args = {name: t.requires_grad_() for name, t in args.items()}
    h, last = gated_scan(**args, cu_seqlens=cu_seqlens, output_final_state=True, implementation="triton")
    grads = torch.autograd.grad(h.sum() + last.sum(), list(args.values()))
    others = torch.arange(sum(lengths)).lt(20) | torch.arange(sum(lengths)).ge(53)
    assert not torch.isfinite(h[:, 20:53]).all()
    assert torch.isfinite(h[:, others]).all() and torch.isfinite(last[[0, 2, 3]]).all()
    assert torch.isfinite(grads[0][:, others]).all() and torch.isfinite(grads[1][:, others]).all()


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_any_split_equals_one_pass(implementation):
    args = example(1, 70, dtype=torch.float32)
    whole, last = gated_scan(**args, output_final_state=True, implementation=implementation)
    for sizes in ([1, 67, 1, 1], [30, 40]):
        state, parts = args["initial_state"], []
        for a, b in zip(args["a"].split(sizes, dim=1), args["b"].split(sizes, dim=1)):
            part, state = gated_scan(a, b, initial_state=state, output_final_state=True, implementation=implementation)
            parts.append(part)
        assert_close(torch.cat(parts, dim=1), whole)
        assert_close(state, last)


def test_finite_for_long_input():
    """Gates near 1, where a layer starts them: the state stays within what its gates allow, and so do all gradients."""
    args = {"a": torch.sigmoid(torch.randn(1, 65_536, 4) + 4), "b": torch.randn(1, 65_536, 4)}
    tensors = {name: t.requires_grad_() for name, t in args.items()}
    h, state = gated_scan(**tensors, output_final_state=True)
    assert torch.isfinite(h).all() and torch.isfinite(state).all()
    assert h[:, -1000:].abs().max() < 10 * h[:, 1000:2000].abs().max()
    for grad in torch.autograd.grad(h.sum() + state.sum(), list(tensors.values())):
        assert torch.isfinite(grad).all()
    expected = torch.zeros(4, dtype=torch.float64)
    for t in range(64_536, 65_536):
        expected = args["a"][0, t].double() * expected + args["b"][0, t]  # a thousand tokens forget all before them
    assert_close(state[0].detach(), expected.detach().float(), bound=1e-4)


def test_many_spans_of_one_row():
    """So many that the scan over them has several groups itself."""
    args = example(1, 330, 2, torch.float32)
    assert_grads_close(gated_scan, args, {"output_final_state": True}, "triton", against="chunked")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_compiles_to_one_graph_and_takes_meta_tensors(implementation, packed):
    cu_seqlens, lengths = packed_example([0, 30, 20]) if packed else (None, [50])
    args = example(1, 50, dtype=torch.float32, count=len(lengths))
    options = {"output_final_state": True, "implementation": implementation}

    def loss(cu_seqlens, **tensors):
        h, state = gated_scan(**tensors, **options, cu_seqlens=cu_seqlens)
        return h.sum() + state.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = {name: t.requires_grad_() for name, t in args.items()}
    expected = torch.autograd.grad(loss(cu_seqlens, **tensors), list(tensors.values()))
    for actual, e in zip(torch.autograd.grad(compiled(cu_seqlens, **tensors), list(tensors.values())), expected):
        assert_close(actual, e)
    meta = {name: t.detach().to("meta") for name, t in args.items()}
    h, state = gated_scan(**meta, **options, cu_seqlens=None if cu_seqlens is None else cu_seqlens.to("meta"))
    assert h.shape == args["b"].shape and h.device.type == "meta"
    assert state.shape == args["initial_state"].shape


def test_registered_operators_pass_torchs_checks():
    kernel = importlib.import_module("memzoo.kernels.gated_scan.kernel")
    cu_seqlens, lengths = packed_example([0, 30, 20])
    args = example(1, 50, dtype=torch.float32, count=len(lengths))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernel._forward, (*args.values(), True, cu_seqlens), test_utils=utils)
    h, last = kernel._forward(*args.values(), True, cu_seqlens)
    torch.library.opcheck(kernel._backward, (h, last, args["a"], h, args["initial_state"], cu_seqlens), test_utils=utils)
    torch.library.opcheck(kernel._step, (args["a"][:, :1], args["b"][:, :1], args["initial_state"][:1]), test_utils=utils)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_types(implementation, a_dtype, b_dtype):
    args = example(1, 40, dtype=torch.float32)
    expected, last = gated_scan(**args, output_final_state=True, implementation="reference")
    mixed = {"a": args["a"].to(a_dtype), "b": args["b"].to(b_dtype), "initial_state": args["initial_state"].half()}
    tensors = {name: t.requires_grad_() for name, t in mixed.items()}
    h, state = gated_scan(**tensors, output_final_state=True, implementation=implementation)
    assert h.dtype == b_dtype and state.dtype == torch.float32
    assert_close(h.detach(), expected, bound=2e-2)
    assert_close(state.detach(), last, bound=2e-2)
    grads = torch.autograd.grad(h.float().sum() + state.sum(), list(tensors.values()))
    assert [g.dtype for g in grads] == [a_dtype, b_dtype, torch.float16]
    one, _ = gated_scan(mixed["a"][:, :1].detach(), mixed["b"][:, :1].detach(), initial_state=last, output_final_state=True)
    assert one.dtype == b_dtype


def test_float64_anywhere_makes_a_float64_state():
    a, b = torch.rand(1, 3, 2), torch.randn(1, 3, 2)
    for tensors in ((a.double(), b), (a, b.double())):
        for implementation in ("reference", "chunked"):
            h, state = gated_scan(*tensors, output_final_state=True, implementation=implementation)
            assert h.dtype == tensors[1].dtype and state.dtype == torch.float64
        with pytest.raises(ValueError, match="gated_scan: implementation 'triton' has no float64 kernels"):
            gated_scan(*tensors, implementation="triton")


ZERO = {"a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 3, 4)}
ONE = {name: t[:1] for name, t in ZERO.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 3)}, "a has shape [2, 3], needs 3 dimensions [B, T, D]"),
        ({"a": torch.zeros(2, 0, 4)}, "B and T must both be at least 1"),
        ({"a": torch.zeros(2, 3, 0), "b": torch.zeros(2, 3, 0)}, "D must be at least 1"),
        ({"b": torch.zeros(2, 3, 5)}, "b has shape [2, 3, 5], needs [B, T, D] = [2, 3, 4]"),
        ({"a": ZERO["a"].long()}, "a has dtype torch.int64"),
        ({"b": None}, "b must be a torch.Tensor, got NoneType"),
        ({"b": ZERO["b"].to("meta")}, "b is on meta, a is on cpu"),
        ({"initial_state": torch.zeros(2, 5)}, "initial_state has shape [2, 5], needs [N, D] = [2, 4]"),
        ({"initial_state": torch.zeros(2, 4).bool()}, "initial_state has dtype torch.bool"),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs one of triton, chunked, reference"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
        ({**ONE, "cu_seqlens": torch.tensor([0, 4])}, "end at T = 3"),
        ({**ONE, "cu_seqlens": torch.tensor([0, 1, 3]), "initial_state": torch.zeros(1, 4)}, "needs [N, D] = [2, 4]"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    with pytest.raises((ValueError, TypeError)) as error:
        gated_scan(**{**ZERO, **change})
    assert message in str(error.value)
    assert str(error.value).startswith("gated_scan: ") and "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [None, [1000, 1, 0, 7000, 191], [256] * 64])
@pytest.mark.parametrize("dim", [96, 1024])
def test_gpu_bfloat16_at_real_size(dim, packed):
    cu_seqlens, lengths = packed_example(packed) if packed else (None, [8192])
    args = example(1, sum(lengths), dim, torch.float32, count=len(lengths))
    args["a"] = torch.sigmoid(torch.randn_like(args["a"]) + 3) * (torch.rand_like(args["a"]) > 0.01)
    args["b"] = args["b"].bfloat16()
    args = {name: t.cuda() for name, t in args.items()}
    options = {"output_final_state": True, "cu_seqlens": None if cu_seqlens is None else cu_seqlens.cuda()}
    assert_grads_close(gated_scan, args, options, "triton", against="chunked", bound=2e-2, gradient_bound=5e-2)
