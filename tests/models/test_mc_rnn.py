"""Memory caching in models: identities with the memory alone, a cache that grows, is capped or lies on the host, caching after training."""

import logging

import pytest
import torch
import zoo
from checks import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import memzoo
from memzoo.layers.caching import CacheOptions
from memzoo.models.mc_rnn.configuration_mc_rnn import DEEP, MATRICES, VECTORS, MemoryCachingConfig

CACHED = [name for name in zoo.NAMES if name.startswith("mc-") and name != "mc-base"]
MEMORIES = (*MATRICES, *DEEP, *VECTORS)


def tokens(length, batch=2, seed=1):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def build(memory="linear", dtype=torch.float64, scale=6.0, **fields):
    defaults = {"memory": memory, "segment_length": 5, "chunk_size": 4, "memory_expansion": 2}
    return zoo.model("mc-linear", dtype, scale, **{**defaults, **fields})


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def shared_weights(model, other):
    """`other` with the weights of `model` that both have."""
    other.load_state_dict(model.state_dict(), strict=False)
    return other


@pytest.mark.parametrize("aggregation", ["residual", "gated", "soup", "sparse", "average"])
@pytest.mark.parametrize("memory", [memory for memory in MEMORIES if memory != "swla"])
def test_one_segment_is_the_memory_alone(memory, aggregation):
    """N = 1: nothing is cached, and the open memory has the whole gate."""
    ids = tokens(12)
    model = build(memory, aggregation=aggregation, segment_length=12)
    alone = shared_weights(model, build(memory, aggregation="none"))
    assert_close(logits(model, ids), logits(alone, ids), 1e-9)
    if memory == "linear" and aggregation in ("residual", "average"):
        return  # the sum of all segments' matrices is the one matrix again
    shorter = shared_weights(model, build(memory, aggregation=aggregation, segment_length=5))
    assert not torch.allclose(logits(shorter, ids), logits(alone, ids), atol=1e-6)


@pytest.mark.parametrize("memory", ["linear", "swla", "delta", "lstm", "gru", "gated_linear"])
def test_soup_is_gated_where_a_read_is_linear(memory):
    ids = tokens(17)
    gated = build(memory, aggregation="gated")
    assert_close(logits(gated, ids), logits(shared_weights(gated, build(memory, aggregation="soup")), ids), 1e-9)


@pytest.mark.parametrize("memory", ["dla", "titans"])
def test_soup_is_not_gated_for_an_mlp(memory):
    ids = tokens(17)
    gated = build(memory, aggregation="gated")
    other = logits(shared_weights(gated, build(memory, aggregation="soup")), ids)
    assert_close(other[:, :5], logits(gated, ids)[:, :5], 1e-9)  # the first segment has one memory
    assert not torch.allclose(other[:, 6:], logits(gated, ids)[:, 6:], atol=1e-6)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("aggregation", ["residual", "gated", "soup", "sparse", "average"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_with_every_aggregation(memory, aggregation, restart):
    """What tests/models/test_every_model.py asks of some configurations, of all of them in short: causal to the bit, batch-independent,
    repeatable, any split, padding, packing, equal to the definition with its gradients."""
    routing = {"gated": "energy", "sparse": "submax"}.get(aggregation, "mean")
    fields = {"aggregation": aggregation, "restart": restart, "routing": routing, "num_hidden_layers": 1, "segment_length": 4}
    model = build(memory, top_k=1 if aggregation == "sparse" else None, **fields)
    ids = tokens(15)
    whole = logits(model, ids)
    assert torch.equal(logits(model, ids), whole)
    changed = ids.clone()
    changed[0, 9:] = changed[0, 9:] % 60 + 1
    after = logits(model, changed)
    assert torch.equal(after[0, :9], whole[0, :9]) and not torch.equal(after[0, 9], whole[0, 9])
    assert_close(after[1], whole[1], 1e-12)
    with torch.no_grad():
        cache, parts = None, []
        for part in ids.split([3, 1, 1, 7, 1, 2], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert_close(torch.cat(parts, 1), whole, 1e-9)
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        assert_close(padded[0], whole[0], 1e-9)
        alone = logits(model, ids[1:, 6:])
        assert_close(padded[1, 6:], alone[0], 1e-9)
        packed = model(torch.cat((ids[:1], ids[1:, 6:]), 1), cu_seqlens=torch.tensor([0, 15, 24])).logits
        assert_close(packed[0], torch.cat((whole[0], alone[0])), 1e-9)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("aggregation", ["residual", "gated", "soup", "sparse", "average"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_gradients_of_every_memory_with_every_aggregation(memory, aggregation, restart, monkeypatch):
    fields = {"aggregation": aggregation, "restart": restart, "num_hidden_layers": 1, "segment_length": 4}
    model = build(memory, top_k=1 if aggregation == "sparse" else None, **fields)
    ids = tokens(11)
    grads = []
    for form in ("reference", "chunked"):
        monkeypatch.setenv("MEMZOO_KERNELS", form)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in grads[0].items():
        assert_close(grads[1][name], expected, 1e-8, name)


@pytest.mark.parametrize("memory", MEMORIES)
def test_sparse_with_enough_choices_is_gated(memory):
    ids = tokens(17)
    gated = build(memory, aggregation="gated")
    sparse = shared_weights(gated, build(memory, aggregation="sparse", top_k=3))
    assert_close(logits(sparse, ids), logits(gated, ids), 1e-9)
    fewer = shared_weights(gated, build(memory, aggregation="sparse", top_k=1))
    assert not torch.allclose(logits(fewer, ids), logits(gated, ids), atol=1e-6)


@pytest.mark.parametrize("restart", [True, False])
def test_residual_of_a_matrix_that_starts_anew_is_one_matrix(restart):
    """y = (M_t + sum_i M_i) q: the whole sequence's memory if segments start from nothing; with what went before counted again if not."""
    ids = tokens(17)
    model = build("linear", aggregation="residual", restart=restart)
    alone = shared_weights(model, build("linear", aggregation="none"))
    same = torch.allclose(logits(model, ids), logits(alone, ids), atol=1e-9)
    assert same == restart


@pytest.mark.parametrize("name", CACHED)
def test_the_state_grows_by_one_memory_a_segment(name):
    model = zoo.model(name)
    segment, limit = model.config.segment_length, model.config.max_cached_segments
    at = [model.state_bytes(n * segment) for n in range(7)]
    steps = [b - a for a, b in zip(at, at[1:])]
    linear = model.config.memory not in DEEP
    if model.config.aggregation == "average" or (model.config.aggregation == "residual" and linear):
        assert steps == [0] * 6
    else:
        assert steps[0] > 0 and steps == [steps[0] if limit is None or n < limit else 0 for n in range(6)]
    assert model.state_bytes(segment - 1) == at[0] and model.state_bytes(2 * segment - 1) == at[1]


def test_a_capped_cache_keeps_the_highest_scored():
    """With a cap of 1 and connectors that always point one way, the segment whose keys lie that way is never dropped."""
    model = build(
        "linear", dtype=torch.float32, scale=1.0, segment_length=4, max_cached_segments=1, num_hidden_layers=1, conv_width=0
    )
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        cache = model(tokens(4, 1), use_cache=True).past_key_values
        state = cache.layers[0].state
        first = state.get("cached_0").clone()
        # Whatever comes, its connector is a large multiple of the first segment's descriptor.
        mixer.router.u_proj.weight.zero_()
        direction = state.get("descriptors")[0, 0]
        mixer.router.forward = lambda x, q, k: (100 * direction.expand(*k.shape), k)
        for length in (1, 3, 8, 5):
            cache = model(tokens(length, 1, seed=length), past_key_values=cache, use_cache=True).past_key_values
        assert torch.equal(cache.layers[0].state.get("cached_0"), first)
        mixer.router.forward = lambda x, q, k: (-100 * direction.expand(*k.shape), k)
        cache = model(tokens(8, 1, seed=9), past_key_values=cache, use_cache=True).past_key_values
        assert not torch.equal(cache.layers[0].state.get("cached_0"), first)


def test_an_offloaded_cache_gives_the_same_and_moves_only_the_chosen(monkeypatch):
    from memzoo.kernels.memory_caching import chunked

    ids = tokens(31)
    kept = zoo.model("mc-titans-sparse", offload_cached=False)
    offloaded = shared_weights(kept, zoo.model("mc-titans-sparse"))
    moved = []
    pick = chunked.pick
    monkeypatch.setattr(chunked, "pick", lambda bank, slots: moved.append(slots.shape[-1]) or pick(bank, slots))
    with torch.no_grad():
        caches = [model(ids[:, :27], use_cache=True).past_key_values for model in (kept, offloaded)]
        assert all(part.device.type == "cpu" for name, part in caches[1].layers[0].state.fixed.items() if name.startswith("cached"))
        for t in range(27, 31):
            a, b = (m(ids[:, t : t + 1], past_key_values=c, use_cache=True).logits for m, c in zip((kept, offloaded), caches))
            assert_close(b, a, 1e-6)
    layers, weights = kept.config.num_hidden_layers, kept.config.memory_depth
    assert moved == [1] * (2 * 4 * layers * weights)  # one memory of five, every step


@pytest.mark.parametrize("name", ["mc-linear", "mc-titans-sparse", "mc-lstm", "mc-delta-capped"])
def test_generates_as_without_a_cache(name):
    model = zoo.model(name)
    ids = tokens(7)
    with_cache = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    without = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
    beams = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)
    assert torch.equal(beams, model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False))


def test_log_segments_need_no_state_and_refuse_one():
    model = build("linear", aggregation="gated", segmentation="log")
    ids = tokens(22)
    assert not model.config.use_cache
    before = logits(model, ids)
    changed = ids.clone()
    changed[:, 15:] = changed[:, 15:] % 60 + 1
    assert torch.equal(logits(model, changed)[:, :15], before[:, :15])
    # 22 = 16 + 4 + 2: the first 16 tokens have one memory, as if there were no cache.
    alone = shared_weights(model, build("linear", aggregation="none"))
    assert_close(before[:, :16], logits(alone, ids)[:, :16], 1e-9)
    assert not torch.allclose(before[:, 16:], logits(alone, ids)[:, 16:], atol=1e-6)
    for memory in ("linear", "titans", "lstm"):
        with pytest.raises(ValueError, match="segment_length 'log' knows no state between calls"):
            build(memory, segmentation="log")(ids, use_cache=True)
    assert build("linear", segmentation="log").generate(ids[:, :5], max_new_tokens=3).shape == (2, 8)


def test_sampling_is_not_cut_to_the_memories_that_a_token_reads(tmp_path):
    """transformers has a top_k of its own: tokens to sample from."""
    said, handler = [], logging.Handler()
    handler.emit = said.append
    logger = logging.getLogger("transformers.generation.configuration_utils")
    logger.addHandler(handler)
    model = zoo.model("mc-swla-sparse")
    logger.removeHandler(handler)
    assert not said
    assert model.config.top_k == 1 and model.generation_config.top_k is None
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.top_k == 1 and again.generation_config.top_k is None
    assert AutoConfig.from_pretrained(tmp_path).top_k == 1
    torch.manual_seed(0)
    drawn = again.generate(tokens(3), max_new_tokens=6, do_sample=True, temperature=5.0, num_return_sequences=4)
    assert len({tuple(row.tolist()) for row in drawn}) > 2


@pytest.mark.parametrize("routing", ["mean", "submax", "energy"])
def test_low_rank_descriptors_are_smaller(routing):
    whole = build("linear", aggregation="gated", routing=routing, hidden_size=64)
    low = build("linear", aggregation="gated", routing=routing, hidden_size=64, routing_dim=16)
    assert low.state_bytes(50) < whole.state_bytes(50)
    ids = tokens(13)
    with torch.no_grad():
        cache = low(ids, use_cache=True).past_key_values
    assert cache.layers[0].state.get("descriptors").shape[-1] == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": "matrix"}, "memory is 'matrix', needs one of linear"),
        ({"aggregation": "mean"}, "aggregation is 'mean', needs one of none, residual"),
        ({"routing": "max"}, "routing is 'max', needs one of mean, energy, submax"),
        ({"segmentation": "random"}, "segmentation is 'random', needs one of constant, log"),
        ({"segment_length": 0}, "segment_length is 0, needs at least 1"),
        ({"top_k": 2}, "top_k is 2, needs 1 to 16 with aggregation sparse, else None"),
        ({"aggregation": "sparse", "top_k": 40}, "top_k is 40, needs 1 to 16"),
        ({"aggregation": "residual", "routing": "energy"}, "routing is 'energy', needs mean with aggregation residual"),
        ({"aggregation": "average", "routing_dim": 16}, "routing_dim is 16, needs None"),
        ({"routing_dim": 20}, "routing_dim is 20, needs a multiple of 8"),
        ({"aggregation": "residual", "max_cached_segments": 3}, "max_cached_segments is 3, needs"),
        ({"max_cached_segments": 0}, "max_cached_segments is 0, needs at least 1"),
        ({"offload_cached": True}, "offload_cached is True, needs False but with aggregation sparse"),
        ({"segmentation": "log", "use_cache": True}, "use_cache is True, needs False"),
        ({"aggregation": "none", "restart": False}, "aggregation is 'none', needs a way to read"),
        ({"aggregation": "none", "memory": "swla"}, "aggregation is 'none', needs a cache with memory swla"),
        ({"lr_start": 0.0}, "lr_start is 0.0, needs a number between 0 and 1"),
    ],
)
def test_bad_configurations(fields, message):
    if fields.get("segmentation") == "log":
        config = MemoryCachingConfig(segmentation="log", use_cache=False)
        config.use_cache = True
        with pytest.raises(ValueError) as error:
            config.check()
    else:
        with pytest.raises(ValueError) as error:
            MemoryCachingConfig(**fields)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- caching without training ----

TRAINED = {
    "linear-transformer": "linear_attention",
    "linear-transformer-gated-delta": "delta_rule",
    "titans-lmm": "neural_memory",
    "titans-mag": "neural_memory",
    "titans-mal": "neural_memory",
    "mc-base": "linear_attention",
}


@pytest.mark.parametrize("aggregation", ["average", "residual", "gated", "sparse"])
@pytest.mark.parametrize("name", TRAINED)
def test_caching_after_training(name, aggregation):
    if name == "linear-transformer" and aggregation in ("gated", "sparse"):
        with pytest.raises(ValueError, match="needs l2-normalised queries and keys"):
            memzoo.enable_memory_caching(zoo.model(name), 5, aggregation)
        return
    model = zoo.model(name, torch.float64)
    ids = tokens(23)
    before = logits(model, ids)
    assert memzoo.enable_memory_caching(model, 23, aggregation) is model
    assert_close(logits(model, ids), before, 1e-9)  # one segment: nothing is cached
    memzoo.enable_memory_caching(model, 5, aggregation)
    cached = logits(model, ids)
    assert_close(cached[:, :5], before[:, :5], 1e-9)
    changed = ids.clone()
    changed[:, 13:] = changed[:, 13:] % 60 + 1
    assert torch.equal(logits(model, changed)[:, :13], cached[:, :13])
    with torch.no_grad():
        state = model(ids[:, :12], use_cache=True).past_key_values
        parts = [model(ids[:, t : t + 1], past_key_values=state, use_cache=True).logits for t in range(12, 23)]
    assert_close(torch.cat(parts, 1), cached[:, 12:], 1e-9)
    assert all("router" not in key for key in model.state_dict())
    memzoo.enable_memory_caching(model, None)
    assert torch.equal(logits(model, ids), before)


def test_the_mean_of_memories_is_what_is_read():
    """A delta memory, average: the logits of a layer that reads the mean of the two memories made by hand."""
    model = zoo.model("linear-transformer-delta", torch.float64, num_hidden_layers=1)
    mixer = model.model.layers[0].mixer
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    from memzoo.layers.neural_memory import dense_layout
    from memzoo.layers.state import LayerState

    memzoo.enable_memory_caching(model, 5)
    state = LayerState()
    with torch.no_grad():
        mixer(x, dense_layout(x), state)
    two = state.get("cached_0")[:, 0]  # the sum of both segments' memories
    assert (state.open, state.closed) == (0, 2)
    mixer.caching = CacheOptions(5, "average", restart=False)
    state = LayerState()
    with torch.no_grad():
        mixer(x, dense_layout(x), state)
    assert not torch.allclose(state.get("cached_0")[:, 0], two)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sdnc", (5,), "SDNCForCausalLM has no recurrent memory"),
        ("titans-mac", (5,), "reads its memory as context"),
        ("mc-linear", (5,), "was trained with it"),
        ("titans-lmm", (0,), "segment_length is 0, needs an integer of at least 1, or None"),
        ("titans-lmm", (True,), "segment_length is True"),
        ("titans-lmm", (5, "soup"), "aggregation is 'soup', needs one of average, residual, gated, sparse"),
    ],
)
def test_what_cannot_be_enabled(name, arguments, message):
    with pytest.raises(ValueError) as error:
        memzoo.enable_memory_caching(zoo.model(name), *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
