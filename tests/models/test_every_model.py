"""The properties of every memory (docs/fidelity.md), asked of every architecture as a whole model."""

import pytest
import torch
import zoo
from checks import assert_close

from memzoo.models.registry import ARCHITECTURES

every_model = pytest.mark.parametrize("name", zoo.NAMES)
LENGTH = 23


def tokens(batch=2, length=LENGTH, seed=1):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_every_architecture_is_in_the_zoo_of_tests():
    assert zoo.covered_model_types() == {a.model_type for a in ARCHITECTURES}


@every_model
def test_causal(name):
    model = zoo.model(name, torch.float64)
    ids = tokens()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for t in (1, 9, LENGTH - 1):
            changed = ids.clone()
            changed[:, t:] = changed[:, t:] % 60 + 1
            after = model(changed, use_cache=False).logits
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if "window" not in name])  # test_sdnc.py has a window's reach
def test_every_token_reaches_later_outputs(name):
    """The other side of causality: with large gates, changing an early token does change what follows it."""
    model = zoo.model(name, torch.float64)
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 2] = changed[0, 2] % 60 + 1
    with torch.no_grad():
        difference = (model(ids, use_cache=False).logits - model(changed, use_cache=False).logits).abs().amax(-1)[0]
    assert (difference[:2] == 0).all()
    assert (difference[2:] > 0).all()


@every_model
def test_batch_independent(name):
    model = zoo.model(name, torch.float64)
    ids = tokens(3)
    changed = ids.clone()
    changed[1] = tokens(1, seed=7)[0]
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@every_model
def test_repeatable_and_changes_nothing(name):
    model = zoo.model(name)
    held = {key: value.clone() for key, value in [*model.named_parameters(), *model.named_buffers()]}
    with torch.no_grad():
        first = model(tokens()).logits
        assert torch.equal(first, model(tokens()).logits)
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(value, held[key])


@every_model
def test_equals_the_definition_with_all_gradients(name, monkeypatch):
    model = zoo.model(name, torch.float64)
    ids = tokens()

    def run():
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        return output.logits.detach(), {key: value.grad.clone() for key, value in model.named_parameters()}

    monkeypatch.setenv("MEMZOO_KERNELS", "reference")
    expected, expected_grads = run()
    monkeypatch.setenv("MEMZOO_KERNELS", "chunked")
    actual, grads = run()
    assert_close(actual, expected)
    for key, value in expected_grads.items():
        assert value.any(), f"{key} gets no gradient"
        assert_close(grads[key], value, 1e-8, key)


@every_model
def test_triton_kernels_equal_the_definition(name, monkeypatch):
    model = zoo.model(name, scale=3.0, num_hidden_layers=1, **zoo.for_triton(name))
    ids = tokens(1, 19)
    monkeypatch.setenv("MEMZOO_KERNELS", "reference")
    expected = model.double()(ids, labels=ids, use_cache=False)
    model.float()
    monkeypatch.setenv("MEMZOO_KERNELS", "triton")
    actual = model(ids, labels=ids, use_cache=False)
    assert_close(actual.logits, expected.logits.float(), 1e-4)
    actual.loss.backward()
    for key, value in model.named_parameters():
        assert value.grad is not None and torch.isfinite(value.grad).all(), key


@every_model
@pytest.mark.parametrize("kernels", ["chunked", "triton"])
def test_prefill_and_decode_equal_one_pass(name, kernels, monkeypatch):
    monkeypatch.setenv("MEMZOO_KERNELS", kernels)
    interpreted = kernels == "triton"  # slow: one layer, and one split that has every kind of call
    changes = {"num_hidden_layers": 1, **zoo.for_triton(name)} if interpreted else {}
    model = zoo.model(name, scale=3.0, **changes)
    length = 9
    ids = tokens(2, length)
    splits = [[4, 1, 3, 1]] if interpreted else [[1] * length, [4, 1, 3, 1], [length - 1, 1], [1, length - 1]]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for sizes in splits:
            cache, parts, start = None, [], 0
            for size in sizes:
                output = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
                cache, start = output.past_key_values, start + size
                parts.append(output.logits)
            assert_close(torch.cat(parts, dim=1), whole, 1e-4, str(sizes))
            assert cache.get_seq_length() == length


@every_model
def test_padding_changes_nothing(name):
    model = zoo.model(name, torch.float64)
    rows = [tokens(1, n, seed=n)[0] for n in (3, 9, 1)]
    with torch.no_grad():
        alone = [model(row[None], use_cache=False).logits[0] for row in rows]
        for side in ("left", "right", "both"):
            ids, mask = torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 14, dtype=torch.long)
            for i, row in enumerate(rows):
                start = {"left": 14 - len(row), "right": 0, "both": 2 + i}[side]
                ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            for i in range(3):
                assert_close(logits[i, mask[i].bool()], alone[i], 1e-9, side)
            # What stands under a pad must not matter either.
            other = torch.where(mask == 0, 5, ids)
            assert torch.equal(model(other, attention_mask=mask, use_cache=False).logits, logits)


@every_model
@pytest.mark.parametrize("kernels", ["chunked", "triton"])
def test_padded_prompts_decode_as_if_alone(name, kernels, monkeypatch):
    monkeypatch.setenv("MEMZOO_KERNELS", kernels)
    interpreted = kernels == "triton"  # slow: one layer, and the one prefill that meets pads in the middle of a sequence's cache
    changes = {"num_hidden_layers": 1, **zoo.for_triton(name)} if interpreted else {}
    model = zoo.model(name, scale=3.0, **changes)
    rows = [tokens(1, n + 4, seed=n)[0] for n in (3, 7, 1)]
    with torch.no_grad():
        alone = [model(row[None], use_cache=False).logits[0] for row in rows]
        for side, prefill in [("left", [2, 5])] if interpreted else [("left", [7]), ("left", [2, 5]), ("right", [7])]:
            ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
            for i, row in enumerate(rows):
                n = len(row) - 4
                start = 7 - n if side == "left" else 0
                ids[i, start : start + n], mask[i, start : start + n] = row[:n], 1
            cache, start = None, 0
            for size in prefill:
                end = start + size
                output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
                cache, start = output.past_key_values, end
            for step in range(2 if interpreted else 4):
                mask = torch.cat((mask, mask.new_ones(3, 1)), dim=1)
                following = torch.stack([row[len(row) - 4 + step] for row in rows])[:, None]
                # With and without the mask: the cache itself knows how many real tokens each sequence has.
                given = mask if step % 2 else None
                output = model(following, attention_mask=given, past_key_values=cache, use_cache=True)
                for i, row in enumerate(rows):
                    assert_close(output.logits[i, -1], alone[i][len(row) - 4 + step], 1e-4, f"{side} {step}")


@every_model
def test_packed_equals_separate(name):
    model = zoo.model(name, torch.float64)
    lengths = [5, 1, 12, 3]
    rows = [tokens(1, n, seed=n)[0] for n in lengths]
    packed = torch.cat(rows)[None]
    cu_seqlens = torch.tensor([0, 5, 6, 18, 21], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        alone = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
        for given in ({"cu_seqlens": cu_seqlens}, {"cu_seq_lens_q": cu_seqlens, "max_length_q": 12}, {"position_ids": positions}):
            assert_close(model(packed, **given).logits[0], alone, 1e-9, str(list(given)))
        losses = [model(row[None], labels=row[None], use_cache=False).loss * (len(row) - 1) for row in rows if len(row) > 1]
        expected = sum(losses) / sum(n - 1 for n in lengths if n > 1)
        assert_close(model(packed, labels=packed, cu_seqlens=cu_seqlens).loss, expected, 1e-6)  # transformers' loss is float32


@every_model
def test_packed_gradients_equal_separate(name):
    model = zoo.model(name, torch.float64)
    rows = [tokens(1, n, seed=n) for n in (5, 12)]
    for row in rows:
        (model(row, labels=row, use_cache=False).loss * (row.shape[1] - 1)).backward()
    expected = {key: value.grad.clone() / 15 for key, value in model.named_parameters()}
    model.zero_grad()
    packed = torch.cat(rows, dim=1)
    model(packed, labels=packed, cu_seqlens=torch.tensor([0, 5, 17])).loss.backward()
    for key, value in model.named_parameters():
        assert_close(value.grad, expected[key], 1e-6, key)  # transformers' loss is float32


@every_model
def test_finite_for_long_input(name):
    """65,536 random tokens at the default initialisation: nothing overflows, and the output does not grow."""
    model = (
        zoo.model(name, scale=1.0, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16)
        if (name.startswith("sdnc"))
        else zoo.model(name, scale=1.0, num_hidden_layers=1, num_attention_heads=1, head_dim=16, **zoo.for_long_input(name))
    )
    with torch.no_grad():
        hidden = model.model(tokens(1, 65_536), use_cache=False).last_hidden_state
    assert torch.isfinite(hidden).all()
    assert hidden[:, -4096:].abs().amax() < 4 * hidden[:, :4096].abs().amax()


@every_model
def test_state_bytes_are_what_is_held(name):
    model = zoo.model(name)
    for length in (1, 3, 17):
        with torch.no_grad():
            cache = model(tokens(2, length), use_cache=True).past_key_values
        assert cache.state_bytes() == 2 * model.state_bytes(length)


@every_model
@pytest.mark.gpu
def test_gpu_bfloat16_model_is_near_its_float32_self(name):
    model = zoo.model(name, scale=2.0, hidden_size=256, head_dim=64, num_attention_heads=4, **zoo.for_triton(name)).cuda()
    ids = tokens(2, 1031).cuda()
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits.float()
        rounded = model.bfloat16()(ids, use_cache=False).logits.float()
    assert_close(rounded, exact, 0.1)
