"""The sequential lines printed in docs/fidelity.md, run against the operators, so that the page can't drift from the code."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close

from memzoo.kernels import delta_rule, linear_attention, linked_attention, neural_memory
from memzoo.layers.neural_memory import dense_layout
from memzoo.layers.state import LayerState
from memzoo.models.mc_rnn.configuration_mc_rnn import VECTORS

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


def convolved(x, convolution):
    """Causal depthwise convolution and SiLU of x [T, C], tap by tap."""
    taps = convolution.weight
    padded = torch.cat((x.new_zeros(taps.shape[1] - 1, x.shape[1]), x))
    return F.silu(sum(padded[i : i + len(x)] * taps[:, i] for i in range(taps.shape[1])))


class OneHeadAtATime:
    """The mixer of a model with a cache, worked out from its weights with the sequential lines: x [T, d] to the same shape."""

    def __init__(self, config, mixer, sizes):
        self.config, self.mixer, self.sizes = config, mixer, sizes

    def __call__(self, x):
        c, m = self.config, self.mixer
        if c.memory in VECTORS:
            memories, q, k = self.vectors(x)
        else:
            q, k, v = (convolved(p(x), m.convolutions[n]) for n, p in (("q", m.q_proj), ("k", m.k_proj), ("v", m.v_proj)))
            q, k, v = (t.unflatten(-1, (c.num_attention_heads, -1)) for t in (q, k, v))
            q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
            memories = (self.matrix if c.memory in ("linear", "swla") else self.deep)(x, q, k, v)
        u, keys = q, k
        if m.router is not None and m.router.project is not None:
            u, keys = (torch.stack([t[:, h] @ m.router.project[h] for h in range(t.shape[1])], 1) for t in (q, k))
        if c.routing == "energy":
            u = m.router.log_tau.exp().sqrt()[:, None] * u
        elif m.router is not None:
            u = m.router.u_proj(x).unflatten(-1, (c.num_attention_heads, -1))
        options = (c.aggregation, c.routing, c.top_k, c.restart, c.max_cached_segments)
        y = torch.stack(
            [printed("mc_rnn")(memory, u[:, h], keys[:, h], self.sizes, *options) for h, memory in enumerate(memories)], 1
        )
        if m.output_norm is not None:
            y = m.output_norm(y)
        y = y.flatten(1)
        if c.memory not in VECTORS:
            y = y * F.silu(m.gate_proj(x))
        return m.o_proj(y)

    def matrix(self, x, q, k, v):
        m, (a, b, l) = self.mixer, x.new_tensor([1.0, 0.0, 1.0])[:, None, None].expand(-1, len(x), q.shape[1])
        if self.config.memory == "swla":
            a = (-m.decay_log_rate.exp() * F.softplus(m.decay_proj(x) + m.decay_step_bias)).exp()
            b, l = m.beta_proj(x).sigmoid(), m.write_proj(x).sigmoid()
        return [printed("mc_matrix")(*(t[:, h] for t in (q, k, v, a, b, l))) for h in range(q.shape[1])]

    def deep(self, x, q, k, v):
        c, m = self.config, self.mixer
        theta = c.lr_max * m.lr_proj(x).sigmoid()
        eta, alpha = torch.zeros_like(theta), torch.zeros_like(theta)
        if c.memory == "titans":
            eta, alpha = m.momentum_proj(x).sigmoid(), m.decay_proj(x).sigmoid()
        options = ("l2" if c.memory == "titans" else "dot", c.chunk_size, c.max_grad_norm)
        tokens = (q, k, v, theta, eta, alpha)
        return [printed("mc_deep")(*(t[:, h] for t in tokens), [w[h] for w in m.memory], *options) for h in range(q.shape[1])]

    def vectors(self, x):
        m, heads = self.mixer, range(self.config.num_attention_heads)
        seen = convolved(x, m.convolution)
        q, k = ((seen if p is None else p(seen)).unflatten(-1, (len(heads), -1)) for p in (m.q_proj, m.k_proj))
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        tokens = m.gates_proj(seen).unflatten(-1, (len(heads), -1, self.config.head_dim))
        if self.config.memory == "lstm":
            return [printed("mc_lstm")(tokens[:, h], m.recurrent_weight[h]) for h in heads], q, k
        gate = m.gate_proj(x).sigmoid().unflatten(-1, (len(heads), -1))
        if self.config.memory == "gated_linear":
            return [printed("mc_gated_linear")(tokens[:, h], gate[:, h]) for h in heads], q, k
        return [printed("mc_gru")(tokens[:, h], m.recurrent_weight[h], m.recurrent_bias[h], gate[:, h]) for h in heads], q, k


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "linear"},
        {"memory": "linear", "aggregation": "residual", "restart": False},
        {"memory": "linear", "aggregation": "sparse", "top_k": 1, "routing": "energy"},
        {
            "memory": "linear",
            "aggregation": "sparse",
            "top_k": 2,
            "routing": "submax",
            "segment_length": 3,
            "routing_dim": 16,
            "head_dim": 24,
        },
        {"memory": "linear", "max_cached_segments": 2, "segment_length": 3},
        {"memory": "linear", "segmentation": "log"},
        {"memory": "swla"},
        {"memory": "swla", "restart": False, "routing": "energy", "routing_dim": 16, "head_dim": 24},
        {"memory": "dla", "aggregation": "soup"},
        {"memory": "dla", "aggregation": "residual", "restart": False},
        {"memory": "titans"},
        {"memory": "titans", "aggregation": "average"},
        {"memory": "titans", "aggregation": "sparse", "top_k": 1, "restart": False, "segmentation": "log"},
        {"memory": "lstm"},
        {"memory": "lstm", "routing": "energy", "restart": False},
        {"memory": "lstm", "aggregation": "average"},
        {"memory": "gru", "aggregation": "sparse", "top_k": 1},
        {"memory": "gated_linear", "routing": "submax", "segment_length": 9},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_memory_caching(options):
    from zoo import model

    length = 19
    built = model("mc-linear", torch.float64, num_hidden_layers=1, **options).requires_grad_(False)
    config, mixer, x = built.config, built.model.layers[0].mixer, draw(1, length, 32)
    for parameter in mixer.parameters():
        if not parameter.any():  # biases start at zero, where leaving one out would not show
            parameter.normal_()
    sizes = [16, 2, 1] if config.segmentation == "log" else [config.segment_length] * -(-length // config.segment_length)
    assert_close(mixer(x, dense_layout(x))[0], OneHeadAtATime(config, mixer, sizes)(x[0]))


def test_every_architecture_has_its_table():
    from memzoo.models.registry import ARCHITECTURES

    for architecture in ARCHITECTURES:
        assert f"<!-- sequential: {architecture.model_type} -->" in PAGE
