"""select_top_k against a stable sort of all scores in float64, with whole numbers so that many scores are exactly equal."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROUTINGS = ("mean", "submax", "energy")


@pytest.fixture(scope="module")
def select():
    return importlib.import_module("memzoo.kernels.memory_caching.select")


def definition(u, descriptors, cu_pieces, first, count, top_k, routing):
    ids = torch.full((*u.shape[:3], top_k), -1)
    for p, (begin, end) in enumerate(itertools.pairwise(cu_pieces.tolist())):
        readable = slice(int(first[p]), int(first[p] + count[p]))
        rows, d = u[0, begin:end].double(), descriptors[readable].double()
        if routing == "energy":
            scores = torch.einsum("thr,mhrs,ths->thm", rows, d, rows)
        elif routing == "submax":
            scores = torch.einsum("thr,mhbr->thmb", rows, d).amax(-1) if len(d) else rows.new_zeros(*rows.shape[:2], 0)
        else:
            scores = torch.einsum("thr,mhr->thm", rows, d)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        ids[0, begin:end, :, : best.shape[-1]] = best + readable.start
    return ids


def example(
    routing, pieces=((5, 0, 0), (70, 0, 1), (0, 1, 2), (67, 2, 5)), heads=2, size=24, blocks=4, dtype=torch.float32, values=2
):
    """Pieces are (tokens, first, count); u and descriptors are whole numbers below `values`."""
    lengths, first, count = zip(*pieces)
    inner = {"mean": (), "submax": (blocks,), "energy": (size,)}[routing]
    memories = max(f + c for f, c in zip(first, count)) + 1
    u = torch.randint(1 - values, values, (1, sum(lengths), heads, size)).to(dtype)
    descriptors = torch.randint(1 - values, values, (memories, heads, *inner, size)).float()
    return u, descriptors, torch.tensor([0, *itertools.accumulate(lengths)]), torch.tensor(first), torch.tensor(count)


@pytest.mark.parametrize("routing", ROUTINGS)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3), most=st.integers(0, 40), heads=st.integers(1, 2),
    size=st.sampled_from([16, 24, 72]), blocks=st.sampled_from([1, 2, 16]), top_k=st.sampled_from([1, 2, 3, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), values=st.integers(1, 3),
)  # fmt: skip
def test_equals_a_stable_sort(select, routing, lengths, most, heads, size, blocks, top_k, dtype, values):
    lengths[0] += 1
    pieces = [(length, j, most >> j) for j, length in enumerate(lengths)]
    args = example(routing, pieces, heads, size, blocks, dtype, values)
    assert torch.equal(select.select_top_k(*args, top_k, routing), definition(*args, top_k, routing))


@pytest.mark.parametrize("size", [136, 256])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_large_dimensions(select, routing, size):
    args = example(routing, [(9, 0, 3)], 1, size)
    assert torch.equal(select.select_top_k(*args, 2, routing), definition(*args, 2, routing))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_random_scores_of_either_sign(select, routing):
    u, descriptors, *pieces = example(routing)
    u, descriptors = torch.randn(u.shape), torch.randn(descriptors.shape)
    assert torch.equal(select.select_top_k(u, descriptors, *pieces, 3, routing), definition(u, descriptors, *pieces, 3, routing))


def test_ties_go_to_the_earlier_memory(select):
    u, descriptors, *pieces = example("mean", [(4, 1, 70)])
    ids = select.select_top_k(u, torch.zeros_like(descriptors), *pieces, 4, "mean")
    assert torch.equal(ids, torch.arange(1, 5).expand(ids.shape))


def test_memories_beyond_the_piece_are_never_read(select):
    for routing in ROUTINGS:
        u, descriptors, *pieces = example(routing, [(20, 1, 2)])
        before = select.select_top_k(u, descriptors, *pieces, 4, routing)
        descriptors[[0, 3]] = torch.nan
        assert torch.equal(select.select_top_k(u, descriptors, *pieces, 4, routing), before)
        assert before[..., :2].sort().values.unique().tolist() == [1, 2] and (before[..., 2:] == -1).all()


def test_registered_operator_passes_torchs_checks_and_takes_meta_tensors(select):
    for routing in ROUTINGS:
        args = (*example(routing), 3, routing)
        torch.library.opcheck(select._select, args, test_utils=("test_schema", "test_faketensor"))
        meta = select.select_top_k(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in args))
        assert meta.shape == (1, 142, 2, 3) and meta.dtype == torch.int64 and meta.device.type == "meta"


def test_no_gradient(select):
    u, *rest = example("mean")
    assert not select.select_top_k(u.requires_grad_(), *rest, 2, "mean").requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(1, 142, 24)}, "u has shape [1, 142, 24], needs 4 dimensions [1, total, H, R]"),
        ({"u": torch.zeros(2, 142, 2, 24)}, "needs [1, total, H, R] with at least one token"),
        ({"u": torch.zeros(1, 142, 2, 20)}, "u has dimension 20, needs a multiple of 8 from 16 to 256"),
        ({"u": torch.zeros(1, 142, 2, 24).double()}, "need float32 or a half type, and float32"),
        ({"descriptors": torch.zeros(8, 2, 24).half()}, "need float32 or a half type, and float32"),
        ({"descriptors": torch.zeros(8, 1, 24)}, "descriptors has shape [8, 1, 24], needs [M, H, R] = [8, 2, 24]"),
        ({"descriptors": torch.zeros(8, 2, 3, 24), "routing": "submax"}, "have 3 sub-blocks, need a power of two up to 16"),
        ({"descriptors": torch.zeros(8, 2, 8, 24), "routing": "energy"}, "needs [M, H, R, R] = [8, 2, 24, 24]"),
        ({"routing": "max"}, "routing is 'max', needs one of mean, submax, energy"),
        ({"top_k": 17}, "top_k is 17, needs 1 to 16"),
        ({"top_k": 0}, "top_k is 0, needs 1 to 16"),
        ({"count": torch.zeros(3)}, "count has shape [3], needs [P] = [4]"),
    ],
)
def test_bad_input_is_one_clear_line(select, change, message):
    good = dict(zip(("u", "descriptors", "cu_pieces", "first", "count"), example("mean")), top_k=2, routing="mean")
    with pytest.raises((ValueError, TypeError)) as error:
        select.select_top_k(**{**good, **change})
    assert message in str(error.value)
    assert str(error.value).startswith("select_top_k: ") and "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gpu_at_real_size(select, routing, size, dtype):
    pieces = [(256, 0, j) for j in range(20)] + [(300, 30, 2), (0, 30, 1), (1, 20, 30)]
    args = [t.cuda() for t in example(routing, pieces, 4, size, 8, dtype, 3)]
    for top_k in (1, 4, 16):
        assert torch.equal(select.select_top_k(*args, top_k, routing), definition(*args, top_k, routing).cuda())
