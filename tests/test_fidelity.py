"""The sequential lines printed in docs/fidelity.md, run against the operators, so that the page can't drift from the code."""

import re
from pathlib import Path

import pytest
import torch
from checks import assert_close

from memzoo.kernels import delta_rule, linear_attention, linked_attention, neural_memory
from memzoo.layers.neural_memory import dense_layout
from memzoo.layers.state import LayerState

PAGE = (Path(__file__).parent.parent / "docs" / "fidelity.md").read_text()


def printed(name):
    source = re.search(rf"<!-- sequential: {name} -->\n```python\n(.*?)```", PAGE, re.S).group(1)
    scope = {"torch": torch}
    exec(source, scope)
    return scope[name]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_sdnc(implementation):
    q, k, v = draw(1, 17, 2, 16), draw(1, 17, 2, 16), draw(1, 17, 2, 24)
    strength, retention, modes = 1 + draw(1, 17, 2).exp(), draw(1, 17, 2).sigmoid(), draw(1, 17, 2, 3).softmax(-1)
    y = linked_attention(
        q, k, v, modes, scale=0.3, key_strength=strength, log_retention=retention.log(), implementation=implementation
    )
    for h in range(2):
        expected = printed("sdnc")(q[0, :, h], k[0, :, h], v[0, :, h], 0.3, strength[0, :, h], retention[0, :, h], modes[0, :, h])
        assert_close(y[0, :, h], expected)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize(("write_rule", "normalize"), [("additive", True), ("additive", False), ("delta", False)])
def test_linear_transformer(implementation, write_rule, normalize):
    q, k = (torch.nn.functional.elu(draw(1, 40, 2, 16)) + 1 for _ in range(2))
    k = torch.nn.functional.normalize(k, dim=-1)
    v, log_decay, beta = draw(1, 40, 2, 24), -draw(1, 40, 2).exp(), draw(1, 40, 2).sigmoid()
    if write_rule == "additive":
        y, _ = linear_attention(q, k, v, log_decay, normalize=normalize, implementation=implementation)
    else:
        y, _ = delta_rule(q, k, v, beta, log_decay, implementation=implementation)
    for h in range(2):
        expected = printed("linear_transformer")(
            q[0, :, h], k[0, :, h], v[0, :, h], log_decay[0, :, h], beta[0, :, h], write_rule, normalize
        )
        assert_close(y[0, :, h], expected)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("depth", [1, 2])
def test_titans(implementation, depth):
    q, k, v = (draw(1, 19, 2, 16) for _ in range(3))
    lr, momentum, decay = (draw(1, 19, 2).sigmoid() for _ in range(3))
    sizes = [16] + [24] * (depth - 1) + [16]
    weights = [draw(2, a, b) / 4 for a, b in zip(sizes, sizes[1:])]
    options = {"chunk_size": 5, "max_grad_norm": 4.0, "implementation": implementation}
    y, _ = neural_memory(q, k, v, lr, momentum, decay, weights, **options)
    for h in range(2):
        gates = (lr[0, :, h], momentum[0, :, h], decay[0, :, h])
        expected = printed("titans")(q[0, :, h], k[0, :, h], v[0, :, h], *gates, [w[h] for w in weights], 5, 4.0)
        assert_close(y[0, :, h], expected)


class TokenByToken:
    """One block of a Titans model as the functions that the sequential lines take: every call is one token."""

    def __init__(self, variant):
        from zoo import model

        self.model = model(
            f"titans-{variant}",
            torch.float64,
            num_hidden_layers=1,
            position_embedding="none",
            num_persistent_tokens=3,
            attention_conv_width=0,
        )
        self.block = self.model.model.layers[0]
        parts = self.block.mixer
        self.memory = parts if variant == "mal" else parts.memory
        self.attention = self.block.reader if variant == "mal" else parts.attention
        self.gate = None if variant == "mal" else lambda x, y, m: parts.gate(x[None, None], y[None, None], m[None, None])[0, 0]
        self.state = LayerState()

    def write(self, x):
        return self.memory(x[None, None], state=self.state)[0, 0]

    def weights(self):
        held = self.memory.held(self.state)
        return tuple(w[None] for w in self.memory.memory) if held is None else held.weights

    def read(self, weights, x):
        x = x[None, None]
        q = self.memory.queries(x, dense_layout(x), self.state, "conv_context")
        return self.memory.retrieve(x, q, weights, dense_layout(x))[0, 0]

    def attend(self, x, rows):
        """Softmax attention of one token over the persistent vectors and `rows`, head by head."""
        a = self.attention
        rows = torch.cat((a.persistent, torch.stack(rows)))
        heads = []
        for h in range(a.num_heads):
            shared = h // (a.num_heads // a.num_key_value_heads)
            q, k, v = (
                (t @ proj.weight.T)[..., i * a.head_dim : (i + 1) * a.head_dim]
                for t, proj, i in ((x, a.q_proj, h), (rows, a.k_proj, shared), (rows, a.v_proj, shared))
            )
            heads.append((k @ q / a.head_dim**0.5).softmax(0) @ v)
        return torch.cat(heads) @ a.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_titans_with_attention(variant):
    parts, x = TokenByToken(variant), draw(1, 17, 32)
    config, layout = parts.model.config, dense_layout(x)
    if variant == "mac":
        y = parts.block.mixer(x, layout)
        expected = printed("titans_mac")(
            x[0], parts.read, parts.write, parts.weights, parts.attend, parts.gate, config.segment_length
        )
    elif variant == "mag":
        y = parts.block.mixer(x, layout)
        expected = printed("titans_mag")(x[0], parts.write, parts.attend, parts.gate, config.sliding_window)
    else:
        block = parts.block
        y = x + block.mixer(block.mixer_norm(x), layout)
        y = y + block.reader(block.reader_norm(y), layout)
        norms = (block.mixer_norm, block.reader_norm)
        expected = printed("titans_mal")(x[0], parts.write, parts.attend, *norms, config.sliding_window)
    assert_close(y[0], expected)


def test_every_architecture_has_its_table():
    from memzoo.models.registry import ARCHITECTURES

    for architecture in ARCHITECTURES:
        assert f"<!-- sequential: {architecture.model_type} -->" in PAGE
