"""linear_attention: its three forms against each other and the paper's masked matrix, the properties of every operator, bad input."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given
from hypothesis import strategies as st

from memzoo.kernels import linear_attention


@pytest.fixture(autouse=True)
def _short_spans(request, monkeypatch):
    """Spans of one chunk, so that small examples cross their boundaries; at most 64 tokens are still one span."""
    if "gpu" not in request.keywords:
        kernel = importlib.import_module("memzoo.kernels.linear_attention.kernel")
        monkeypatch.setattr(kernel, "MIN_SPAN", 64)


def example(
    batch=2, length=11, heads=2, key_dim=16, value_dim=24, dtype=torch.float64, normalize=False, decay=True, state=True, count=None
):
    count = batch if count is None else count
    positive = (lambda x: F.elu(x) + 1) if normalize else (lambda x: x)
    tensors = {
        "q": positive(torch.randn(batch, length, heads, key_dim, dtype=dtype)),
        "k": positive(torch.randn(batch, length, heads, key_dim, dtype=dtype)),
        "v": torch.randn(batch, length, heads, value_dim, dtype=dtype),
        "log_decay": -torch.rand(batch, length, heads, dtype=dtype) if decay else None,
        "S": torch.randn(count, heads, key_dim, value_dim, dtype=dtype) if state else None,
        "z": 1 + torch.rand(count, heads, key_dim, dtype=dtype) if state and normalize else None,
    }
    return {name: t for name, t in tensors.items() if t is not None}


def run(q, k, v, log_decay=None, S=None, z=None, normalize=False, **options):
    """linear_attention with its state's parts as separate arguments."""
    state = None if S is None else (S, z) if normalize else S
    return linear_attention(q, k, v, log_decay, initial_state=state, normalize=normalize, **options)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@given(
    batch=st.integers(1, 2), length=st.integers(2, 130), heads=st.integers(1, 2), key_dim=st.sampled_from([16, 24, 40]),
    value_dim=st.sampled_from([16, 32, 72]), normalize=st.booleans(), decay=st.booleans(), state=st.booleans(),
)  # fmt: skip
def test_forms_agree_with_the_definition(implementation, batch, length, heads, key_dim, value_dim, normalize, decay, state):
    dtype = torch.float32 if implementation == "triton" else torch.float64
    args = example(batch, length, heads, key_dim, value_dim, dtype, normalize, decay, state)
    assert_grads_close(run, args, {"normalize": normalize, "scale": 0.3, "output_final_state": True}, implementation)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("implementation", "dtype"), [("chunked", torch.float64), ("triton", torch.float32)])
def test_one_token(implementation, dtype, normalize):
    args = example(length=1, dtype=dtype, normalize=normalize)
    options = {"normalize": normalize, "output_final_state": True}
    assert_grads_close(run, args, options, implementation)
    y, state = run(**args, **options, implementation=implementation)  # without gradients: the step
    expected, expected_state = run(**{n: t.double() for n, t in args.items()}, **options, implementation="reference")
    assert_close(y, expected)
    for part, expected_part in zip(state if normalize else [state], expected_state if normalize else [expected_state]):
        assert_close(part, expected_part)


@pytest.mark.parametrize("key_dim, value_dim", [(136, 24), (24, 136)])
def test_triton_at_large_head_dimensions(key_dim, value_dim):
    args = example(1, 66, 1, key_dim, value_dim, torch.float32, normalize=True)
    assert_grads_close(run, args, {"normalize": True, "scale": key_dim**-0.5, "output_final_state": True}, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_in_half_precision(dtype):
    args = example(1, 100, 1, 32, 32, normalize=True, dtype=torch.float32)
    args = {n: t.to(dtype) if n in "qkv" else t for n, t in args.items()}
    assert_grads_close(run, args, {"normalize": True, "output_final_state": True}, "triton", bound=2e-2, gradient_bound=5e-2)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_packed_equals_separate(implementation, normalize):
    cu_seqlens, lengths = packed_example([0, 5, 1, 70, 0])
    args = example(1, sum(lengths), 1, dtype=torch.float32, normalize=normalize, count=len(lengths))
    options = {"normalize": normalize, "output_final_state": True}
    y, state = run(**args, **options, cu_seqlens=cu_seqlens, implementation=implementation)
    parts = state if normalize else [state]
    for n, length in enumerate(lengths):
        if length == 0:
            for part, name in zip(parts, ["S", "z"]):
                assert torch.equal(part[n], args[name][n])
            continue
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        alone = {name: t[n : n + 1] if name in ("S", "z") else t[:, rows] for name, t in args.items()}
        y_alone, state_alone = run(**alone, **options, implementation="reference")
        assert_close(y[:, rows], y_alone)
        for part, part_alone in zip(parts, state_alone if normalize else [state_alone]):
            assert_close(part[n], part_alone[0])
    _, state = linear_attention(
        args["q"], args["k"], args["v"], output_final_state=True, cu_seqlens=cu_seqlens, implementation=implementation
    )
    assert not state[0].any() and not state[-1].any()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("implementation", "dtype"), [("chunked", torch.float64), ("triton", torch.float32)])
def test_packed_gradients(implementation, dtype, normalize):
    cu_seqlens, lengths = packed_example([5, 0, 1, 70, 2])
    args = example(1, sum(lengths), 1, dtype=dtype, normalize=normalize, count=len(lengths))
    options = {"normalize": normalize, "output_final_state": True, "cu_seqlens": cu_seqlens}
    assert_grads_close(run, args, options, implementation)


@pytest.mark.parametrize("normalize", [False, True])
def test_definition_is_the_masked_matrix_of_the_paper(normalize):
    """y = (M . q k^T) v with M the causal mask times the decay between the two tokens; rows divided by their sums."""
    args = example(normalize=normalize, state=False)
    y, _ = run(**args, normalize=normalize, scale=0.7, implementation="reference")
    q, k, v, g = args["q"], args["k"], args["v"], args["log_decay"]
    length = q.shape[1]
    between = torch.zeros(2, length, length, 2, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            between[:, i, j] = g[:, j + 1 : i + 1].sum(1).exp()
    scores = 0.7 * torch.einsum("bihd,bjhd->bijh", q, k) * between
    expected = torch.einsum("bijh,bjhd->bihd", scores, v)
    if normalize:
        expected = expected / (scores.sum(2) + 1e-6)[..., None]
    assert_close(y, expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_of_the_definition(normalize):
    args = {name: t.requires_grad_() for name, t in example(1, 4, 1, 16, 16, normalize=normalize).items()}
    names, tensors = list(args), list(args.values())

    def outputs(*values):
        y, state = run(**dict(zip(names, values)), normalize=normalize, output_final_state=True, implementation="reference")
        return (y, *state) if normalize else (y, state)

    assert torch.autograd.gradcheck(outputs, tensors)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_causal_batch_independent_and_repeatable(implementation, normalize):
    args = example(length=80, heads=1, dtype=torch.float32, normalize=normalize)
    before, _ = run(**args, normalize=normalize, implementation=implementation)
    again, _ = run(**args, normalize=normalize, implementation=implementation)
    assert torch.equal(before, again)
    changed = {name: t.clone() for name, t in args.items()}
    for name in ("q", "k", "v", "log_decay"):
        changed[name][0, 70:] *= 1.5
    after, _ = run(**changed, normalize=normalize, implementation=implementation)
    assert torch.equal(before[0, :70], after[0, :70])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 70:], after[0, 70:])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_any_split_equals_one_pass(implementation, normalize):
    args = example(1, 70, 1, dtype=torch.float32, normalize=normalize)
    whole, last = run(**args, normalize=normalize, output_final_state=True, implementation=implementation)
    tokens = {name: t for name, t in args.items() if name not in ("S", "z")}
    for sizes in ([1, 67, 1, 1], [30, 40]):
        state, parts = (args["S"], args["z"]) if normalize else args["S"], []
        for piece in zip(*(t.split(sizes, dim=1) for t in tokens.values())):
            part, state = linear_attention(
                **dict(zip(tokens, piece)), normalize=normalize, initial_state=state, output_final_state=True,
                implementation=implementation,
            )  # fmt: skip
            parts.append(part)
        assert_close(torch.cat(parts, dim=1), whole)
        for part, expected in zip(state if normalize else [state], last if normalize else [last]):
            assert_close(part, expected)


@pytest.mark.parametrize(("normalize", "decay"), [(True, False), (True, True), (False, True)])
def test_finite_for_long_input(normalize, decay):
    args = example(1, 65_536, 1, 16, 16, torch.float32, normalize=normalize, decay=decay, state=False)
    y, state = run(**args, normalize=normalize, output_final_state=True)
    assert torch.isfinite(y).all()
    assert y[:, -1000:].abs().max() < 10 * y[:, :1000].abs().max()
    assert all(torch.isfinite(part).all() for part in (state if normalize else [state]))


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_strong_decays_forget_and_stay_finite(implementation):
    args = example(1, 130, 1, dtype=torch.float32)
    for g in (-50.0, -1e4, -torch.inf):
        args["log_decay"] = torch.where(torch.arange(130) % 3 == 0, g, -0.01).expand(1, 1, 130).transpose(1, 2).contiguous()
        tensors = {name: t.clone().requires_grad_() for name, t in args.items()}
        y, state = run(**tensors, output_final_state=True, implementation=implementation)
        (y.sum() + state.sum()).backward()
        assert all(torch.isfinite(t.grad).all() for t in tensors.values())
        expected, _ = run(**args, implementation="reference")
        assert_close(y.detach(), expected, bound=1e-3)
        alone, _ = run(**{n: t[:, 129:] for n, t in args.items() if n != "S"}, implementation="reference")
        assert_close(y[:, 129:].detach(), alone, bound=1e-5)  # token 129 starts anew: nothing before it is left


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_compiles_to_one_graph_and_takes_meta_tensors(implementation, normalize):
    args = example(1, 70, 1, dtype=torch.float32, normalize=normalize)

    def loss(**tensors):
        y, state = run(**tensors, normalize=normalize, output_final_state=True, implementation=implementation)
        return y.sum() + (state[0].sum() + state[1].sum() if normalize else state.sum())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = {name: t.requires_grad_() for name, t in args.items()}
    expected = torch.autograd.grad(loss(**tensors), list(tensors.values()))
    for a, e in zip(torch.autograd.grad(compiled(**tensors), list(tensors.values())), expected):
        assert_close(a, e)
    meta = {name: t.detach().to("meta") for name, t in args.items()}
    y, state = run(**meta, normalize=normalize, output_final_state=True, implementation=implementation)
    assert y.shape == args["v"].shape and y.device.type == "meta"
    assert (state[0] if normalize else state).shape == args["S"].shape


def test_registered_operators_pass_torchs_checks():
    kernel = importlib.import_module("memzoo.kernels.linear_attention.kernel")
    args = example(1, 70, 1, dtype=torch.float32)
    inputs = (args["q"], args["k"], args["v"], args["log_decay"], False, 1.0, args["S"].flatten(2), True, None)
    torch.library.opcheck(kernel._forward, inputs, test_utils=("test_schema", "test_faketensor"))
    outputs = kernel._forward(*inputs)
    backward = (outputs[0], outputs[1], *inputs[:7], None, None, *outputs[1:])
    torch.library.opcheck(kernel._backward, backward, test_utils=("test_schema", "test_faketensor"))
    step = [t[:, :1] if n != "S" else t for n, t in args.items()]
    torch.library.opcheck(kernel._step, (*step[:4], 1.0, step[4], None), test_utils=("test_schema", "test_faketensor"))


def test_mixed_types():
    args = example(1, 40, 1, dtype=torch.float32)
    expected, last = run(**args, output_final_state=True)
    half = {name: t.bfloat16() if name in "qkv" else t for name, t in args.items()}
    for implementation in ("reference", "chunked", "triton"):
        y, state = run(**half, output_final_state=True, implementation=implementation)
        assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
        assert_close(y, expected, bound=2e-2)
        assert_close(state, last, bound=2e-2)


ZERO = {"q": torch.zeros(2, 3, 1, 16), "k": torch.zeros(2, 3, 1, 16), "v": torch.zeros(2, 3, 1, 24)}
ONE = {name: t[:1] for name, t in ZERO.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, "q has shape [2, 3, 16], needs 4 dimensions [B, T, H, Dk]"),
        ({"q": torch.zeros(2, 0, 1, 16)}, "B and T must both be at least 1"),
        ({"k": torch.zeros(2, 3, 1, 24)}, "k has shape [2, 3, 1, 24], needs [B, T, H, Dk] = [2, 3, 1, 16]"),
        ({"v": torch.zeros(2, 4, 1, 24)}, "v has shape [2, 4, 1, 24], needs [B, T, H, Dv] = [2, 3, 1, 24]"),
        ({"v": torch.zeros(2, 3, 1, 20)}, "v has head dimension 20, needs a multiple of 8 from 16 to 256"),
        ({"v": ZERO["v"].half()}, "v has dtype torch.float16, q has torch.float32"),
        ({"q": ZERO["q"].long()}, "q has dtype torch.int64"),
        ({"q": None}, "q must be a torch.Tensor, got NoneType"),
        ({"log_decay": torch.zeros(2, 3)}, "log_decay has shape [2, 3], needs [B, T, H] = [2, 3, 1]"),
        ({"initial_state": torch.zeros(2, 1, 24, 16)}, "needs [N, H, Dk, Dv] = [2, 1, 16, 24]"),
        ({"initial_state": torch.zeros(2, 1, 16, 24), "normalize": True}, "initial_state must be the pair (S, z)"),
        ({"initial_state": (torch.zeros(2, 1, 16, 24),) * 2, "normalize": True}, "needs [N, H, Dk] = [2, 1, 16]"),
        ({"initial_state": (torch.zeros(2, 1, 16, 24),) * 2}, "initial_state must be a torch.Tensor, got tuple"),
        ({"scale": None}, "scale must be a float, got NoneType"),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs one of triton, chunked, reference"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
        ({**ONE, "cu_seqlens": torch.tensor([0, 4])}, "end at T = 3"),
        ({"q": torch.zeros(2, 3, 0, 16), "k": torch.zeros(2, 3, 0, 16), "v": torch.zeros(2, 3, 0, 24)}, "H must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    with pytest.raises((ValueError, TypeError)) as error:
        linear_attention(**{**ZERO, **change})
    assert message in str(error.value)
    assert str(error.value).startswith("linear_attention: ") and "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_gpu_bfloat16_at_real_size(size, packed, normalize):
    cu_seqlens, lengths = packed_example([1000, 1, 0, 7000, 191]) if packed else (None, [8192])
    args = example(1, sum(lengths), 16, size, size, torch.float32, normalize=normalize, count=len(lengths))
    args["log_decay"] *= 0.05
    args = {n: (t * (size**-0.25 if n in "qk" else 1)).bfloat16() if n in "qkv" else t for n, t in args.items()}
    args = {n: t.cuda() for n, t in args.items()}
    options = {"normalize": normalize, "output_final_state": True, "cu_seqlens": None if cu_seqlens is None else cu_seqlens.cuda()}
    assert_grads_close(run, args, options, "triton", against="chunked", bound=2e-2, gradient_bound=5e-2)
