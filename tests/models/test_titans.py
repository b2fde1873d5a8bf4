"""Titans: each variant against a token-by-token model on raw parameters, causality, ablations, bounded state, the layer used alone."""

import doctest
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from checks import assert_close
from torch import nn

from memzoo import preset
from memzoo.layers.neural_memory import NeuralMemory, dense_layout, watch
from memzoo.layers.state import LayerState

VARIANTS = ("lmm", "mac", "mag", "mal")
SEGMENT = 6  # of the zoo's configurations; chunks are 4 tokens, windows 5


def titans(variant, **changes):
    return zoo.model(f"titans-{variant}", torch.float64, **changes)


def tokens(length, seed=1, batch=1):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- a whole model by the equations, one token at a time, on nothing but its parameters ----


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


class Memory:
    """A neural memory and what it holds: M, S and the weights of the chunk's start, each a list of [H, Din, Dout]."""

    def __init__(self, layer, config):
        self.p, self.c = dict(layer.named_parameters()), config
        self.heads = config.num_attention_heads
        self.M = [self.p[f"memory.{i}"].detach() for i in range(config.memory_depth)]
        self.S, self.written, self.past = [torch.zeros_like(w) for w in self.M], 0, {}
        if config.variant != "mac" and config.num_persistent_tokens:
            for vector in self.p["persistent"]:
                self.write_and_read(vector)

    def stream(self, x, which, name):
        """Projection, convolution over this stream's own past, SiLU; [H, D]."""
        past = self.past.setdefault(name, [])
        past.append(self.p[f"{which}_proj.weight"] @ x)
        if self.c.conv_width:
            taps = self.p[f"convolutions.{which}.weight"]
            x = sum(taps[:, -1 - back] * past[-1 - back] for back in range(min(self.c.conv_width, len(past))))
        else:
            x = past[-1]
        return (x * x.sigmoid()).view(self.heads, -1)

    def apply(self, M, x):
        """M(x) of one head's layers."""
        y = x @ M[0]
        for W in M[1:]:
            y = (0.5 * y * (1 + torch.erf(y / math.sqrt(2)))) @ W
        return x + y if self.c.memory_residual else y

    def gate(self, name, x):
        return (self.p[f"{name}_proj.weight"] @ x + self.p[f"{name}_proj.bias"]).sigmoid()

    def write(self, x):
        """Eq. 10 to 14."""
        k, v = unit(self.stream(x, "k", "k")), self.stream(x, "v", "v")
        theta = self.c.lr_max * self.gate("lr", x)
        eta = self.gate("momentum", x) if self.c.momentum else torch.zeros(self.heads)
        alpha = self.gate("decay", x) if self.c.decay else torch.zeros(self.heads)
        if self.written % self.c.chunk_size == 0:
            self.start = self.M
        self.written += 1
        M, S, self.loss = [[] for _ in self.M], [[] for _ in self.M], []
        for h in range(self.heads):
            with torch.enable_grad():
                at = [w[h].detach().requires_grad_() for w in self.start]
                read = self.apply(at, k[h])
                loss = -(read @ v[h]) if self.c.inner_loss == "dot" else (read - v[h]).square().sum() / 2
                gradient = torch.autograd.grad(loss, at)
            norm = sum(g.square().sum() for g in gradient).sqrt()
            step = theta[h]
            if self.c.max_grad_norm is not None and norm > self.c.max_grad_norm:
                step = step * self.c.max_grad_norm / norm
            before = self.apply([w[h] for w in self.M], k[h])  # the loss that `watch` reports is that of the running memory
            self.loss.append(-(before @ v[h]) if self.c.inner_loss == "dot" else (before - v[h]).square().sum() / 2)
            for i, g in enumerate(gradient):
                S[i].append(eta[h] * self.S[i][h] - step * g)
                M[i].append((1 - alpha[h]) * self.M[i][h] + S[i][-1])
        self.M, self.S = [torch.stack(w) for w in M], [torch.stack(s) for s in S]

    def read(self, M, x, name):
        """Eq. 15 and what follows it: norm, gate, projection."""
        q = unit(self.stream(x, "q", name))
        y = torch.stack([self.apply([w[h] for w in M], q[h]) for h in range(self.heads)])
        y = rms(y, self.p["output_norm.weight"]).flatten()
        if self.c.output_gate:
            y = y * F.silu(self.p["gate_proj.weight"] @ x)
        return self.p["o_proj.weight"] @ y

    def write_and_read(self, x):
        self.write(x)
        return self.read(self.M, x, "q")


class Attention:
    """Softmax attention with persistent vectors; keeps every row and is told which to see."""

    def __init__(self, layer, config):
        self.p, self.c, self.rows, self.past = dict(layer.named_parameters()), config, [], {}
        for vector in self.p.get("persistent", ()):
            self.rows.append([(self.p[f"{which}_proj.weight"] @ vector).view(-1, config.head_dim) for which in "kv"])
        self.persistent = len(self.rows)

    def heads(self, which, x, position, name):
        """Projection, convolution over this stream's own past, rotary positions of queries and keys; [H, D]."""
        past = self.past.setdefault((which, name), [])
        past.append(self.p[f"{which}_proj.weight"] @ x)
        x = past[-1]
        if self.c.attention_conv_width:
            taps = self.p[f"convolutions.{which}.weight"]
            x = sum(taps[:, -1 - back] * past[-1 - back] for back in range(min(self.c.attention_conv_width, len(past))))
        x = x.view(-1, self.c.head_dim)
        if which == "v" or self.c.position_embedding == "none":
            return x
        half = self.c.head_dim // 2
        angle = position / 10000.0 ** (torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def add(self, x, position, name="tokens"):
        self.rows.append([self.heads(which, x, position, name) for which in "kv"])

    def see(self, x, position, rows):
        """x looks at the persistent rows and the last `rows` others."""
        q = self.heads("q", x, position, "tokens")
        seen = self.rows[: self.persistent] + (self.rows[-rows:] if rows else [])
        group = self.c.num_attention_heads // self.c.num_key_value_heads
        out = []
        for h in range(len(q)):
            weights = torch.stack([q[h] @ k[h // group] / math.sqrt(self.c.head_dim) for k, _ in seen]).softmax(0)
            out.append(sum(w * v[h // group] for w, (_, v) in zip(weights, seen)))
        return self.p["o_proj.weight"] @ torch.cat(out)


def in_window(layer, config, xs):
    attention, out = Attention(layer, config), []
    for t, x in enumerate(xs):
        attention.add(x, t)
        out.append(attention.see(x, t, min(t + 1, config.sliding_window)))
    return out


def gated(layer, config, x, y, m):
    y, m = rms(y, layer.attention_weight), rms(m, layer.memory_weight)
    if config.gate == "product":
        return y * m.sigmoid()
    g = (layer.mix_proj.weight @ x).sigmoid()
    return g * y + (1 - g) * m


def as_context(layer, config, xs):
    """MAC, Eq. 21 to 25."""
    memory, attention, out = Memory(layer.memory, config), Attention(layer.attention, config), []
    for t, x in enumerate(xs):
        if t % config.segment_length == 0:
            before = memory.M
        attention.add(memory.read(before, x, "context"), t, "retrieved")  # h_t
        attention.add(x, t)
        y = attention.see(x, t, 2 * (t % config.segment_length + 1))
        if config.attention_residual:
            y = x + y
        out.append(gated(layer.gate, config, x, y, memory.write_and_read(y)))
    return out


def last_hidden_state(model, ids):
    config = model.config
    xs = [model.model.embed_tokens.weight[i] for i in ids]

    def add(norm, mix):
        nonlocal xs
        xs = [x + y for x, y in zip(xs, mix([rms(x, norm.weight) for x in xs]))]

    for index, block in enumerate(model.model.layers):

        def mixer(xs, block=block, index=index):
            if index not in config.memory_layers:
                return in_window(block.mixer, config, xs)
            if config.variant == "mac":
                return as_context(block.mixer, config, xs)
            memory = Memory(block.mixer if config.variant in ("lmm", "mal") else block.mixer.memory, config)
            ms = [memory.write_and_read(x) for x in xs]
            if config.variant != "mag":
                return ms
            ys = in_window(block.mixer.attention, config, xs)
            return [gated(block.mixer.gate, config, *three) for three in zip(xs, ys, ms)]

        add(block.mixer_norm, mixer)
        if config.variant == "mal" and index in config.memory_layers:
            add(block.reader_norm, lambda xs, block=block: in_window(block.reader, config, xs))
        mlp = block.mlp
        w = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
        add(block.mlp_norm, lambda xs, w=w: [w[2] @ (F.silu(w[0] @ x) * (w[1] @ x)) for x in xs])
    return torch.stack([rms(x, model.model.norm.weight) for x in xs])


CHANGES = [
    {}, {"gate": "mix"}, {"num_key_value_heads": 1}, {"position_embedding": "rotary"}, {"num_persistent_tokens": 0},
    {"num_persistent_tokens": 3}, {"memory_layers": [1]}, {"memory_layers": []}, {"memory_depth": 1}, {"memory_depth": 3},
    {"memory_residual": False}, {"conv_width": 0}, {"conv_width": 1}, {"attention_conv_width": 0}, {"attention_conv_width": 4},
    {"momentum": False}, {"decay": False}, {"inner_loss": "dot"}, {"output_gate": False}, {"max_grad_norm": 0.2},
    {"max_grad_norm": None, "lr_max": 0.05}, {"chunk_size": 1}, {"chunk_size": 32}, {"segment_length": 1},
    {"segment_length": 64, "sliding_window": 2},
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "as-is")
def test_follows_the_equations_token_by_token(variant, changes):
    """Every switch does what its equation says, in all variants: the whole model, through attention, memory and MLP of two layers."""
    check(variant, changes)


@pytest.mark.parametrize("changes", [{}, {"segment_length": 4, "memory_layers": [1]}])
def test_attention_with_a_residual_follows_the_equations(changes):
    check("mac", {"attention_residual": True, **changes})
    with pytest.raises(ValueError, match="attention_residual"):
        titans("mag", attention_residual=True)


@torch.no_grad()
def check(variant, changes):
    model = titans(variant, **{"position_embedding": "none", **changes})
    ids = tokens(15)
    bound = 5e-6 if "position_embedding" in changes else 1e-9  # transformers' angles are float32
    assert_close(model.model(ids, use_cache=False).last_hidden_state[0], last_hidden_state(model, ids[0]), bound)


# ---- who sees what ----


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "changes", [{}, {"memory_layers": [0], "gate": "mix", "conv_width": 0, "attention_conv_width": 3}], ids=["as-is", "mix"]
)
def test_causal_at_every_position_of_a_segment(variant, changes):
    """Three segments and a bit: no output changes before the first changed token, and that token's own does."""
    model = titans(variant, **changes)
    ids = tokens(3 * SEGMENT + 2)
    before = model(ids, use_cache=False).logits
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, t:] = changed[:, t:] % 60 + 1
        after = model(changed, use_cache=False).logits
        assert torch.equal(before[:, :t], after[:, :t]), f"a token before {t} sees token {t} or later"
        assert not torch.equal(before[:, t], after[:, t])


def one_layer_of_mac(**changes):
    return titans("mac", num_hidden_layers=1, conv_width=0, attention_conv_width=0, position_embedding="none", **changes)


def reach(model, ids, position):
    """The positions whose outputs change with the token at `position`."""
    changed = ids.clone()
    changed[0, position] = changed[0, position] % 60 + 1
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    return difference.nonzero().flatten().tolist()


def test_macs_segments_are_joined_by_the_memory_alone():
    model, ids = one_layer_of_mac(decay=False), tokens(3 * SEGMENT)
    for position in (0, 3, SEGMENT - 1, SEGMENT):
        assert reach(model, ids, position) == list(range(position, 3 * SEGMENT))
    gate = model.model.layers[0].mixer.memory.lr_proj
    with torch.no_grad():
        gate.weight.zero_(), gate.bias.fill_(-1e4)  # theta = 0: nothing is written
    for position in (0, 3, SEGMENT - 1):
        assert reach(model, ids, position) == list(range(position, SEGMENT))
    assert reach(model, ids, 2 * SEGMENT) == list(range(2 * SEGMENT, 3 * SEGMENT))


@torch.no_grad()
def test_mac_retrieves_from_the_state_before_the_segment():
    """With an attention that reads nothing, what a token retrieves cannot matter; with one, the memory before the segment does."""
    model = one_layer_of_mac()
    mixer = model.model.layers[0].mixer
    x = torch.randn(1, 2 * SEGMENT, 32, dtype=torch.float64)
    asked = []
    retrieve = mixer.memory.retrieve
    mixer.memory.retrieve = lambda x, q, weights, layout: asked.append(weights) or retrieve(x, q, weights, layout)
    state = LayerState()
    for t in range(2 * SEGMENT):
        now = mixer.memory.held(state)
        if t == SEGMENT:
            at_the_boundary = now.weights
        mixer(x[:, t : t + 1], dense_layout(x[:, t : t + 1]), state)
    for t, weights in enumerate(asked):
        expected = [w[None] for w in mixer.memory.memory] if t < SEGMENT else at_the_boundary
        assert all(torch.equal(a, b) for a, b in zip(weights, expected))


@pytest.mark.parametrize("variant", ["mag", "mal"])
def test_attention_alone_reaches_as_far_as_the_window(variant):
    model = titans(variant, num_hidden_layers=1, memory_layers=[], sliding_window=4, attention_conv_width=0)
    assert reach(model, tokens(14), 3) == [3, 4, 5, 6]


# ---- ablations: what is left out is gone, and leaving it out is the same as turning it off ----


def same_but(variant, without, **changes):
    """A model without a part, and one with it that has the same weights elsewhere."""
    whole, part = titans(variant, **changes), titans(variant, **{**changes, **without})
    missing = part.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys
    return whole, part, missing.unexpected_keys


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gate", ["momentum", "decay"])
def test_without_momentum_or_decay(variant, gate):
    whole, part, gone = same_but(variant, {gate: False})
    assert gone and all(f"{gate}_proj" in name for name in gone)
    ids = tokens(14)
    expected = part(ids).logits
    assert not torch.allclose(whole(ids).logits, expected)
    for name, parameter in whole.named_parameters():
        if f"{gate}_proj" in name:
            parameter.fill_(-1e4 if name.endswith("bias") else 0)  # a sigmoid of exactly 0
    assert_close(whole(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_convolution(variant):
    whole, part, gone = same_but(variant, {"conv_width": 0, "attention_conv_width": 0}, conv_width=4, attention_conv_width=3)
    assert gone and all("convolutions" in name for name in gone)
    ids = tokens(14)
    expected = part(ids).logits
    assert not torch.allclose(whole(ids).logits, expected)
    for name, parameter in whole.named_parameters():
        if "convolutions" in name:
            parameter.zero_()[:, -1] = 1  # each token's own tap
    assert_close(whole(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_persistent_memory(variant):
    whole, part, gone = same_but(variant, {"num_persistent_tokens": 0}, num_persistent_tokens=2)
    assert gone and all(name.endswith("persistent") for name in gone)
    assert not torch.allclose(whole(tokens(14)).logits, part(tokens(14)).logits)
    for name in gone:
        parameter = dict(whole.named_parameters())[name]
        before = whole(tokens(14)).logits
        parameter.add_(1.0)
        assert not torch.allclose(before, whole(tokens(14)).logits), f"{name} does nothing"


@torch.no_grad()
def test_linear_memory():
    """One matrix a head, read as q M: linear in the queries, which an MLP is not."""
    for depth, linear in ((1, True), (2, False)):
        layer = titans("lmm", memory_depth=depth).model.layers[0].mixer
        assert [tuple(w.shape) for w in layer.memory] == ([(2, 16, 16)] if linear else [(2, 16, 32), (2, 32, 16)])
        q = torch.randn(1, 5, 2, 16, dtype=torch.float64)
        weights = tuple(w[None] for w in layer.memory)
        layer._output = lambda y, x: y
        once, thrice = (layer.retrieve(None, scale * q, weights, dense_layout(q)) for scale in (1, 3))
        assert torch.allclose(3 * once, thrice) == linear


def test_memory_in_named_layers():
    model = titans("mag", num_hidden_layers=3, memory_layers=[0, 2])
    memories = [name for name, module in model.named_modules() if isinstance(module, NeuralMemory)]
    assert memories == ["model.layers.0.mixer.memory", "model.layers.2.mixer.memory"]
    with pytest.raises(ValueError, match="memory_layers is \\[3\\], needs different layers from 0 to 2"):
        preset("titans-mag-tiny", num_hidden_layers=3, memory_layers=[3])
    with pytest.raises(ValueError, match="memory_layers is \\[0, 0\\]"):
        preset("titans-mag-tiny", memory_layers=[0, 0])


# ---- bounded state ----


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_state_is_bounded(variant):
    """Beyond the open segment or the window nothing grows, and one more segment leaves the size as it was."""
    model = zoo.model(f"titans-{variant}")
    sizes, cache = [], None
    for t in range(5 * SEGMENT):
        cache = model(tokens(1, seed=t, batch=2), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache.state_bytes())
    assert sizes[2 * SEGMENT :] == sizes[SEGMENT : 4 * SEGMENT]
    assert max(sizes) <= max(sizes[:SEGMENT])
    assert sizes == [2 * model.state_bytes(n) for n in range(1, 5 * SEGMENT + 1)]
    assert model.state_bytes(10**6 * SEGMENT) == model.state_bytes(SEGMENT)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_of_any_length_holds_no_more_than_decoding(variant):
    model, ids = titans(variant), tokens(4 * SEGMENT, batch=2)
    cache = model(ids[:, :1], use_cache=True).past_key_values
    for t in range(1, ids.shape[1]):
        model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        at_once = model(ids[:, : t + 1], use_cache=True).past_key_values
        assert at_once.state_bytes() == cache.state_bytes()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_in_any_pieces(variant):
    """Pieces that end inside a chunk, a segment and a window, at their ends, and hold several of them."""
    model, ids = titans(variant), tokens(4 * SEGMENT + 1, batch=2)
    whole = model(ids, use_cache=False).logits
    generator = torch.Generator().manual_seed(3)
    for cuts in (
        [SEGMENT],
        [1, 2 * SEGMENT],
        [5, 7, 8],
        *(torch.randperm(24, generator=generator)[:4].add(1).tolist() for _ in range(6)),
    ):
        cache, parts = None, []
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), ids.shape[1]]):
            output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert_close(torch.cat(parts, 1), whole, 1e-9, str(cuts))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_prompts_cross_segments_at_their_own_places(variant):
    """Left padding over several segments, then beams: rows stand at different places of segment, window and chunk."""
    model = titans(variant)
    rows = [tokens(n, seed=n)[0] for n in (SEGMENT - 1, 2 * SEGMENT, 2 * SEGMENT + 3)]
    length = max(map(len, rows))
    ids, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    for options in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": SEGMENT + 2, "do_sample": False, "eos_token_id": None, **options}
        together = model.generate(ids, attention_mask=mask, **options)[:, length:]
        for i, row in enumerate(rows):
            assert torch.equal(together[i], model.generate(row[None], **options)[0, len(row) :])
            if not i:
                assert torch.equal(together[i], model.generate(row[None], use_cache=False, **options)[0, len(row) :])


# ---- long input ----


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_finite_for_long_input_with_large_weights(variant):
    """65,536 tokens through a layer with gates far from their start (test_every_model.py has the usual start)."""
    changes = {"num_attention_heads": 1, "head_dim": 16, "chunk_size": 64, "segment_length": 256, "sliding_window": 64}
    model = zoo.model(f"titans-{variant}", num_hidden_layers=1, memory_depth=1, **changes)
    hidden = model.model(tokens(65_536), use_cache=False).last_hidden_state
    assert torch.isfinite(hidden).all()
    assert hidden[:, -4096:].abs().amax() < 4 * hidden[:, :4096].abs().amax()


# ---- the layer alone ----


def test_the_layers_example_runs():
    module = importlib.import_module("memzoo.layers.neural_memory")
    result = doctest.testmod(module)
    assert result.attempted >= 7 and not result.failed


class SomebodyElses(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.norm, self.memory = nn.LayerNorm(32), NeuralMemory(32, 2, 16, chunk_size=4, expansion=2, **options)
        self.head = nn.Linear(32, 20)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.memory(self.norm(x)))


def test_alone_in_somebody_elses_model_it_learns_recall():
    """A pair seen once, its first half asked again: only a memory tells the second."""
    torch.manual_seed(0)
    model = SomebodyElses(persistent=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def batch(count):
        keys, values = torch.stack([torch.randperm(10)[:3] for _ in range(count)]), torch.randint(10, 20, (count, 3))
        which = torch.randint(3, (count, 1))
        return torch.cat((torch.stack((keys, values), 2).flatten(1), keys.gather(1, which)), 1), values.gather(1, which)[:, 0]

    for _ in range(150):
        ids, answer = batch(64)
        F.cross_entropy(model(ids)[:, -1], answer).backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, answer = batch(256)
    right = (model(ids)[:, -1].argmax(-1) == answer).double().mean()
    assert right > 0.7  # one of the three values seen: 0.33


def test_alone_it_saves_loads_and_goes_on():
    model = SomebodyElses(persistent=3).double()
    again = SomebodyElses(persistent=3).double()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    whole = model.memory(x)
    assert torch.equal(whole, again.memory(x))
    state, parts = LayerState(), []
    for start, stop in ((0, 1), (1, 6), (6, 13)):
        parts.append(model.memory(x[:, start:stop], state=state))
    assert_close(torch.cat(parts, 1), whole)
    half = SomebodyElses().bfloat16()
    assert half(torch.randint(20, (2, 9))).dtype == torch.bfloat16


# ---- watching ----


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"inner_loss": "dot"}, {"memory_depth": 1, "momentum": False, "decay": False}])
def test_watching_shows_the_loss_before_the_write_gates_and_norms(changes):
    model = titans("lmm", num_hidden_layers=1, **changes)
    ids = tokens(14)
    expected = model(ids).logits
    with watch(model) as memories:
        assert_close(model(ids).logits, expected)
    assert not any(memory.watching for memory in memories.values())
    assert list(memories) == ["model.layers.0.mixer"]
    observed = memories["model.layers.0.mixer"].observed
    layer, config = model.model.layers[0].mixer, model.config
    memory, norms = Memory(layer, config), []
    for t, i in enumerate(ids[0]):
        x = rms(model.model.embed_tokens.weight[i], model.model.layers[0].mixer_norm.weight)
        memory.write_and_read(x)
        assert_close(observed["surprise"][0, t], torch.stack(memory.loss), 1e-9)
        for name in ("momentum", "decay"):
            assert_close(observed[name][0, t], memory.gate(name, x) if getattr(config, name) else torch.zeros(2).double(), 1e-9)
        assert_close(observed["lr"][0, t], config.lr_max * memory.gate("lr", x), 1e-9)
        norms.append([sum(w.square().sum((1, 2)) for w in part).sqrt() for part in (memory.M, memory.S)])
    ends = [min(13, end) for end in range(config.chunk_size - 1, 14 + config.chunk_size - 1, config.chunk_size)]
    assert (observed["tokens"][0] - 1).tolist() == ends
    for part, name in enumerate(("weight_norm", "momentum_norm")):
        assert_close(observed[name][0], torch.stack([norms[end][part] for end in ends]), 1e-9, name)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_watching_shows_every_token_of_the_last_pass(variant):
    """Over segments and persistent vectors; a second pass takes the first one's place, and so does each step of decoding."""
    model, ids = titans(variant, num_persistent_tokens=3), tokens(3 * SEGMENT - 1, batch=2)
    with watch(model) as memories:
        model(ids)
        first = {name: memory.observed for name, memory in memories.items()}
        assert len(first) == 2
        assert {t.shape for seen in first.values() for name, t in seen.items() if name in ("surprise", "lr")} == {(2, 17, 2)}
        for seen in first.values():
            assert seen["tokens"][0, -1] == 17 and seen["weight_norm"].shape == (2, seen["tokens"].shape[1], 2)
        cache = model(ids[:, :SEGMENT], use_cache=True).past_key_values
        for t in range(SEGMENT, ids.shape[1]):
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            for name, memory in memories.items():
                assert_close(memory.observed["surprise"], first[name]["surprise"][:, t : t + 1], 1e-9)


def test_watching_needs_a_memory_and_one_text():
    with pytest.raises(ValueError, match="SDNCForCausalLM has no neural memory to watch"), watch(zoo.model("sdnc")):
        pass
    model = titans("mac")
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    with watch(model), pytest.raises(ValueError, match="watching needs a dense batch without padding or packing"):
        model(tokens(5, batch=2), attention_mask=mask)
    with watch(model) as memories:
        model(tokens(5))
    assert all(memory.observed is not None for memory in memories.values())


@pytest.mark.parametrize("field", ["lr_max", "momentum_start", "decay_start"])
def test_a_number_that_is_none_is_refused_by_its_name(field):
    from memzoo import preset

    with pytest.raises(TypeError, match=f"{field} is None, needs float"):
        preset("titans-lmm-tiny", **{field: None})
