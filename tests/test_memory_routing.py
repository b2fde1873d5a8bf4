"""scripts/memory_routing.py: accuracy counts what it says, runs are kept and not repeated, bad arguments are one line and lose nothing."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).parents[1] / "scripts" / "memory_routing.py"
spec = importlib.util.spec_from_file_location("memory_routing_script", SCRIPT)
routing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(routing)

SIZES = {"vocab_size": 64, "hidden_size": 32, "layers": 1, "heads": 2, "segments": 4}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the script on tiny sizes; the folder it writes to."""
    monkeypatch.setattr(routing, "MEASURE", 8)
    monkeypatch.setattr(routing, "FINAL", 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # the other tests' business

    def run(*arguments, only=("base", "gated-energy")):
        small = [word for name in SIZES for word in (f"--{name.replace('_', '-')}", str(SIZES[name]))]
        return routing.main([*small, "--pairs", "4", "--steps", "3", "--every", "2", "--tokens", "64", "--only", *only,
                             "--out", str(tmp_path), *arguments])  # fmt: skip

    return run


class Knows(nn.Module):
    """Answers every query but those of the first `forgets` keys, from the pairs themselves."""

    def __init__(self, pairs: int, forgets: int = 0):
        super().__init__()
        self.pairs, self.forgets, self.config = pairs, forgets, SimpleNamespace(vocab_size=64)

    def forward(self, ids, use_cache):
        keys, values = ids[:, 0 : 2 * self.pairs : 2], ids[:, 1 : 2 * self.pairs : 2]
        values = torch.where(torch.arange(self.pairs) < self.forgets, 0, values)
        same = ids[:, :, None] == keys[:, None]
        answer = (same * values[:, None]).sum(-1)
        return SimpleNamespace(logits=nn.functional.one_hot(answer, 64).float())


def test_accuracy_is_the_share_of_queries_answered():
    assert routing.accuracy(Knows(8), 64, 8, 40, seed=0) == 1.0
    assert routing.accuracy(Knows(8, forgets=2), 64, 8, 40, seed=0) == 0.75


def test_only_the_mixer_differs():
    options = Namespace(**SIZES | {"hidden_size": 64})
    models = {mixer: routing.build(mixer, 64, options) for mixer in routing.MIXERS}
    states = {mixer: model.state_bytes(64) for mixer, model in models.items()}
    stacks = {tuple(p.shape for name, p in model.named_parameters() if "mixer." not in name) for model in models.values()}
    assert len(stacks) == 1
    # One memory; it and four more with a vector each; with 16 x 16 numbers each; with 32 x 32.
    assert states["base"] < states["gated-mean"] < states["gated-energy-low-rank"] < states["gated-energy"]
    assert all(states[f"gated-{rule}"] == states[f"sparse-{rule}"] for rule in routing.ROUTINGS)
    # Attention's rows grow with the length, the memory does not.
    assert models["attention"].state_bytes(256) - states["attention"] == 192 * 2 * 64 * 4
    assert models["base"].state_bytes(256) == states["base"]


def test_a_model_learns_and_the_run_stops_there(monkeypatch):
    monkeypatch.setattr(routing, "FINAL", 64)
    options = Namespace(**SIZES | {"hidden_size": 64}, steps=400, every=20, tokens=1024, learning_rate=1e-2)
    run = routing.learn("gated-energy", 4, 0, options)
    assert run["curve"][-1][1] >= routing.ENOUGH and run["steps"] < 400
    assert run["accuracy"] >= 0.98
    assert [other[:2] for other in run["other"]] == [[32, 4], [64, 4], [32, 8]]


def test_runs_are_written_drawn_and_not_repeated(command, tmp_path, capsys):
    assert command("--seeds", "1") == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert [(run["mixer"], run["seed"]) for run in first["runs"]] == [("base", 0), ("gated-energy", 0)]
    assert [step for step, _ in first["runs"][0]["curve"]] == [2, 3]
    assert (tmp_path / "memory_routing.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert command("--seeds", "2", only=("base",)) == 0
    out = capsys.readouterr().out
    assert "seed 1  base" in out and "seed 0  base" not in out  # progress of the new run alone
    assert "| 4 | base | 2 |" in out and "| 4 | gated-energy | 1 |" in out
    second = json.loads((tmp_path / "results.json").read_text())
    assert second["runs"][:2] == first["runs"] and len(second["runs"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory_routing.png", "results.json"]


def test_what_was_done_survives_a_stop(command, tmp_path, monkeypatch):
    learn = routing.learn

    def stopped(mixer, *rest):
        if mixer == "gated-energy":
            raise KeyboardInterrupt
        return learn(mixer, *rest)

    monkeypatch.setattr(routing, "learn", stopped)
    with pytest.raises(KeyboardInterrupt):
        command("--seeds", "1")
    assert [run["mixer"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == ["base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "base", "gated-median"], "--only has gated-median, needs some of base, gated-mean"),
        (["--pairs", "4", "40"], "pairs is 40, needs 1 to 31 with a vocabulary of 64"),
        (["--pairs", "0"], "pairs is 0, needs"),
        (["--steps", "0"], "--steps is 0, needs at least 1"),
        (["--segments", "32"], "segment_length is 0, needs at least 1"),
        (["--heads", "4"], "head_dim is 8, needs a multiple of 8 from 16"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_runs(command, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        command(*arguments)
    assert error.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("not JSON", "is not a file of this script"),
        ("[]", "is not a file of this script"),
        ('{"settings": {}, "runs": []}', "other settings (vocab_size None there, 64 asked"),
    ],
)
def test_a_file_that_is_something_else_is_left_alone(command, tmp_path, capsys, held, message):
    (tmp_path / "results.json").write_text(held)
    with pytest.raises(SystemExit):
        command()
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "results.json").read_text() == held
