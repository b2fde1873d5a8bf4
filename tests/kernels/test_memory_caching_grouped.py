"""grouped_read: the kernels against a product for each token and choice, with gradients, and the grouping itself."""

import importlib

import pytest
import torch
from checks import BOUND, assert_close
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def grouped():
    return importlib.import_module("memzoo.kernels.memory_caching.grouped")


def definition(x, ids, bank):
    """A memory for each pair; x [1, total, H, Din], or [1, total, H, K, Din]."""
    x = x if x.dim() == 5 else x.unsqueeze(3)
    memory = bank[ids.clamp(min=0), torch.arange(ids.shape[2], device=ids.device).unsqueeze(1)]
    return torch.where(ids.unsqueeze(-1) < 0, 0, (x.unsqueeze(-2) @ memory).squeeze(-2))


def example(total=70, heads=2, choices=2, memories=3, rows=24, columns=40, dtype=torch.float32, own_rows=False):
    x = torch.randn(1, total, heads, *([choices] if own_rows else []), rows).to(dtype)
    ids = torch.randint(-1, memories, (1, total, heads, choices))
    return x, ids, torch.randn(memories, heads, rows, columns) * rows**-0.5


def assert_right(grouped, x, ids, bank, bound=None):
    """The read and both gradients equal the definition's in float64."""
    x, bank = x.clone().requires_grad_(), bank.clone().requires_grad_()
    out = grouped.grouped_read(x, ids, bank)
    assert out.dtype == x.dtype
    exact = [t.detach().double().requires_grad_() for t in (x, bank)]
    expected = definition(exact[0], ids, exact[1])
    dy = torch.linspace(-9, 9, out.numel(), dtype=torch.float64).cos().view(out.shape).to(x.dtype)
    actual_grads = torch.autograd.grad(out, (x, bank), dy)
    bound = bound or BOUND[x.dtype]
    assert_close(out, expected, bound, "out")
    for name, a, e in zip(("x", "bank"), actual_grads, torch.autograd.grad(expected, exact, dy.double())):
        assert_close(a, e, bound, f"gradient of {name}")


@given(
    total=st.integers(1, 150), heads=st.integers(1, 2), choices=st.integers(1, 3), memories=st.integers(1, 4),
    rows=st.sampled_from([16, 24, 72]), columns=st.sampled_from([16, 40, 136]), own_rows=st.booleans(),
)  # fmt: skip
def test_read_and_gradients(grouped, total, heads, choices, memories, rows, columns, own_rows):
    assert_right(grouped, *example(total, heads, choices, memories, rows, columns, own_rows=own_rows))


@pytest.mark.parametrize("rows, columns", [(512, 24), (24, 512)])
def test_layers_of_a_wide_mlp(grouped, rows, columns):
    assert_right(grouped, *example(20, 1, rows=rows, columns=columns))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(grouped, dtype):
    assert_right(grouped, *example(150, 1, 3, rows=64, columns=48, dtype=dtype))


def test_gradients_of_a_tokens_choices_are_summed_in_float32(grouped):
    """Two memories that nearly cancel: rounded to bf16 one by one, their sum would be wrong by some percent."""
    x, ids, bank = example(40, 1, 2, memories=2, dtype=torch.bfloat16)
    ids[:] = torch.arange(2)
    bank[0] = bank[0].sign()
    bank[1] = -bank[0] * 15 / 16
    dy = torch.randn(1, 40, 1, 1, bank.shape[3]).bfloat16()
    x.requires_grad_()
    (dx,) = torch.autograd.grad(grouped.grouped_read(x, ids, bank), x, dy.expand(*ids.shape, -1))
    assert_close(dx, torch.einsum("bthjo,mhio->bthi", dy.double(), bank.double()), 5e-3)


@pytest.mark.parametrize("memory", [-1, 0, 4])
def test_all_tokens_choose_one_memory(grouped, memory):
    """More pairs than a block; the memories that nobody chose have a gradient of exactly zero."""
    x, ids, bank = example(150, 1, 2, memories=5)
    ids.fill_(memory)
    assert_right(grouped, x, ids, bank)
    bank.requires_grad_()
    grouped.grouped_read(x, ids, bank).sum().backward()
    assert [m for m in range(5) if bank.grad[m].any()] == ([] if memory < 0 else [memory])


def test_no_memory_at_all(grouped):
    x, ids, bank = example(memories=0)
    ids.fill_(-1)
    x.requires_grad_(), bank.requires_grad_()
    out = grouped.grouped_read(x, ids, bank)
    out.sum().backward()
    assert not out.any() and not x.grad.any() and bank.grad.shape == bank.shape


def test_only_the_wanted_gradient_is_computed(grouped, monkeypatch):
    x, ids, bank = example(5)
    monkeypatch.setattr(grouped, "_bank_gradient", None)
    x.requires_grad_()
    grouped.grouped_read(x, ids, bank).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("memories", [3, 40_000])
def test_groups_hold_every_pair_once_in_token_order(grouped, memories):
    """With few groups the sort's keys are of 16 bits, with 40,000 memories of 32."""
    _, ids, _ = example(300, 2, 3)
    ids = torch.where(ids > 0, memories - ids, ids)
    order, offsets, programs = grouped.group_choices(ids, memories)
    assert sorted(order.tolist()) == list(range(ids.numel()))
    for head in range(2):
        for memory in sorted(set(ids.flatten().tolist())):
            group = head * (memories + 1) + (memories if memory < 0 else memory)
            members = order[offsets[group] : offsets[group + 1]]
            of_head = torch.arange(ids.numel()).view(ids.shape)[:, :, head]
            assert torch.equal(members, of_head[ids[:, :, head] == memory])
    covered = [(g, c) for g, c in programs.tolist() if g >= 0]
    sizes = offsets.diff()
    blocks = [(g, c) for g in sizes.nonzero().flatten().tolist() for c in range(-(-int(sizes[g]) // grouped.BLOCK))]
    assert covered == blocks


def test_shared_groups_and_repeatable(grouped):
    x, ids, bank = (t.requires_grad_() if t.is_floating_point() else t for t in example(200, 2, 3))
    first = grouped.grouped_read(x, ids, bank)
    again = grouped.grouped_read(x, ids, bank, grouped.group_choices(ids, bank.shape[0]))
    assert torch.equal(first, again)
    dy = torch.randn_like(first)
    for a, b in zip(torch.autograd.grad(first, (x, bank), dy), torch.autograd.grad(again, (x, bank), dy)):
        assert torch.equal(a, b)


def test_a_pair_is_independent_of_all_others(grouped):
    x, ids, bank = example(200, 1, 2)
    before = grouped.grouped_read(x, ids, bank)
    x, ids = x.clone(), ids.clone()
    x[:, 100:], ids[:, 100:] = 7, -1
    after = grouped.grouped_read(x, ids, bank)
    assert torch.equal(before[:, :100], after[:, :100]) and not after[:, 100:].any()


def test_strided_input(grouped):
    x, ids, bank = example()
    strided = grouped.grouped_read(x.transpose(1, 2).contiguous().transpose(1, 2), ids, bank.mT.contiguous().mT)
    assert torch.equal(strided, grouped.grouped_read(x, ids, bank))


def test_compiles_to_one_graph_and_takes_meta_tensors(grouped):
    x, ids, bank = example()
    tensors = [x.requires_grad_(), bank.requires_grad_()]

    def loss(x, bank):
        return grouped.grouped_read(x, ids, bank).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for a, e in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
        assert_close(a, e)
    meta = [t.detach().to("meta").requires_grad_() for t in tensors]
    out = grouped.grouped_read(meta[0], ids.to("meta"), meta[1])
    assert out.shape == (*ids.shape, bank.shape[3]) and out.device.type == "meta"
    assert [g.shape for g in torch.autograd.grad(out.sum(), meta)] == [t.shape for t in meta]


def test_registered_operators_pass_torchs_checks(grouped):
    x, ids, bank = example()
    groups = grouped.group_choices(ids, bank.shape[0])
    x = x.flatten(0, 2)
    inputs = (x.clone().requires_grad_(), bank.clone().requires_grad_(), *groups, 2)
    torch.library.opcheck(grouped._forward, inputs)
    dy = torch.randn(ids.numel(), bank.shape[3])
    kinds = ("test_schema", "test_faketensor")
    torch.library.opcheck(grouped._input_gradient, (dy, bank, *groups, 2), test_utils=kinds)
    torch.library.opcheck(grouped._input_gradient, (dy.bfloat16(), bank, *groups, 1), test_utils=kinds)
    torch.library.opcheck(grouped._bank_gradient, (x, dy, bank, groups.order, groups.offsets, 2), test_utils=kinds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 3, 2, 16)}, "x has shape [1, 3, 2, 16], needs [1, total, H, Din] = [1, 3, 2, 24]"),
        ({"x": torch.zeros(1, 3, 2, 1, 24)}, "x has shape [1, 3, 2, 1, 24], needs [1, total, H, K, Din] = [1, 3, 2, 2, 24]"),
        ({"x": torch.zeros(1, 3, 2, 24).double()}, "x has dtype torch.float64, needs one of float32, bfloat16, float16"),
        ({"ids": torch.zeros(1, 3, 2, 2).int()}, "need torch.int64 and torch.float32"),
        ({"ids": torch.zeros(1, 3, 2, dtype=torch.int64)}, "ids has shape [1, 3, 2], needs 4 dimensions [1, total, H, K]"),
        ({"ids": torch.zeros(2, 3, 2, 2, dtype=torch.int64)}, "needs [1, total, H, K] with nothing empty"),
        ({"ids": torch.full((1, 3, 2, 2), 5)}, "ids go from 5 to 5, need -1 to 4"),
        ({"ids": torch.full((1, 3, 2, 2), -2)}, "ids go from -2 to -2, need -1 to 4"),
        ({"bank": torch.zeros(5, 1, 24, 16)}, "bank has shape [5, 1, 24, 16], needs [M, H, Din, Dout] = [5, 2, 24, 16]"),
        ({"bank": torch.zeros(5, 2, 24, 20)}, "has 20 columns, needs a multiple of 8 from 16 to 512"),
        ({"bank": torch.zeros(5, 2, 24, 16).half()}, "need torch.int64 and torch.float32"),
    ],
)
def test_bad_input_is_one_clear_line(grouped, change, message):
    good = {"x": torch.zeros(1, 3, 2, 24), "ids": torch.zeros(1, 3, 2, 2, dtype=torch.int64), "bank": torch.zeros(5, 2, 24, 16)}
    with pytest.raises((ValueError, TypeError)) as error:
        grouped.grouped_read(**{**good, **change})
    assert message in str(error.value)
    assert str(error.value).startswith("grouped_read: ") and "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 128), (256, 256), (128, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_at_real_size(grouped, rows, columns, dtype):
    x, ids, bank = (t.cuda() for t in example(4096, 4, 4, 32, rows, columns, dtype))
    x.requires_grad_(), bank.requires_grad_()
    out = grouped.grouped_read(x, ids, bank)
    dy = torch.randn_like(out)
    exact = [t.detach().double().requires_grad_() for t in (x, bank)]
    every = torch.einsum("thi,mhio->thmo", exact[0][0], exact[1])
    picked = every.gather(2, ids[0].clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, columns))
    expected = torch.where(ids[0].unsqueeze(-1) < 0, 0, picked).unsqueeze(0)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert_close(out.detach(), expected.detach(), bound, "out")
    grads = torch.autograd.grad(out, (x, bank), dy)
    for name, a, e in zip(("x", "bank"), grads, torch.autograd.grad(expected, exact, dy.double())):
        assert_close(a, e, bound, f"gradient of {name}")
    for a, b in zip(grads, torch.autograd.grad(grouped.grouped_read(x, ids, bank), (x, bank), dy)):
        assert torch.equal(a, b)
