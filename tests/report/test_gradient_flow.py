"""Gradients over time: vanishing for a plain RNN and not for attention, measured as autograd says, written and drawn."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import memzoo
from memzoo.report import read_results

SCRIPT = Path(__file__).parents[2] / "scripts" / "gradient_flow.py"
spec = importlib.util.spec_from_file_location("gradient_flow_script", SCRIPT)
flow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flow)


def ids(length, count=2):
    return torch.randint(3, 4096, (count, length + 1), generator=torch.Generator().manual_seed(0))


def test_it_vanishes_for_a_plain_rnn_and_not_for_attention():
    torch.manual_seed(0)
    norms = {
        name: flow.gradient_norms(model, ids(256)) for name, model in flow.anchors(memzoo.preset("linear-transformer-tiny")).items()
    }
    rnn, attention = (norms[name] / norms[name][0] for name in ("plain tanh RNN", "softmax attention"))
    assert rnn[200] < 1e-20 and attention[200] > 1e-4
    # Exponential against flat: the same factor is lost over every 20 tokens; attention loses none of it.
    losses = [(rnn[20 * i] / rnn[20 * i + 20]).log10() for i in range(1, 5)]
    assert min(losses) > 2 and max(losses) - min(losses) < 2
    assert attention[10:250].min() > attention[10:250].max() / 10


@pytest.mark.parametrize("name", [name for name in memzoo.presets() if name.endswith("-tiny")])
def test_every_architecture_can_be_measured(name):
    torch.manual_seed(0)
    norms = flow.gradient_norms(AutoModelForCausalLM.from_config(memzoo.preset(name)), ids(48))
    assert norms.shape == (48,) and torch.isfinite(norms).all() and norms[0] > 0
    assert norms[1:].max() > 0


def test_the_norm_is_that_of_a_small_change(tmp_path):
    """dL/dh_t by finite differences, in a random direction."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(memzoo.preset("linear-transformer-delta-tiny")).double().eval()
    sequence = ids(6, count=1)
    norms = flow.gradient_norms(model, sequence)
    hidden = model.get_input_embeddings()(sequence[:, :-1]).detach()

    def loss(h):
        return torch.nn.functional.cross_entropy(model(inputs_embeds=h, use_cache=False).logits[:, -1], sequence[:, -1])

    size, lag = hidden.shape[-1], 3
    slopes = []
    with torch.no_grad():
        for i in range(size):
            step = torch.zeros_like(hidden)
            step[0, 5 - lag, i] = 1e-6
            slopes.append((loss(hidden + step) - loss(hidden - step)) / 2e-6)
    assert norms[lag].item() == pytest.approx(torch.stack(slopes).norm().item(), rel=1e-5)


def test_lags_are_averaged_in_growing_steps():
    lags, means = flow.by_lag(torch.arange(100.0) + 1)
    assert lags[0] == 0 and means[0] == 1 and lags == sorted(set(lags)) and lags[-1] < 100
    assert means[1] == 2.0  # lag 1 alone
    assert means[-1] == pytest.approx(lags[-1] + 1, abs=1)


def test_written_drawn_and_read_by_the_report(tmp_path, capsys):
    checkpoint = tmp_path / "mine" / "final"
    AutoModelForCausalLM.from_config(memzoo.preset("linear-transformer-tiny")).save_pretrained(checkpoint)
    out = tmp_path / "results"
    assert flow.main([str(checkpoint), "sdnc-tiny", "--length", "32", "--sequences", "2", "--out", str(out)]) == 0
    assert (out / "gradient_flow.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "gradient_flow.json").read_text())
    assert [(c["name"], c["when"], c["anchor"]) for c in found["curves"]] == [
        ("plain tanh RNN", "initialisation", True),
        ("softmax attention", "initialisation", True),
        ("mine", "initialisation", False),
        ("mine", "trained", False),
        ("sdnc-tiny", "initialisation", False),
    ]
    assert found["length"] == 32 and "held-out prose" in found["measured"]
    assert len(read_results(out).gradient_flow[0]["curves"]) == 5
    before = (out / "gradient_flow.json").read_text()
    capsys.readouterr()
    assert flow.main(["sdnc-tiny", "no-such-model", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no-such-model is neither a checkpoint" in error and "preset" in error
    assert (out / "gradient_flow.json").read_text() == before


@pytest.mark.parametrize(
    "flags,expected", [(["--length", "2"], "at least 4 tokens"), (["--length", "x"], "not a number of tokens")]
)
def test_bad_settings_are_one_line(flags, expected, tmp_path, capsys):
    assert flow.main(["sdnc-tiny", *flags, "--out", str(tmp_path / "results")]) == 1
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and not (tmp_path / "results").exists()
