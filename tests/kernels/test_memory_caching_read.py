"""gated_read: every routing rule and gradient against the definition written out token by token in float64."""

import pytest
import torch
from checks import BOUND, assert_close

from memzoo.kernels.memory_caching import read
from memzoo.kernels.memory_caching.read import check_routing, gated_read

NAMES = ("q", "u", "online", "online_score", "bank", "descriptors")
# Sequences of segments: the tokens of each piece, and how many cached memories a sequence brings along from an earlier call.
LAYOUTS = {
    "one sequence": [(0, [70, 1, 0, 33])],
    "carried, empty and single": [(2, [5, 0, 67]), (0, [0]), (0, [3]), (0, [1, 1, 1]), (1, [])],
}


def pieces(layout):
    """(cu_pieces, first, count, reader_start, reader_end): a sequence has a memory for each carried segment and each piece."""
    cu, first, count, start, end = [0], [], [], [], []
    for carried, lengths in layout:
        base = len(start)
        stop = cu[-1] + sum(lengths)
        start += [cu[-1]] * carried
        for i, length in enumerate(lengths):
            first.append(base)
            count.append(carried + i)
            cu.append(cu[-1] + length)
            start.append(cu[-1])
        end += [stop] * (carried + len(lengths))
    return [torch.tensor(x) for x in (cu, first, count, start, end)]


def definition(q, u, online, online_score, bank, descriptors, cu_pieces, first, count, routing):
    """y token by token and head by head, differentiable, in the inputs' type."""
    rows = []
    cu, first, count = cu_pieces.tolist(), first.tolist(), count.tolist()
    for p in range(len(first)):
        mine = slice(first[p], first[p] + count[p])
        for t in range(cu[p], cu[p + 1]):
            reads = torch.einsum("hd,mhde->mhe", q[0, t], bank[mine])
            if routing is None:
                rows.append(online[0, t] + reads.sum(0))
                continue
            if routing == "mean":
                scores = torch.einsum("hr,mhr->mh", u[0, t], descriptors[mine])
            elif routing == "energy":
                scores = torch.einsum("hr,mhrs,hs->mh", u[0, t], descriptors[mine], u[0, t])
            else:
                scores = torch.einsum("hr,mhsr->mhs", u[0, t], descriptors[mine]).max(-1).values
            gates = torch.softmax(torch.cat((online_score[0, t][None], scores)), dim=0)
            rows.append((gates[..., None] * torch.cat((online[0, t][None], reads))).sum(0))
    return torch.stack(rows)[None]


def example(layout, routing, key_dim=16, value_dim=24, dim=16, rows=4, heads=2, dtype=torch.float32):
    where = pieces(layout)
    total, entries = int(where[0][-1]), where[3].numel()
    shape = {"mean": (dim,), "energy": (dim, dim), "submax": (rows, dim)}
    descriptors = None
    if routing is not None:
        descriptors = torch.randn(entries, heads, *shape[routing]) / (dim**0.5 if routing == "energy" else 1)
        if routing == "energy":
            descriptors = descriptors @ descriptors.mT
    tensors = {
        "q": torch.randn(1, total, heads, key_dim).to(dtype) * 0.5,
        "u": None if routing is None else torch.randn(1, total, heads, dim).to(dtype) * 2 * dim**-0.5,
        "online": torch.randn(1, total, heads, value_dim).to(dtype),
        "online_score": None if routing is None else torch.randn(1, total, heads),
        "bank": torch.randn(entries, heads, key_dim, value_dim),
        "descriptors": descriptors,
    }
    return tensors, where


def outputs_and_gradients(function, tensors, dtype=None):
    tensors = {n: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    y = function(*tensors.values())
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().view(y.shape)
    given = [t for t in tensors.values() if t is not None]
    grads = torch.autograd.grad((y.double() * weights).sum(), given, allow_unused=True)
    return y.detach(), dict(zip((n for n, t in tensors.items() if t is not None), grads))


def check(layout, routing, bound=None, gradient_bound=None, **options):
    tensors, where = example(layout, routing, **options)
    actual, actual_grads = outputs_and_gradients(lambda *x: gated_read(*x, *where, routing), tensors)
    expected, expected_grads = outputs_and_gradients(lambda *x: definition(*x, *where[:3], routing), tensors, torch.float64)
    assert actual.dtype == tensors["q"].dtype
    assert_close(actual, expected, bound, "y")
    for name, e in expected_grads.items():
        assert actual_grads[name].dtype == tensors[name].dtype
        assert_close(actual_grads[name], torch.zeros_like(tensors[name]) if e is None else e, gradient_bound, f"gradient of {name}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", [None, "mean", "energy", "submax"])
def test_equals_the_definition(routing, layout):
    check(LAYOUTS[layout], routing, gradient_bound=5 * BOUND[torch.float32])


@pytest.mark.parametrize("key_dim, value_dim, dim", [(40, 16, 24), (24, 72, 40), (16, 136, 16), (136, 24, 16)])
@pytest.mark.parametrize("routing", [None, "mean", "energy", "submax"])
def test_head_dimensions(routing, key_dim, value_dim, dim):
    layout = [(0, [6, 9, 3])]
    check(layout, routing, gradient_bound=5 * BOUND[torch.float32], heads=1, key_dim=key_dim, value_dim=value_dim, dim=dim)
