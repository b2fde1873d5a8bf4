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


@pytest.mark.parametrize("routing, rows", [("mean", 1), ("submax", 2), ("submax", 16)])
def test_more_memories_and_tokens_than_one_block(routing, rows):
    layout = [(15, [2, 150, 1, 3])]
    check(layout, routing, gradient_bound=5 * BOUND[torch.float32], heads=1, value_dim=16, rows=rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routing", [None, "mean", "energy", "submax"])
def test_half_precision(routing, dtype):
    check(LAYOUTS["one sequence"], routing, 2 * BOUND[dtype], 3 * BOUND[dtype], dtype=dtype, dim=32)


@pytest.mark.parametrize("routing", ["mean", "submax"])
def test_large_scores_keep_their_digits_in_bfloat16(routing):
    """Scores near 60 that differ by 0.2: descriptors rounded to bfloat16 would shift each by as much."""
    tensors, where = example([(3, [8])], routing, heads=1, dtype=torch.bfloat16, rows=1)
    tensors["u"] = torch.full_like(tensors["u"], 3.0)
    exact = torch.tensor([60.0, 60.2, 60.4, 0.0]) / (3 * 16)
    tensors["descriptors"] = exact.view(4, 1, *[1] * (tensors["descriptors"].dim() - 2)).expand_as(tensors["descriptors"]).clone()
    tensors["online_score"] = torch.full_like(tensors["online_score"], 60.1)
    tensors["online"] = torch.ones_like(tensors["online"])
    actual = gated_read(*tensors.values(), *where, routing)
    expected = definition(*(t.double() for t in tensors.values()), *where[:3], routing)
    assert_close(actual, expected, 0.01)


def test_the_first_of_equal_sub_blocks_takes_the_gradient():
    tensors, where = example([(1, [4])], "submax", heads=1, rows=4)
    tensors["descriptors"] = tensors["descriptors"][:, :, :1].repeat(1, 1, 4, 1)
    _, grads = outputs_and_gradients(lambda *x: gated_read(*x, *where, "submax"), tensors)
    assert grads["descriptors"][0, :, 0].abs().min() > 0
    assert not grads["descriptors"][:, :, 1:].any()


@pytest.mark.parametrize("routing", [None, "mean", "energy", "submax"])
def test_without_any_memory_the_online_read_is_returned(routing):
    tensors, where = example([(0, [5]), (0, [2])], routing)
    tensors["bank"], descriptors = tensors["bank"][:0], tensors["descriptors"]
    tensors["descriptors"] = None if descriptors is None else descriptors[:0]
    where[3:] = [w[:0] for w in where[3:]]
    y, grads = outputs_and_gradients(lambda *x: gated_read(*x, *where, routing), tensors)
    assert torch.equal(y, tensors["online"])
    assert not grads["q"].any() and grads["bank"].shape == tensors["bank"].shape
    if routing is not None:
        assert not grads["u"].any() and grads["online_score"].abs().max() < 1e-5


@pytest.mark.parametrize("routing", ["mean", "submax"])
def test_repeatable(routing):
    tensors, where = example([(1, [6, 9, 3])], routing, key_dim=136, heads=1)
    once, again = (outputs_and_gradients(lambda *x: gated_read(*x, *where, routing), tensors) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert all(torch.equal(once[1][name], again[1][name]) for name in once[1])


@pytest.mark.parametrize("routing", [None, "mean", "energy", "submax"])
def test_operator_is_registered_properly(routing):
    tensors, where = example([(1, [3, 2])], routing, heads=1, value_dim=16)
    given = [None if t is None else t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(read._forward, (*given, *where, routing))


@pytest.mark.parametrize("routing", [None, "mean", "energy", "submax"])
def test_meta_tensors(routing):
    tensors, where = example(LAYOUTS["one sequence"], routing)
    meta = {n: None if t is None else t.to("meta").requires_grad_() for n, t in tensors.items()}
    y = gated_read(*meta.values(), *(w.to("meta") for w in where), routing)
    assert y.shape == tensors["online"].shape
    y.sum().backward()
    assert all(t is None or t.grad.shape == t.shape for t in meta.values())


@pytest.mark.parametrize(
    "routing, dim, rows, message",
    [
        ("median", 16, 1, "routing is 'median', needs one of None, mean, energy, submax"),
        ("energy", 136, 1, "u has head dimension 136, at most 128 fit the Triton kernels with routing 'energy'"),
        ("submax", 16, 3, "descriptors have 3 sub-blocks, needs a power of two up to 16"),
        ("submax", 16, 32, "descriptors have 32 sub-blocks, needs a power of two up to 16"),
    ],
)
def test_refusals(routing, dim, rows, message):
    with pytest.raises(ValueError, match=message) as error:
        check_routing("memory_caching", routing, dim, rows)
    assert "\n" not in str(error.value)
