"""online_scores: scores, sums and gradients against running means taken token by token in float64."""

import pytest
import torch
from checks import BOUND, assert_close, packed_example

from memzoo.kernels.memory_caching import online
from memzoo.kernels.memory_caching.online import online_scores

LENGTHS = [5, 0, 130, 1, 64, 0]


def definition(u, k, cu_pieces, carried_sum, carried_count):
    """(scores, sums) token by token, in the inputs' type."""
    pieces = cu_pieces.numel() - 1
    rows, sums = [], []
    for p in range(pieces):
        total = u.new_zeros(u.shape[2:]) if carried_sum is None else carried_sum[p]
        count = 0 if carried_count is None else int(carried_count[p])
        for t in range(int(cu_pieces[p]), int(cu_pieces[p + 1])):
            total, count = total + k[0, t], count + 1
            rows.append((u[0, t] * total / count).sum(-1))
        sums.append(total)
    return torch.stack(rows)[None], torch.stack(sums)


def example(lengths=LENGTHS, heads=2, dim=16, dtype=torch.float32, carried=True):
    cu_pieces, _ = packed_example(lengths)
    total, pieces = sum(lengths), len(lengths)
    return {
        "u": torch.randn(1, total, heads, dim).to(dtype),
        "k": torch.randn(1, total, heads, dim).to(dtype),
        "carried_sum": 3 * torch.randn(pieces, heads, dim) if carried else None,
    }, (cu_pieces, torch.arange(pieces) * 3 if carried else None)


def outputs_and_gradients(function, tensors, where, dtype=None, of=(True, True)):
    tensors = {n: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    cu_pieces, count = where
    outputs = function(tensors["u"], tensors["k"], cu_pieces, tensors["carried_sum"], count)
    weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).cos().view(o.shape) for o in outputs]
    loss = sum((o.double() * w).sum() for o, w, wanted in zip(outputs, weights, of) if wanted)
    given = {n: t for n, t in tensors.items() if t is not None}
    grads = torch.autograd.grad(loss, list(given.values()), materialize_grads=True)
    return [o.detach() for o in outputs], dict(zip(given, grads))


def check(bound=None, gradient_bound=None, of=(True, True), **options):
    tensors, where = example(**options)
    actual, actual_grads = outputs_and_gradients(online_scores, tensors, where, of=of)
    expected, expected_grads = outputs_and_gradients(definition, tensors, where, torch.float64, of)
    for name, a, e in zip(("scores", "sums"), actual, expected):
        assert a.dtype == torch.float32
        assert_close(a, e, bound, name)
    for name, e in expected_grads.items():
        assert actual_grads[name].dtype == tensors[name].dtype
        assert_close(actual_grads[name], e, gradient_bound or 5 * BOUND[torch.float32], f"gradient of {name}")


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize("dim", [16, 40, 136])
def test_equals_the_definition(dim, carried):
    check(dim=dim, carried=carried)


@pytest.mark.parametrize("of", [(True, False), (False, True)])
def test_gradient_of_either_output_alone(of):
    check(of=of, lengths=[3, 70])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(dtype=dtype, bound=1e-4, gradient_bound=BOUND[dtype])


def test_large_sums_in_float16_stay_finite():
    tensors, where = example([300], dtype=torch.float16, carried=False)
    tensors["k"] = torch.full_like(tensors["k"], 1000.0)
    scores, sums = online_scores(tensors["u"], tensors["k"], where[0], None, None)
    assert_close(sums, torch.full_like(sums, 300_000.0))
    assert_close(scores, 1000 * tensors["u"].float().sum(-1), bound=1e-3)


def test_repeatable():
    tensors, where = example()
    once, again = (outputs_and_gradients(online_scores, tensors, where) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once[0], again[0]))
    assert all(torch.equal(once[1][name], again[1][name]) for name in once[1])


def test_causal_and_pieces_apart():
    tensors, where = example()
    before, _ = online_scores(tensors["u"], tensors["k"], where[0], tensors["carried_sum"], where[1])
    tensors["k"][0, 100:] *= 2
    after, _ = online_scores(tensors["u"], tensors["k"], where[0], tensors["carried_sum"], where[1])
    assert torch.equal(before[0, :100], after[0, :100])
    tensors["k"][0, :135] *= 2
    last, _ = online_scores(tensors["u"], tensors["k"], where[0], tensors["carried_sum"], where[1])
    assert torch.equal(after[0, 135:], last[0, 135:])


@pytest.mark.parametrize("carried", [True, False])
def test_operator_is_registered_properly(carried):
    tensors, where = example([3, 0, 5], heads=1, carried=carried)
    given = [None if t is None else t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(online._forward, (given[0], given[1], where[0], given[2], where[1]))


def test_meta_tensors():
    tensors, where = example()
    meta = {n: t.to("meta").requires_grad_() for n, t in tensors.items()}
    scores, sums = online_scores(meta["u"], meta["k"], where[0].to("meta"), meta["carried_sum"], where[1].to("meta"))
    assert scores.shape == meta["u"].shape[:3] and sums.shape == meta["carried_sum"].shape
    (scores.sum() + sums.sum()).backward()
    assert all(t.grad.shape == t.shape for t in meta.values())
