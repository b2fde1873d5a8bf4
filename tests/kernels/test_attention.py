"""attention and linked_attention: their three forms, torch's attention, the DNC's own equations, the properties of every operator."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from memzoo.kernels import attention, linked_attention
from memzoo.kernels.common.launch import Launch, LaunchTable

FORMS = ["reference", "chunked", "triton"]
FAST_FORMS = ["chunked", "triton"]


def example(
    batch=2, queries=11, keys=None, heads=2, group=1, key_dim=16, value_dim=24, dtype=torch.float32,
    links=False, strength=False, retention=False,
):  # fmt: skip
    keys = queries if keys is None else keys
    all_heads = heads * group
    tensors = {
        "q": torch.randn(batch, queries, all_heads, key_dim, dtype=dtype),
        "k": torch.randn(batch, keys, heads, key_dim, dtype=dtype),
        "v": torch.randn(batch, keys, heads, value_dim, dtype=dtype),
        "read_modes": torch.randn(batch, queries, all_heads, 3, dtype=dtype).softmax(-1) if links else None,
        "key_strength": 2 * torch.rand(batch, queries, all_heads, dtype=dtype) if strength else None,
        "log_retention": -torch.rand(batch, keys, all_heads, dtype=dtype).square() if retention else None,
    }
    return {name: t for name, t in tensors.items() if t is not None}


EVERYTHING = {"links": True, "strength": True, "retention": True}


def operator(args):
    return linked_attention if "read_modes" in args else attention


def run(args, implementation=None, **options):
    return operator(args)(**args, **options, implementation=implementation)


def part(args, queries=slice(None), keys=slice(None)):
    """The arguments with these queries and keys alone."""
    of_keys = ("k", "v", "log_retention")
    return {name: t[:, keys if name in of_keys else queries] for name, t in args.items()}


def form_dtype(implementation):
    return torch.float32 if implementation == "triton" else torch.float64


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16, so that short sequences have several."""
    kernel = importlib.import_module("memzoo.kernels.attention.kernel")
    chunked = importlib.import_module("memzoo.kernels.attention.chunked")
    table = LaunchTable({(512, 80): Launch(4, 1, {"BM": 16, "BN": 16})})
    for tables in (kernel.FORWARD, kernel.BACKWARD_QUERIES, kernel.BACKWARD_KEYS):
        for kind in tables:
            monkeypatch.setitem(tables, kind, table)
    monkeypatch.setattr(kernel, "DECODE", table)
    monkeypatch.setattr(kernel, "DECODE_KEYS", 16)
    monkeypatch.setattr(chunked, "MIN_BLOCK", 16)
    monkeypatch.setattr(chunked, "MAX_BLOCK", 16)


def check_forms(implementation, batch, keys, asked, heads, group, dims, window, prefix, links, strength, retention):
    queries = max(1, keys - asked)
    args = example(
        batch, queries, keys, heads, group, *dims, form_dtype(implementation), links, strength, retention
    )  # fmt: skip
    options = {"window": window, "prefix": prefix, "scale": 0.3}
    assert_grads_close(operator(args), args, options, implementation)
    if implementation == "triton":
        with torch.no_grad():  # few queries take the decoding kernel
            last = part(args, slice(-3, None))
            assert_close(run(last, "triton", **options), run(last, "reference", **options))


options_of_forms = {
    "batch": st.integers(1, 2), "keys": st.integers(1, 50), "asked": st.sampled_from([0, 0, 7, 49]), "heads": st.integers(1, 2),
    "group": st.sampled_from([1, 2]), "dims": st.sampled_from([(16, 24), (24, 16), (16, 16), (40, 16)]),
    "window": st.sampled_from([None, 3, 17]), "prefix": st.sampled_from([0, 2, 20]), "links": st.booleans(),
    "strength": st.booleans(), "retention": st.booleans(),
}  # fmt: skip


@settings(max_examples=40)
@given(**options_of_forms)
def test_chunked_is_the_definition(small_blocks, **choice):
    check_forms("chunked", **choice)


@settings(max_examples=12)
@given(**options_of_forms)
def test_triton_is_the_definition(small_blocks, **choice):
    check_forms("triton", **{**choice, "batch": 1})


@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_triton_with_its_own_blocks(links, window):
    args = example(1, 140, 150, 1, 2 if links else 1, 16, 16, links=links, strength=links, retention=links)
    assert_grads_close(operator(args), args, {"window": window, "prefix": 3}, "triton", against="chunked")


@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 16), (16, 136), (256, 24)])
def test_large_heads(key_dim, value_dim):
    args = example(1, 20, 20, 1, 1, key_dim, value_dim, **EVERYTHING)
    assert_grads_close(linked_attention, args, {"window": 9, "prefix": 2}, "triton")


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(("window", "prefix"), [(None, 0), (5, 0), (5, 3)])
def test_is_torchs_attention(implementation, window, prefix):
    args = example(2, 9, 21, heads=2, group=3, dtype=form_dtype(implementation))
    t, i = torch.arange(12, 21)[:, None], torch.arange(21)
    mask = i <= t
    if window is not None:
        mask &= (i > t - window) | (i < prefix)
    q, k, v = (args[name].transpose(1, 2) for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert_close(run(args, implementation, window=window, prefix=prefix), expected)


def test_links_are_those_of_the_dnc():
    """The DNC's link matrix, by its own recursion for rows written one a step, read in its three modes (Graves et al. 2016)."""
    args = example(1, 8, heads=1, dtype=torch.float64, links=True, strength=True)
    memory = torch.zeros(8, 24, dtype=torch.float64)
    link, precedence = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    expected = []
    for t in range(8):
        write = F.one_hot(torch.tensor(t), 8).double()
        memory = memory * (1 - write[:, None]) + write[:, None] * args["v"][0, t, 0]
        link = (1 - write[:, None] - write[None, :]) * link + write[:, None] * precedence[None, :]
        link.fill_diagonal_(0)
        precedence = (1 - write.sum()) * precedence + write
        scores = args["key_strength"][0, t, 0] * (args["k"][0, :, 0] @ args["q"][0, t, 0]) * 16**-0.5
        scores[t + 1 :] = float("-inf")  # rows not yet written
        content = scores.softmax(0)
        modes = args["read_modes"][0, t, 0]
        read = modes[0] * (link.T @ content) + modes[1] * content + modes[2] * (link @ content)
        expected.append(read @ memory)
    for implementation in ("reference", "chunked"):
        assert_close(run(args, implementation)[0, :, 0], torch.stack(expected))
    assert_close(run({name: t.float() for name, t in args.items()}, "triton")[0, :, 0], torch.stack(expected))


def test_content_reads_alone_are_attention():
    args = example(links=True, dtype=torch.float64)
    content = {**args, "read_modes": torch.tensor([0.0, 1.0, 0.0]).double().expand_as(args["read_modes"])}
    plain = {name: t for name, t in args.items() if name != "read_modes"}
    assert_close(run(content, "chunked"), run(plain, "chunked"))


def test_retention_is_a_product_of_decays():
    """With equal keys the weights are the products of what each later position keeps."""
    args = example(1, 6, heads=1, dtype=torch.float64, retention=True)
    args["k"] = torch.zeros_like(args["k"])
    kept = args["log_retention"][0, :, 0].exp()
    for t in range(6):
        weights = torch.stack([kept[i + 1 : t + 1].prod() for i in range(t + 1)])
        expected = (weights / weights.sum()) @ args["v"][0, : t + 1, 0]
        assert_close(run(args, "reference")[0, t, 0], expected)


def packings():
    """(boundaries, slices of the queries, of the keys) of sequences, of which some are empty and some hold keys that none asks for."""
    both, _ = packed_example([5, 0, 1, 37, 2, 0])
    ends = both.tolist()
    slices = [slice(a, b) for a, b in zip(ends, ends[1:])]
    yield both, slices, slices
    asked, held = [0, 2, 0, 1, 0, 12, 1], [4, 9, 0, 1, 6, 33, 20]
    of_queries, of_keys = packed_example(asked)[0], packed_example(held)[0]
    pairs = [[slice(a, b) for a, b in zip(x.tolist(), x.tolist()[1:])] for x in (of_queries, of_keys)]
    yield (of_queries, of_keys), *pairs


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("pair", [False, True])
def test_packed_equals_separate(implementation, pair, small_blocks):
    cu_seqlens, asked, held = list(packings())[pair]
    args = example(1, asked[-1].stop, held[-1].stop, 1, 2, dtype=form_dtype(implementation), **EVERYTHING)
    if pair:  # sequences without queries cost nothing: they are not read
        for q, k in zip(asked, held):
            if q.start == q.stop:
                args["k"][:, k] = args["v"][:, k] = float("nan")
    options = {"window": 6, "prefix": 2}
    with torch.no_grad():
        y = run(args, implementation, **options, cu_seqlens=cu_seqlens)
    for q, k in zip(asked, held):
        if q.start < q.stop:
            alone = run({n: t.double() for n, t in part(args, q, k).items()}, "reference", **options)
            assert_close(y[:, q], alone)


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("links", [False, True])
def test_packed_gradients(implementation, pair, links, small_blocks):
    cu_seqlens, asked, held = list(packings())[pair]
    args = example(
        1, asked[-1].stop, held[-1].stop, 1, 2, dtype=form_dtype(implementation), links=links, strength=not links, retention=links
    )  # fmt: skip
    assert_grads_close(operator(args), args, {"window": None if links else 6, "cu_seqlens": cu_seqlens}, implementation)


def test_packed_pair_reads_a_padded_cache_where_it_lies(small_blocks):
    """A cache [B, S] with padding on the left, seen as packed [1, B S]: a gap, then a sequence, of each row; nothing is copied."""
    held = [30, 3, 17]
    cache = example(3, 1, 30, heads=2, group=2, **EVERYTHING)
    gaps = [size for n in held for size in (30 - n, n)]
    of_keys, of_queries = packed_example(gaps)[0], packed_example([0, 1] * 3)[0]
    flat = {name: t.flatten(0, 1)[None] for name, t in cache.items()}
    for implementation in FORMS:
        with torch.no_grad():
            y = run(flat, implementation, cu_seqlens=(of_queries, of_keys))
        for n, length in enumerate(held):
            alone = {name: t[n : n + 1] for name, t in part(cache, keys=slice(30 - length, None)).items()}
            assert_close(y[:, n : n + 1], run(alone, "reference"))


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("full", [False, True])
def test_causal_batch_independent_and_repeatable(implementation, full, small_blocks):
    options = {"window": 9, "prefix": 7} if full else {}
    args = example(queries=24, heads=1, value_dim=16, dtype=form_dtype(implementation), **(EVERYTHING if full else {}))
    kept = {name: t.clone() for name, t in args.items()}
    before, again = run(args, implementation, **options), run(args, implementation, **options)
    assert torch.equal(before, again)
    assert all(torch.equal(args[name], kept[name]) for name in args)
    for name in args:
        changed = {**args, name: args[name].clone()}
        changed[name][0, 17:] -= 3
        after = run(changed, implementation, **options)
        assert torch.equal(before[0, :17], after[0, :17]), name
        assert torch.equal(before[1], after[1]), name
        assert not torch.equal(before[0, 17:], after[0, 17:]), name


@pytest.mark.parametrize("implementation", FORMS)
def test_any_split_equals_one_pass(implementation, small_blocks):
    args = example(1, 24, heads=1, group=2, dtype=form_dtype(implementation), **EVERYTHING)
    options = {"window": 6, "prefix": 2}
    whole = run(args, implementation, **options)
    for split in (1, 2, 9, 20):
        ends = [split, *range(split + 1, 25, 5), 24]
        with torch.no_grad():
            parts = [
                run(part(args, slice(a, b), slice(0, b)), implementation, **options) for a, b in zip([0, *ends], ends) if a < b
            ]
        assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("packed", [False, True])
def test_decoding_shares_the_keys_among_programs(packed):
    """Its own blocks and shares, a cache that is a slice of a longer one and heads first in memory."""
    args = example(2, 2, 700, heads=1, group=3, **EVERYTHING)
    for name in ("k", "v"):
        args[name] = torch.cat((args[name], args[name]), 1).transpose(1, 2).contiguous().transpose(1, 2)[:, :700]
        assert not args[name].is_contiguous()
    with torch.no_grad():
        for options in ({}, {"window": 300, "prefix": 70}):
            expected = run({n: t.double() for n, t in args.items()}, "reference", **options)
            if packed:
                flat = {n: t.reshape(1, -1, *t.shape[2:]) for n, t in args.items()}
                pair = packed_example([2, 2])[0], packed_example([700, 700])[0]
                assert_close(run(flat, "triton", **options, cu_seqlens=pair).view_as(expected), expected)
            else:
                assert_close(run(args, "triton", **options), expected)


@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_keys_that_no_query_sees_are_not_read(implementation, small_blocks):
    args = example(1, 20, 200, 1, links=True, dtype=form_dtype(implementation))
    args["k"][:, 48:128] = args["v"][:, 48:128] = float("nan")
    for name in ("q", "k", "v"):
        args[name].requires_grad_()
    y = run(args, implementation, window=20, prefix=30)
    grads = torch.autograd.grad(y.square().sum(), [args[name] for name in "qkv"])
    assert torch.isfinite(y).all() and torch.isfinite(grads[0]).all()
    for grad in grads[1:]:
        assert torch.isfinite(grad[:, :48]).all() and torch.isfinite(grad[:, 128:]).all()
        assert (grad[:, 48:112] == 0).all()


@pytest.mark.parametrize("links", [False, True])
def test_gradcheck_of_the_definition(links):
    args = example(1, 2, 3, heads=1, value_dim=16, dtype=torch.float64, links=links, strength=True, retention=True)
    args = {name: t.requires_grad_() for name, t in args.items()}
    names, tensors = list(args), list(args.values())

    def call(*values):
        return run(dict(zip(names, values)), "reference", window=2, prefix=1)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("links", [False, True])
def test_nothing_of_the_size_of_the_scores_is_kept(implementation, links):
    args = example(1, 200, heads=1, value_dim=16, links=links)
    args = {name: t.requires_grad_() for name, t in args.items()}
    sizes = []

    def keep(t):
        sizes.append(t.numel())
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        run(args, implementation)
    assert sizes and max(sizes) <= 200 * 16


def test_finite_for_long_input():
    args = example(1, 65_536, heads=1, value_dim=16, **EVERYTHING)
    y = run(args, window=64, prefix=4)
    assert torch.isfinite(y).all()
    assert y[:, -1000:].abs().max() < 10 * y[:, :1000].abs().max()


@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_long_running_sums_do_not_blur_what_is_near(implementation):
    args = example(1, 2, 3000, heads=1, retention=True)
    args["log_retention"] *= 8  # the running sum reaches -8,000
    with torch.no_grad():
        assert_close(run(args, implementation), run({n: t.double() for n, t in args.items()}, "reference"), 1e-3)


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("full", [False, True])
def test_compiles_to_one_graph_and_takes_meta_tensors(implementation, full):
    args = example(1, 70, heads=1, value_dim=16, **(EVERYTHING if full else {}))
    args = {name: t.requires_grad_() for name, t in args.items()}
    options = {"window": 9, "prefix": 2} if full else {}

    def call(**tensors):
        return run(tensors, implementation, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y, expected = compiled(**args), call(**args)
    assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y.sum(), args.values()), torch.autograd.grad(expected.sum(), args.values())):
        assert_close(a, b)
    with torch.no_grad():
        meta = call(**{name: t.to("meta") for name, t in args.items()})
        last = part({name: t.to("meta") for name, t in args.items()}, slice(-1, None))
        assert call(**last).shape == (1, 1, 1, 16)
    assert meta.shape == y.shape and meta.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, "q has shape [2, 3, 16], needs 4 dimensions [B, Tq, Hq, Dk]"),
        ({"q": torch.zeros(2, 0, 4, 16)}, "B and T must both be at least 1"),
        ({"k": torch.zeros(2, 3, 2, 24)}, "k has shape [2, 3, 2, 24], needs [B, Tk, Hk, Dk] = [2, 3, 2, 16]"),
        ({"v": torch.zeros(2, 4, 2, 16)}, "v has shape [2, 4, 2, 16], needs [B, Tk, Hk, Dv] = [2, 3, 2, 16]"),
        ({"v": torch.zeros(2, 3, 2, 20)}, "v has head dimension 20, needs a multiple of 8 from 16 to 256"),
        ({"q": torch.zeros(2, 3, 3, 16)}, "q has 3 heads, needs a multiple of k's 2"),
        ({"q": torch.zeros(2, 5, 4, 16)}, "q has 5 positions, needs at most k's 3"),
        ({"q": torch.zeros(2, 3, 4, 16, dtype=torch.float64)}, "k has dtype torch.float32, q has torch.float64"),
        ({"q": torch.zeros(2, 3, 4, 16, dtype=torch.int64)}, "q has dtype torch.int64"),
        ({"key_strength": torch.zeros(2, 3, 2)}, "key_strength has shape [2, 3, 2], needs [B, Tq, Hq] = [2, 3, 4]"),
        ({"log_retention": torch.zeros(2, 4, 4)}, "log_retention has shape [2, 4, 4], needs [B, Tk, Hq] = [2, 3, 4]"),
        ({"read_modes": torch.zeros(2, 3, 4, 2)}, "read_modes has shape [2, 3, 4, 2], needs [B, Tq, Hq, 3] = [2, 3, 4, 3]"),
        ({"window": 0}, "window is 0, needs an integer of at least 1, or None"),
        ({"window": 2.5}, "window is 2.5, needs an integer of at least 1, or None"),
        ({"prefix": -1}, "prefix is -1, needs an integer of at least 0"),
        ({"scale": 0.0}, "scale is 0.0, needs a number above 0"),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs one of triton, chunked, reference"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
        ({"cu_seqlens": (torch.tensor([0, 3]),)}, "cu_seqlens has 1 parts, needs one tensor or the pair (of queries, of keys)"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    q, k, v = torch.zeros(2, 3, 4, 16), torch.zeros(2, 3, 2, 16), torch.zeros(2, 3, 2, 16)
    check_message({"q": q, "k": k, "v": v, **change}, message)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 4]), "one cu_seqlens needs as many queries as keys, got 2 and 4"),
        ((torch.tensor([0, 3]), torch.tensor([0, 4])), "end at T = 2"),
        ((torch.tensor([0, 2]), torch.tensor([0, 1, 4])), "cu_seqlens of keys has shape [3], needs [N + 1] = [2]"),
        ((torch.tensor([0, 2, 2]), torch.tensor([0, 1, 4])), "cu_seqlens gives sequence 0 2 queries, needs at most its 1 keys"),
    ],
)
def test_bad_packing_is_one_clear_line(cu_seqlens, message):
    args = {**example(1, 2, 4), "cu_seqlens": cu_seqlens}
    check_message(args, message)
    check_message({**args, "read_modes": torch.zeros(1, 2, 2, 3)}, message)


def check_message(args, message):
    with pytest.raises((ValueError, TypeError)) as error:
        operator(args)(**args)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{operator(args).__name__}: ") and "\n" not in str(error.value)


def on_gpu(args):
    return {name: t.cuda() for name, t in args.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"window": 500, "prefix": 70}])
@pytest.mark.parametrize("every", [{}, {"strength": True, "retention": True}, EVERYTHING])
def test_gpu_bfloat16_at_real_size(dim, options, every):
    args = on_gpu(example(2, 1900, 2048, 2, 2, dim, dim, torch.bfloat16, **every))
    if "log_retention" in args:
        args["log_retention"] = args["log_retention"].float() / 64
    assert_grads_close(operator(args), args, options, "triton", against="chunked")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("every", [{}, EVERYTHING])
def test_gpu_float32(dim, every):
    args = on_gpu(example(1, 600, 700, 2, 2, dim, dim, **every))
    assert_grads_close(operator(args), args, {"window": 300, "prefix": 9}, "triton", against="chunked", bound=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gpu_packed(dim):
    asked, held = packed_example([1000, 1, 0, 900, 95, 0])[0].cuda(), packed_example([1000, 1, 0, 3000, 95, 700])[0].cuda()
    args = on_gpu(example(1, int(asked[-1]), int(held[-1]), 2, 2, dim, dim, torch.bfloat16, links=True, strength=True))
    assert_grads_close(operator(args), args, {"cu_seqlens": (asked, held)}, "triton", against="chunked")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("every", [{}, EVERYTHING])
def test_gpu_decoding(dim, every):
    args = on_gpu(example(2, 1, 20_000, 2, 4, dim, dim, torch.bfloat16, **every))
    if "log_retention" in args:
        args["log_retention"] = args["log_retention"].float() / 64
    with torch.no_grad():
        y = run(args, "triton")
        assert_close(y, run({n: t.float() for n, t in args.items()}, "chunked"), 2e-2)
        assert torch.equal(y, run(args, "triton"))
