"""What the operators share: packed sequences, the choice of implementation, limits, launch tables."""

import pytest
import torch
from checks import packed_example

from memzoo.kernels import attention, delta_rule, linear_attention
from memzoo.kernels.common.dispatch import resolve_implementation
from memzoo.kernels.common.launch import Launch, LaunchTable
from memzoo.kernels.common.packing import chunk_indices, pack, sequence_ids, token_positions, unpack


@pytest.mark.parametrize("lengths", [[5, 1, 12], [0, 3, 0, 0, 4, 0], [1], [64, 65, 63]])
def test_packing(lengths):
    cu_seqlens, _ = packed_example(lengths)
    total = sum(lengths)
    assert sequence_ids(cu_seqlens, total).tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
    assert token_positions(cu_seqlens, total).tolist() == [t for length in lengths for t in range(length)]
    x = torch.randn(1, total, 3)
    rows = unpack(x, cu_seqlens)
    assert rows.shape == (len(lengths), max(lengths), 3)
    for n, length in enumerate(lengths):
        assert torch.equal(rows[n, :length], x[0, cu_seqlens[n] : cu_seqlens[n + 1]])
        assert not rows[n, length:].any()
    assert torch.equal(pack(rows, cu_seqlens, total), x)


@pytest.mark.parametrize("lengths", [[5, 1, 12], [0, 3, 0, 0, 4, 0], [64, 65, 63]])
def test_chunk_indices_cover_every_chunk_once(lengths):
    cu_seqlens, _ = packed_example(lengths)
    programs = [tuple(row) for row in chunk_indices(cu_seqlens, sum(lengths), 4).tolist()]
    expected = [(n, chunk) for n, length in enumerate(lengths) for chunk in range(-(-length // 4))]
    assert [p for p in programs if p[0] >= 0] == expected
    assert all(p == (-1, 0) for p in programs[len(expected) :])


def test_choice_of_implementation(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.delenv("MEMZOO_KERNELS", raising=False)
    assert resolve_implementation("op", None, x) == "chunked"
    monkeypatch.setenv("MEMZOO_KERNELS", "reference")
    assert resolve_implementation("op", None, x) == "reference"
    assert resolve_implementation("op", "chunked", x) == "chunked"
    monkeypatch.setenv("MEMZOO_KERNELS", "fast")
    with pytest.raises(ValueError, match="op: MEMZOO_KERNELS is 'fast', needs one of triton, chunked, reference"):
        resolve_implementation("op", None, x)
    with pytest.raises(ValueError, match="op: implementation is 'fast'"):
        resolve_implementation("op", "fast", x)
    with pytest.raises(ValueError, match="no float64 kernels"):
        resolve_implementation("op", "triton", x.double())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' cannot take a tensor on cpu; use 'chunked' or 'reference'"):
        resolve_implementation("op", "triton", x)


def test_more_tokens_than_an_index_can_count_are_refused():
    long = [torch.empty(1, 2**31, 1, 16, device="meta") for _ in range(3)]
    beta = torch.empty(1, 2**31, 1, device="meta")
    for call in (lambda: attention(*long), lambda: linear_attention(*long), lambda: delta_rule(*long, beta)):
        with pytest.raises(ValueError, match=r"at most 2147483647 fit one call; split the batch") as error:
            call()
        assert "\n" not in str(error.value)


def test_launch_tables():
    small, large, newer = (Launch(n, 1, {"B": n}) for n in (1, 2, 4))
    table = LaunchTable({(64, 80): small, (128, 80): large, (128, 90): newer})
    assert table.lookup(16, 80) is small and table.lookup(64, 100) is small
    assert table.lookup(72, 80) is large and table.lookup(72, 90) is newer
    assert newer.options() == {"B": 4, "num_warps": 4, "num_stages": 1}
    with pytest.raises(ValueError, match="no launch for head dimension 256"):
        table.lookup(256, 90)
