"""causal_conv1d: its three forms against each other and torch, the properties of every operator, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given
from hypothesis import strategies as st

from memzoo.kernels import causal_conv1d


def example(batch=2, length=11, channels=8, width=4, dtype=torch.float64, bias=True, state=True, count=None):
    count = batch if count is None else count
    tensors = {
        "x": torch.randn(batch, length, channels, dtype=dtype),
        "weight": torch.randn(channels, width, dtype=dtype),
        "bias": torch.randn(channels, dtype=dtype) if bias else None,
        "initial_state": torch.randn(count, width - 1, channels, dtype=dtype) if state else None,
    }
    return {name: t for name, t in tensors.items() if t is not None}


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@given(
    batch=st.integers(1, 3), length=st.integers(1, 70), channels=st.sampled_from([1, 8, 24, 72]), width=st.integers(1, 5),
    bias=st.booleans(), state=st.booleans(), silu=st.booleans(),
)  # fmt: skip
def test_forms_agree_with_the_definition(implementation, batch, length, channels, width, bias, state, silu):
    dtype = torch.float32 if implementation == "triton" else torch.float64
    args = example(batch, length, channels, width, dtype, bias, state)
    options = {"activation": "silu" if silu else None, "output_final_state": True}
    assert_grads_close(causal_conv1d, args, options, implementation)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_packed_equals_separate(implementation):
    cu_seqlens, lengths = packed_example([5, 0, 1, 40, 2])
    args = example(1, sum(lengths), 8, 4, torch.float32, count=len(lengths))
    y, state = causal_conv1d(**args, output_final_state=True, cu_seqlens=cu_seqlens, implementation=implementation)
    for n, length in enumerate(lengths):
        if length == 0:
            assert_close(state[n], args["initial_state"][n])
            continue
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        alone = {**args, "x": args["x"][:, rows], "initial_state": args["initial_state"][n : n + 1]}
        y_alone, state_alone = causal_conv1d(**alone, output_final_state=True, implementation="reference")
        assert_close(y[:, rows], y_alone)
        assert_close(state[n], state_alone[0])


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_packed_gradients(implementation):
    cu_seqlens, lengths = packed_example([5, 0, 1, 40, 2])
    dtype = torch.float32 if implementation == "triton" else torch.float64
    args = example(1, sum(lengths), 8, 4, dtype, count=len(lengths))
    options = {"activation": "silu", "output_final_state": True, "cu_seqlens": cu_seqlens}
    assert_grads_close(causal_conv1d, args, options, implementation)


def test_definition_is_torchs_convolution():
    args = example(state=False)
    y, _ = causal_conv1d(**args, implementation="reference")
    padded = F.pad(args["x"].transpose(1, 2), (3, 0))
    expected = F.conv1d(padded, args["weight"][:, None], args["bias"], groups=8).transpose(1, 2)
    assert_close(y, expected)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_causal_and_batch_independent(implementation):
    args = example(length=40, dtype=torch.float32)
    before, _ = causal_conv1d(**args, activation="silu", implementation=implementation)
    changed = {**args, "x": args["x"].clone()}
    changed["x"][0, 17:] += 1
    after, _ = causal_conv1d(**changed, activation="silu", implementation=implementation)
    assert torch.equal(before[0, :17], after[0, :17])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 17:], after[0, 17:])


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_any_split_equals_one_pass(implementation):
    args = example(length=9, dtype=torch.float32)
    whole, last = causal_conv1d(**args, output_final_state=True, implementation=implementation)
    again, _ = causal_conv1d(**args, output_final_state=True, implementation=implementation)
    assert torch.equal(whole, again)
    for split in range(1, 9):
        state, parts = args["initial_state"], []
        for piece in (args["x"][:, :split], *args["x"][:, split:].split(1, dim=1)):
            part, state = causal_conv1d(
                piece, args["weight"], args["bias"], initial_state=state, output_final_state=True, implementation=implementation
            )
            parts.append(part)
        assert_close(torch.cat(parts, dim=1), whole)
        assert_close(state, last)


def test_gradcheck_of_the_definition():
    args = {name: t.requires_grad_() for name, t in example(1, 5, 3, 3).items()}
    names, tensors = list(args), list(args.values())

    def run(*values):
        return causal_conv1d(**dict(zip(names, values)), activation="silu", output_final_state=True, implementation="reference")

    assert torch.autograd.gradcheck(run, tensors)


def test_finite_for_long_input():
    args = example(1, 65_536, 4, 4, torch.float32)
    y, _ = causal_conv1d(**args, activation="silu")
    assert torch.isfinite(y).all()
    assert y[:, -1000:].abs().max() < 10 * y[:, :1000].abs().max()


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_compiles_to_one_graph_and_takes_meta_tensors(implementation):
    args = example(dtype=torch.float32)

    def run(**tensors):
        return causal_conv1d(**tensors, activation="silu", implementation=implementation)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**args), run(**args))
    meta = run(**{name: t.to("meta") for name, t in args.items()})
    assert meta.shape == args["x"].shape and meta.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, "x has shape [2, 8], needs 3 dimensions [B, T, C]"),
        ({"x": torch.zeros(2, 0, 8)}, "B and T must both be at least 1"),
        ({"weight": torch.zeros(7, 4)}, "weight has shape [7, 4], needs [C, W] = [8, 4]"),
        ({"weight": torch.zeros(8, 17)}, "weight has width 17, needs 1 to 16"),
        ({"weight": torch.zeros(8, 4, dtype=torch.float16)}, "weight has dtype torch.float16, x has torch.float32"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"initial_state": torch.zeros(2, 4, 8)}, "initial_state has shape [2, 4, 8], needs [N, W - 1, C] = [2, 3, 8]"),
        ({"activation": "relu"}, "activation is 'relu', needs None or 'silu'"),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs one of triton, chunked, reference"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
        ({"x": torch.zeros(1, 3, 8), "cu_seqlens": torch.tensor([0, 4])}, "end at T = 3"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    args = {"x": torch.zeros(2, 3, 8), "weight": torch.zeros(8, 4), **change}
    with pytest.raises((ValueError, TypeError)) as error:
        causal_conv1d(**args)
    assert message in str(error.value)
    assert str(error.value).startswith("causal_conv1d: ") and "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_bfloat16_at_real_size(packed):
    cu_seqlens, lengths = packed_example([1000, 1, 0, 3000, 95]) if packed else (None, [4096])
    args = example(1, sum(lengths), 1536, 4, torch.bfloat16, count=len(lengths))
    args = {name: t.cuda() for name, t in args.items()}
    options = {"activation": "silu", "cu_seqlens": None if cu_seqlens is None else cu_seqlens.cuda()}
    assert_grads_close(causal_conv1d, args, options, "triton", against="chunked")
