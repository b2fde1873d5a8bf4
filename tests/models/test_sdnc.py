"""The sDNC: it is a Llama when its extensions are off, each extension does what the DNC's equations say, and links follow."""

import pytest
import torch
import zoo
from checks import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from memzoo.convert import from_llama


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, **changes,
        }
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ],
)  # fmt: skip
def test_a_llamas_weights_give_the_same_logits_and_tokens(changes, tmp_path):
    theirs = llama(**changes)
    ours = from_llama(theirs)
    ids = torch.randint(1, 61, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        a, b = theirs(ids).logits, ours(ids).logits
        assert (a - b).abs().max() < 1e-5
        real = mask.bool()
        a, b = theirs(ids, attention_mask=mask).logits[real], ours(ids, attention_mask=mask).logits[real]
        assert (a - b).abs().max() < 1e-5
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for extra in ({}, {"num_beams": 3}):
        assert torch.equal(
            theirs.generate(ids, attention_mask=mask, **options, **extra),
            ours.generate(ids, attention_mask=mask, **options, **extra),
        )
    theirs.save_pretrained(tmp_path)
    again = from_llama(str(tmp_path))
    assert torch.equal(again(ids).logits, ours(ids).logits)


def test_gradients_equal_the_llamas():
    theirs = llama()
    ours = from_llama(theirs)
    ids = torch.randint(1, 61, (2, 30))
    theirs(ids, labels=ids).loss.backward()
    ours(ids, labels=ids).loss.backward()
    assert_close(ours.model.layers[0].mixer.k_proj.weight.grad, theirs.model.layers[0].self_attn.k_proj.weight.grad, 1e-4)
    assert_close(ours.model.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad, 1e-4)


def test_only_a_llama_can_be_converted():
    with pytest.raises(TypeError, match="needs a LlamaForCausalLM"):
        from_llama(zoo.model("linear-transformer"))


def read_by_the_equations(memory, x):
    """One sequence through an ExternalMemory by the DNC's equations, slot by slot: memory rows, link matrix, weightings."""
    length = x.shape[0]
    heads, width = memory.num_heads, memory.head_dim
    group = heads // memory.num_key_value_heads
    k = memory.k_proj(x).view(length, -1, width)
    v = memory.v_proj(x).view(length, -1, width)
    q = memory.q_proj(x).view(length, heads, width)
    if memory.cosine_addressing:
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    scale = width**0.5 if memory.cosine_addressing else width**-0.5
    out = []
    for t in range(length):
        reads = []
        for h in range(heads):
            first = 0 if memory.window is None else max(0, t - memory.window + 1)
            slots = range(first, t + 1)
            keys, values = k[:, h // group], v[:, h // group]
            strength = 1 if memory.strength_proj is None else 1 + torch.log1p(memory.strength_proj(x[t])[h].exp())
            retention = torch.zeros(length, dtype=x.dtype)
            if memory.free_gate_proj is not None:
                kept = memory.free_gate_proj(x).sigmoid()[:, h]
                for i in slots:
                    retention[i] = kept[i + 1 : t + 1].prod().log()

            def weighting(key, keys=keys, slots=slots, strength=strength, retention=retention):
                scores = torch.stack([scale * strength * (key @ keys[i]) + retention[i] for i in slots])
                return scores.softmax(0)

            key = q[t, h]
            for _ in range(memory.read_steps - 1):
                key = sum(w * keys[i] for w, i in zip(weighting(key), slots))
            content = torch.zeros(length, dtype=x.dtype)
            content[list(slots)] = weighting(key)
            read = content @ values
            if memory.read_mode_proj is not None:
                # L[i, j] = 1 if slot i was written right after slot j, of the slots written up to now.
                link = torch.zeros(length, length, dtype=x.dtype)
                for i in range(1, t + 1):
                    link[i, i - 1] = 1
                backward, forward = link.T @ content, link @ content
                pi = memory.read_mode_proj(x[t]).view(heads, 3)[h].softmax(0)
                read = (pi[0] * backward + pi[1] * content + pi[2] * forward) @ values
            reads.append(read)
        out.append(memory.o_proj(torch.cat(reads)))
    return torch.stack(out)


@pytest.mark.parametrize("name", [n for n in zoo.NAMES if n.startswith("sdnc")])
def test_every_extension_follows_the_dncs_equations(name):
    model = zoo.model(name, torch.float64, position_embedding="none")
    memory = model.model.layers[0].mixer
    x = torch.randn(13, 32, dtype=torch.float64)
    from memzoo.layers.layout import TokenLayout

    with torch.no_grad():
        actual = memory(x[None], TokenLayout(torch.arange(13)[None]))[0]
        assert_close(actual, read_by_the_equations(memory, x), 1e-10)


def test_a_window_forgets_what_left_it():
    model = zoo.model("sdnc-window", torch.float64, num_hidden_layers=1)
    ids = torch.randint(1, 61, (1, 12))
    changed = ids.clone()
    changed[0, 2] = changed[0, 2] % 60 + 1
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert (difference[2:7] > 0).all()
    assert (difference[:2] == 0).all() and (difference[7:] == 0).all()


def test_a_windows_cache_stays_bounded():
    model = zoo.model("sdnc-link-window")
    ids = torch.randint(1, 61, (1, 40))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        full = cache.state_bytes()
        for t in range(5):
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
    assert cache.state_bytes() == full == model.state_bytes(40) == model.state_bytes(10**6)


def with_reader(**changes):
    return zoo.model("sdnc-link", torch.float64, add_cross_attention=True, **changes)


def test_a_read_from_memory_is_attention_over_the_encoders_rows():
    model = with_reader()
    reader = model.model.layers[0].reader
    x, encoded = torch.randn(5, 32, dtype=torch.float64), torch.randn(7, 32, dtype=torch.float64)
    from memzoo.layers.layout import TokenLayout

    with torch.no_grad():
        actual = reader(x[None], TokenLayout(torch.arange(5)[None], encoded=(encoded[None], None)))[0]
        q, k, v = reader.q_proj(x), reader.k_proj(encoded), reader.v_proj(encoded)
        heads = []
        for h in range(2):
            part = slice(16 * h, 16 * (h + 1))
            heads.append((q[:, part] @ k[:, part].T / 4).softmax(-1) @ v[:, part])
        assert_close(actual, reader.o_proj(torch.cat(heads, -1)))


def test_a_read_from_memory_ignores_pads_on_both_sides_and_decodes():
    model = with_reader()
    rows = [torch.randint(1, 61, (n,)) for n in (4, 9)]
    encoded = [torch.randn(n, 32, dtype=torch.float64) for n in (6, 2)]
    padded, padded_mask = torch.zeros(2, 6, 32, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.long)
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for i in range(2):
        padded[i, : len(encoded[i])], padded_mask[i, : len(encoded[i])] = encoded[i], 1
        ids[i, 9 - len(rows[i]) :], mask[i, 9 - len(rows[i]) :] = rows[i], 1
    given = {"encoder_hidden_states": padded, "encoder_attention_mask": padded_mask}
    with torch.no_grad():
        together = model(ids, attention_mask=mask, **given).logits
        for i in range(2):
            alone = model(rows[i][None], encoder_hidden_states=encoded[i][None]).logits[0]
            assert_close(together[i, mask[i].bool()], alone, 1e-9)
        cache = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True, **given).past_key_values
        assert_close(model(ids[:, 7:], attention_mask=mask, past_key_values=cache).logits, together[:, 7:], 1e-9)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    assert torch.equal(model.generate(ids, **given, **options), model.generate(ids, use_cache=False, **given, **options))


def test_a_read_from_memory_needs_an_encoder_and_an_encoder_a_memory():
    with pytest.raises(ValueError, match="pass encoder_hidden_states"):
        with_reader()(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        zoo.model("sdnc")(torch.ones(1, 3, dtype=torch.long), encoder_hidden_states=torch.zeros(1, 2, 32))
    model = with_reader()
    model.gradient_checkpointing_enable()
    encoded = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(1, 61, (1, 6))
    model.train()(ids, labels=ids, encoder_hidden_states=encoded).loss.backward()
    assert encoded.grad.any()
