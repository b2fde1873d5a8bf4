"""neural_memory, the Triton form at depth 1: against the definition, over several windows of chunks, and its decode step."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example

from memzoo.kernels import NeuralMemoryState, neural_memory
from memzoo.kernels.neural_memory import matrix

PARTS = NeuralMemoryState._fields[:3]


def example(batch=2, length=37, heads=2, dim=16, value_dim=None, dtype=torch.float32, count=None, state=False, lr=1.0):
    """Tensor arguments by name; a state's are weights, momentum and start, and without one `matrix` is M_0. Some gates are 0 or 1."""
    value_dim = dim if value_dim is None else value_dim
    tensors = {
        "q": F.normalize(torch.randn(batch, length, heads, dim), dim=-1).to(dtype),
        "k": F.normalize(torch.randn(batch, length, heads, dim), dim=-1).to(dtype),
        "v": torch.randn(batch, length, heads, value_dim, dtype=dtype),
    }
    for name, largest in (("lr", lr), ("eta", 1.0), ("alpha", 0.3)):
        gate = largest * torch.rand(batch, length, heads)
        sharp = torch.rand_like(gate)
        tensors[name] = torch.where(sharp < 0.1, 0.0, torch.where((sharp > 0.9) & (largest == 1.0), 1.0, gate))
    if not state:
        tensors["matrix"] = torch.randn(heads, dim, value_dim) * dim**-0.5
    for part in PARTS if state else ():
        tensors[part] = torch.randn(batch if count is None else count, heads, dim, value_dim) * dim**-0.5
    return tensors


def run(q, k, v, lr, eta, alpha, matrix=None, weights=None, momentum=None, start=None, position=None, **options):
    """neural_memory on the arguments of `example`: the output, and the parts of the last state."""
    state, first = None, matrix
    if position is not None:
        state, first = NeuralMemoryState((weights,), (momentum,), (start,), position), weights[0]
    y, last = neural_memory(q, k, v, lr, eta, alpha, (first,), initial_state=state, output_final_state=True, **options)
    return (y, *last[:3])


def several_windows(monkeypatch):
    monkeypatch.setattr(matrix, "SCRATCH_BYTES", 0)  # leaves the square root of the number of chunks


@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize(
    ("loss", "residual", "dim", "value_dim", "chunk", "position"),
    [
        ("l2", False, 16, 16, 16, None),
        ("l2", False, 24, 40, 16, [9, 0]),
        ("l2", True, 24, 24, 16, [0, 15]),
        ("dot", True, 16, 16, 32, [31, 3]),
        ("dot", False, 40, 16, 16, None),
    ],
)
def test_agrees_with_the_definition(loss, residual, dim, value_dim, chunk, position, clamp):
    args = example(2, 37, 1, dim, value_dim, state=position is not None)
    options = {"loss": loss, "residual": residual, "max_grad_norm": clamp, "chunk_size": chunk}
    options["position"] = None if position is None else torch.tensor(position)
    assert_grads_close(run, args, options, "triton")


@pytest.mark.parametrize(("chunk", "length"), [(64, 70), (128, 140)])
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_long_chunks(chunk, length, clamp):
    assert_grads_close(run, example(1, length, 1), {"residual": True, "max_grad_norm": clamp, "chunk_size": chunk}, "triton")


@pytest.mark.parametrize("clamp", [None, 0.7])
def test_several_windows(monkeypatch, clamp):
    several_windows(monkeypatch)
    args = example(1, 85, 1, 16, 40)
    assert_grads_close(run, args, {"residual": False, "max_grad_norm": clamp, "chunk_size": 16}, "triton")


@pytest.mark.parametrize("position", [None, [3, 4, 15, 0, 9, 0]])
@pytest.mark.parametrize("windows", [False, True])
def test_packed_gradients(monkeypatch, position, windows):
    if windows:
        several_windows(monkeypatch)
    cu_seqlens, lengths = packed_example([5, 0, 18, 1, 40, 0])
    args = example(1, sum(lengths), 1, 16, 24, count=len(lengths), state=position is not None)
    options = {"residual": False, "chunk_size": 16, "cu_seqlens": cu_seqlens, "max_grad_norm": 0.7 if windows else None}
    options["position"] = None if position is None else torch.tensor(position)
    assert_grads_close(run, args, options, "triton")


def test_some_tokens_are_clamped_and_some_are_not():
    """What the tests above rely on."""
    args = example(2, 37, 1)
    y, *_ = run(**args, chunk_size=16, implementation="triton")
    clamped, *_ = run(**args, chunk_size=16, max_grad_norm=0.7, implementation="triton")
    norms = args["v"].sub(torch.einsum("hkv,bthk->bthv", args["matrix"], args["k"])).norm(dim=-1)[:, :16]
    assert not torch.allclose(y, clamped)
    args["v"] *= 0.25  # at the first chunk's weights some gradients are then small
    norms = args["v"].sub(torch.einsum("hkv,bthk->bthv", args["matrix"], args["k"])).norm(dim=-1)[:, :16]
    assert (norms < 1.5).any() and (norms > 1.5).any()
    assert_grads_close(run, args, {"residual": False, "max_grad_norm": 1.5, "chunk_size": 16}, "triton")


def test_gradient_of_one_output_alone():
    args = {name: t.requires_grad_() for name, t in example(1, 21, 1, state=True).items()}
    options = {"chunk_size": 16, "position": torch.tensor([5])}
    outputs, expected = run(**args, **options, implementation="triton"), run(**args, **options, implementation="reference")
    for actual, wanted in zip((outputs[0], *(part[0] for part in outputs[1:])), (expected[0], *(part[0] for part in expected[1:]))):
        for a, e in zip(
            *(torch.autograd.grad(o.sum(), list(args.values()), retain_graph=True, allow_unused=True) for o in (actual, wanted))
        ):
            assert_close(a, torch.zeros_like(a) if e is None else e, 1e-4)


def test_bfloat16():
    args = example(1, 40, 1, dtype=torch.bfloat16)
    for clamp in (None, 0.7):
        options = {"residual": True, "max_grad_norm": clamp, "chunk_size": 16}
        assert_grads_close(run, args, options, "triton", bound=2e-2, gradient_bound=5e-2)


@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize(
    ("loss", "dim", "value_dim", "residual"), [("l2", 16, 16, True), ("l2", 40, 72, False), ("dot", 24, 24, True)]
)
def test_step_equals_the_definition(loss, dim, value_dim, residual, clamp):
    """At a chunk's start, inside it, and where it closes."""
    args = example(3, 1, 2, dim, value_dim, state=True)
    options = {"loss": loss, "residual": residual, "max_grad_norm": clamp, "chunk_size": 16, "position": torch.tensor([0, 7, 15])}
    kept = {name: t.clone() for name, t in args.items()}
    with torch.no_grad():
        actual = run(**args, **options, implementation="triton")
    for a, e in zip(actual, run(**args, **options, implementation="reference")):
        assert_close(a if a is actual[0] else a[0], e if a is actual[0] else e[0])
    assert all(torch.equal(args[name], t) for name, t in kept.items())


@torch.no_grad()
def test_steps_after_a_part_equal_one_pass():
    args = example(2, 40, 1, 16, 24)
    first = args.pop("matrix")
    tokens = ("q", "k", "v", "lr", "eta", "alpha")
    options = {"chunk_size": 16, "output_final_state": True, "implementation": "triton"}
    whole, last = neural_memory(*args.values(), (first,), **options)
    state, parts = None, []
    for begin, end in ((0, 13), *((t, t + 1) for t in range(13, 35)), (35, 40)):
        part, state = neural_memory(*(args[name][:, begin:end] for name in tokens), (first,), initial_state=state, **options)
        parts.append(part)
    assert_close(torch.cat(parts, 1), whole)
    for name in PARTS:
        assert_close(getattr(state, name)[0], getattr(last, name)[0])
    assert torch.equal(state.position, last.position)


@torch.no_grad()
def test_causal_and_repeatable():
    args = example(1, 40, 1)
    options = {"chunk_size": 16, "max_grad_norm": 0.7, "implementation": "triton"}
    before, again = run(**args, **options)[0], run(**args, **options)[0]
    assert torch.equal(before, again)
    for name in ("q", "k", "v"):
        args[name] = args[name].clone()
        args[name][:, 21:] += 1
    after = run(**args, **options)[0]
    assert torch.equal(before[:, :21], after[:, :21]) and not torch.equal(before[:, 21:], after[:, 21:])


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 128), (128, 96), (40, 128)])
@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_gpu_bfloat16_at_real_size(dim, value_dim, chunk, packed):
    cu_seqlens, lengths = packed_example([1000, 1, 0, 2000, 95]) if packed else (None, [2048])
    # A step of lr over all of a chunk's keys must not overshoot, or the errors grow from chunk to chunk.
    args = example(
        1, sum(lengths), 8, dim, value_dim, torch.bfloat16, count=len(lengths), state=packed, lr=min(1.0, 0.3 * dim / chunk)
    )
    args["eta"] *= 0.5
    args = {name: t.cuda() for name, t in args.items()}
    for clamp in (None, 0.7):
        options = {"residual": dim == value_dim, "max_grad_norm": clamp, "chunk_size": chunk}
        options["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.cuda()
        options["position"] = torch.arange(len(lengths)).cuda() * 3 if packed else None
        assert_grads_close(run, args, options, "triton", against="chunked", bound=2e-2, gradient_bound=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_gpu_float32_windows_and_step(monkeypatch, dim, clamp):
    several_windows(monkeypatch)
    args = {name: t.cuda() for name, t in example(2, 300, 4, dim, state=True, lr=0.5).items()}
    args["eta"] *= 0.5
    options = {"chunk_size": 64, "max_grad_norm": clamp, "position": torch.tensor([11, 0]).cuda()}
    assert_grads_close(run, args, options, "triton", "chunked", bound=1e-4, gradient_bound=5e-4)
    step = {name: t if name in PARTS else t[:, :1] for name, t in args.items()}
    with torch.no_grad():
        actual = run(**step, **options, implementation="triton")
    expected = run(**step, **options, implementation="reference")
    assert_close(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:]):
        assert_close(a[0], e[0])
