"""Every architecture as a transformers model: Auto classes, saving, generation, training features, other libraries."""

import os
import subprocess
import sys

import pytest
import torch
import zoo
from checks import assert_close

import memzoo
from memzoo.models.cache import MemoryCache
from memzoo.models.mc_rnn.configuration_mc_rnn import VECTORS

every_model = pytest.mark.parametrize("name", zoo.NAMES)


def prompt(batch=1, length=6, seed=3):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, count):
    """Greedy continuation by running everything again for every token."""
    for _ in range(count):
        with torch.no_grad():
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, following), dim=1)
    return ids


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@every_model
def test_generate_greedy_equals_full_recomputation(name):
    model = zoo.model(name)
    ids = prompt(2)
    expected = greedy(model, ids, 6)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **GREEDY), expected)


@every_model
def test_generate_left_padded_batch_equals_each_alone(name):
    model = zoo.model(name)
    rows = [prompt(1, n, seed=n)[0] for n in (2, 6, 4)]
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 6 - len(row) :], mask[i, 6 - len(row) :] = row, 1
    expected = [greedy(model, row[None], 6)[0, -6:] for row in rows]
    for options in ({}, {"prefill_chunk_size": 2}):
        out = model.generate(ids, attention_mask=mask, **GREEDY, **options)
        assert torch.equal(out[:, -6:], torch.stack(expected))


@every_model
def test_generate_beams_samples_and_several_sequences(name):
    model = zoo.model(name, scale=3.0)
    ids = prompt(2)
    beams = {**GREEDY, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    out = model.generate(ids, **{**beams, "num_return_sequences": 2})
    assert out.shape == (4, 12)
    sampling = {**GREEDY, "do_sample": True, "num_return_sequences": 3, "top_k": 20}
    torch.manual_seed(5)
    sampled = model.generate(ids, **sampling)
    torch.manual_seed(5)
    assert torch.equal(sampled, model.generate(ids, use_cache=False, **sampling))
    assert sampled.shape == (6, 12)
    assert len({tuple(row.tolist()) for row in sampled}) > 2


@every_model
def test_generate_continues_a_cache_and_takes_embeddings(name):
    model = zoo.model(name)
    ids = prompt(1, 5)
    cache = MemoryCache(model.config)
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    more = torch.cat((first, prompt(1, 2, seed=9)), dim=1)
    assert torch.equal(model.generate(more, past_key_values=cache, **GREEDY), greedy(model, more, 6))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), greedy(model, ids, 6)[:, 5:])


@every_model
def test_assisted_decoding_is_refused(name):
    with pytest.raises(ValueError):
        zoo.model(name).generate(prompt(), prompt_lookup_num_tokens=2, **GREEDY)


def test_foreign_caches_are_refused():
    with pytest.raises(ValueError, match="cache_implementation is 'static'; memories bring their own cache"):
        zoo.model("sdnc").generate(prompt(), cache_implementation="static", **GREEDY)


@every_model
def test_save_and_load_both_ways(name, tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    model = zoo.model(name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    expected = model(prompt()).logits
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is type(model)
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert_close(loaded(prompt()).logits, expected, 1e-5)  # a product's last bits depend on where its operands lie in memory
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is type(model.model)
    assert_close(base(prompt()).last_hidden_state, model.model(prompt()).last_hidden_state, 1e-5)
    # A loaded model saves again as itself, with the shim and no copied code.
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").glob("*.py")) == ["modeling_memzoo.py"]


REMOTE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, expected = sys.argv[1], torch.load(sys.argv[2])
assert "memzoo" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.model_type == model.config.model_type
assert model.generate(expected["ids"], max_new_tokens=2, do_sample=False).shape[1] == expected["ids"].shape[1] + 2
model.save_pretrained(folder + "/again")
"""


@pytest.mark.parametrize("name", ["sdnc-extended", "linear-transformer-gated-delta"])
def test_loads_as_remote_code_without_importing_memzoo(name, tmp_path):
    model = zoo.model(name)
    model.save_pretrained(tmp_path)
    ids = prompt()
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path), str(tmp_path / "expected.pt")],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / "again").glob("*.py")) == ["modeling_memzoo.py"]


ORDERS = {
    "memzoo first": "import memzoo; import transformers",
    "transformers first": "import transformers; from transformers import AutoModelForCausalLM; import memzoo",
    "configurations loaded between": "import transformers; from transformers import AutoConfig; import memzoo",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_every_architecture_without_loading_it(order):
    code = f"""
{ORDERS[order]}
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from memzoo.models.registry import ARCHITECTURES
for a in ARCHITECTURES:
    config = AutoConfig.for_model(a.model_type)
    assert type(config) in AutoModel._model_mapping and type(config) in AutoModelForCausalLM._model_mapping
assert not [m for m in sys.modules if m.startswith("memzoo") and "modeling" in m], "a modelling file was loaded"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@every_model
def test_gradient_checkpointing_changes_no_gradient(name):
    model = zoo.model(name, torch.float64).train()
    ids = prompt(2, 9)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {key: value.grad.clone() for key, value in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for key, value in gradients().items():
        assert_close(value, expected[key], 1e-9, key)


@every_model
def test_tied_and_untied_embeddings(name, tmp_path):
    for tied in (True, False):
        model = zoo.model(name, tie_word_embeddings=tied)
        assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
        model.save_pretrained(tmp_path / str(tied))
        loaded = type(model).from_pretrained(tmp_path / str(tied))
        assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@every_model
def test_logits_to_keep_and_hidden_states(name):
    model = zoo.model(name)
    ids = prompt(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_hidden_states=True)
        assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=2).logits, output.logits[:, -2:])
        chosen = torch.tensor([3, 5])
        assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=chosen).logits, output.logits[:, chosen])
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(h.shape == (2, 7, 32) for h in output.hidden_states)
    assert not output.hidden_states[1][0, :3].any()
    logits, *_ = model(ids, return_dict=False)
    assert logits.shape == (2, 7, 61)


@every_model
def test_loss_counts_the_items_of_an_accumulated_batch(name):
    model = zoo.model(name)
    ids = prompt(2, 7)
    labels = ids.clone()
    labels[0, :4] = -100
    mean = model(ids, labels=labels).loss
    items = int((labels[:, 1:] != -100).sum())
    assert_close(model(ids, labels=labels, num_items_in_batch=2 * items).loss, mean / 2)


@every_model
def test_bfloat16_runs_and_keeps_its_type(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = zoo.model(name, scale=1.0)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = half(prompt(2, 9), labels=prompt(2, 9))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert_close(output.logits.float(), model(prompt(2, 9)).logits, 0.05)
    assert torch.equal(half.generate(prompt(), **GREEDY).shape and torch.ones(1), torch.ones(1))


@every_model
def test_resize_token_embeddings(name):
    model = zoo.model(name)
    before = model(prompt()).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    after = model(prompt(), labels=prompt())
    assert after.logits.shape[-1] == 70 and torch.isfinite(after.loss)
    assert_close(after.logits[..., :61], before)


@every_model
def test_lora_trains_on_the_linear_layers(name):
    peft = pytest.importorskip("peft", reason="the dev extra installs peft")
    model = peft.get_peft_model(zoo.model(name), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in model.named_parameters() if "lora_A" in n}
    vector = getattr(model.config, "memory", None) in VECTORS
    memory = {"gates_proj", "o_proj"} if vector else {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert memory | {"gate_proj", "up_proj", "down_proj"} <= adapted
    ids = prompt(2, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_model
def test_torch_compile_in_one_graph(name):
    model = zoo.model(name, scale=3.0)
    ids = prompt(2, 12)
    torch.compiler.reset()  # every architecture shares the stack's code, and one code object is compiled a few times at most
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, 1e-4)


@every_model
def test_bad_input_is_one_clear_line(name):
    from transformers import DynamicCache

    model = zoo.model(name)
    cases = [
        (ValueError, "exactly one of input_ids and inputs_embeds", {}),
        (ValueError, "at least one token", {"input_ids": torch.zeros(2, 0, dtype=torch.long)}),
        (TypeError, "needs a memzoo.models.cache.MemoryCache", {"input_ids": prompt(), "past_key_values": DynamicCache()}),
        (ValueError, "attention_mask has shape [1, 9]", {"input_ids": prompt(), "attention_mask": torch.ones(1, 9)}),
        (ValueError, "leaves no token", {"input_ids": prompt(), "attention_mask": torch.zeros(1, 6)}),
        (ValueError, "needs a batch of 1, got 2", {"input_ids": prompt(2), "cu_seqlens": torch.tensor([0, 6])}),
        (ValueError, "cannot extend a cache", {
            "input_ids": prompt(), "cu_seqlens": torch.tensor([0, 6]), "past_key_values": MemoryCache(model.config),
        }),
    ]  # fmt: skip
    for kind, message, arguments in cases:
        with pytest.raises(kind) as error:
            model(**arguments)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", memzoo.presets())
def test_presets_have_the_size_of_their_name(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(memzoo.preset(name))
    size = name.rsplit("-", 1)[1]
    if size != "tiny":
        expected = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
        assert 0.8 * expected < model.num_parameters() < 1.25 * expected
    else:
        assert model.num_parameters() < 1e6


def test_a_wrong_preset_lists_close_ones():
    with pytest.raises(ValueError, match="no preset 'sdnc-340'; did you mean sdnc-340m"):
        memzoo.preset("sdnc-340")
    with pytest.raises(ValueError, match="no field 'sliding_windw'; did you mean sliding_window"):
        memzoo.preset("sdnc-tiny", sliding_windw=3)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        ("sdnc-tiny", {"num_attention_heads": 7}, "num_attention_heads is 7, needs a divisor of hidden_size 64"),
        ("sdnc-tiny", {"head_dim": 12}, "head_dim is 12, needs a multiple of 8 from 16 to 256"),
        ("sdnc-tiny", {"hidden_size": "64"}, "hidden_size is '64', needs int"),
        ("sdnc-tiny", {"sliding_window": 0}, "sliding_window is 0, needs at least 1"),
        ("sdnc-tiny", {"num_key_value_heads": 3}, "num_key_value_heads is 3, needs a divisor"),
        ("sdnc-tiny", {"position_embedding": "alibi"}, "position_embedding is 'alibi', needs one of rotary, none"),
        ("linear-transformer-tiny", {"write_rule": "hebb"}, "write_rule is 'hebb', needs one of"),
        ("linear-transformer-tiny", {"feature_map": "identity"}, "feature_map is 'identity', needs elu or relu"),
        ("linear-transformer-tiny", {"write_rule": "delta", "normalize": True}, "normalize is True, needs False"),
        ("linear-transformer-tiny", {"num_hidden_layers": 0}, "num_hidden_layers is 0, needs at least 1"),
    ],
)
def test_a_config_that_cannot_work_is_refused_when_built(base, change, message):
    with pytest.raises((ValueError, TypeError)) as error:
        memzoo.preset(base, **change)
    assert message in str(error.value) and "\n" not in str(error.value)
