"""Counted operations: what flops_per_token says is what torch's FLOP counter sees, token by token, for every architecture."""

import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from memzoo.layers import convolution
from memzoo.layers.flops import rows_read
from memzoo.layers.neural_memory import NeuralMemory, dense_layout
from memzoo.layers.state import LayerState

every_model = pytest.mark.parametrize("name", zoo.NAMES)


def outer_product_flops(a, b, *, out_shape=None, **_):
    """Of a product [..., n, 1] * [..., 1, m], which torch's counter leaves out: with the sum into a state a multiply-add an element."""
    if not all(isinstance(shape, torch.Size) and len(shape) >= 2 for shape in (a, b)) or min(out_shape[-2:]) == 1:
        return 0
    outer = (a[-1] == 1 and b[-2] == 1) or (b[-1] == 1 and a[-2] == 1)
    return 2 * math.prod(out_shape) if outer else 0


def counted_convolution(x, weight, *, activation, initial_state, output_final_state, cu_seqlens):
    """The causal convolution through torch's, whose operations the counter knows."""
    assert cu_seqlens is None
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    window = torch.cat((initial_state, x), dim=1)
    y = F.conv1d(window.transpose(1, 2), weight[:, None], groups=x.shape[2]).transpose(1, 2)
    state = window[:, window.shape[1] - weight.shape[1] + 1 :]
    return F.silu(y) if activation == "silu" else y, state if output_final_state else None


def attention_flops(q, k, v, *_, out_shape=None, **__):
    return sdpa_flop_count(q, k, v)


def counter():
    """torch's counter, and what it does not know: outer products, and attention on a CPU."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={aten.mul: outer_product_flops, aten._scaled_dot_product_flash_attention_for_cpu: attention_flops},
    )


def persistent_state_token_by_token(self):
    """As NeuralMemory does it, but in single steps: a chunk of several tokens also pays for its masks."""
    written = LayerState()
    for vector in self.persistent:
        x = torch.stack([vector])[None]
        self._write_and_read(x, dense_layout(x), written, None, plain=True)
    return written


@every_model
@pytest.mark.parametrize("length", [1, 7, 19])
def test_flops_per_token_are_those_counted_token_by_token(name, length, monkeypatch):
    """A decode step does the definition's work and no more, so a sequence read in single steps is counted; the chunked forms also pay
    for hidden scores. Equal but for the row before a window, which a step with temporal links reads and hides."""
    monkeypatch.setattr(convolution, "causal_conv1d", counted_convolution)
    monkeypatch.setattr(NeuralMemory, "_persistent_state", persistent_state_token_by_token)
    model = zoo.model(name)
    ids = torch.randint(1, 61, (1, length))
    cache = None
    with torch.no_grad(), counter() as count:
        for t in range(length):
            cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
    slack = 0.01 if getattr(model.config, "temporal_links", False) and getattr(model.config, "sliding_window", None) else 1e-9
    assert model.flops_per_token(length) == pytest.approx(count.get_total_flops() / length, rel=slack)


@every_model
def test_flops_of_the_stack_without_a_head(name):
    model = zoo.model(name)
    head = 2 * model.config.hidden_size * model.config.vocab_size
    assert model.model.flops_per_token(9) + head == model.flops_per_token(9)


def test_a_convolution_of_its_own_is_what_stands_in_for_the_operator():
    x, weight, state = torch.randn(2, 5, 8), torch.randn(8, 3), torch.randn(2, 2, 8)
    options = {"activation": "silu", "initial_state": state, "output_final_state": True, "cu_seqlens": None}
    for ours, theirs in zip(counted_convolution(x, weight, **options), convolution.causal_conv1d(x, weight, **options)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length,window", [(1, None), (1, 4), (6, None), (6, 1), (6, 4), (6, 6), (6, 100)])
def test_rows_read_on_average(length, window):
    seen = [min(t + 1, window or length) for t in range(length)]
    assert rows_read(length, window) == pytest.approx(sum(seen) / length)


def test_cost_grows_with_the_length_where_a_memory_grows_and_only_there():
    def flops(name, length):
        return zoo.model(name).flops_per_token(length)

    assert flops("linear-transformer", 10**6) == flops("linear-transformer", 1)
    model = zoo.model("sdnc")
    extra = 2 * 2 * model.config.num_hidden_layers * model.config.num_attention_heads * model.config.head_dim / 2
    assert model.flops_per_token(2001) - model.flops_per_token(1) == extra * 2000
    assert flops("sdnc-window", 10**6) < flops("sdnc", 64)


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_without_tokens_is_refused(length):
    with pytest.raises(ValueError, match=f"flops_per_token: length is {length}, needs at least 1"):
        zoo.model("sdnc").flops_per_token(length)
