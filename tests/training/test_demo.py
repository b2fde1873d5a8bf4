"""The demo: its settings are whole, a failed training is shown, and the table says what was scored."""

import importlib.util
import sys

import pytest
from conftest import SCRIPT
from rich.console import Console

import memzoo
from memzoo.training import parse_settings

spec = importlib.util.spec_from_file_location("demo_script", SCRIPT.with_name("demo.py"))
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


@pytest.mark.parametrize("path", sorted(demo.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_are_whole(path):
    settings = parse_settings(["--config", str(path), "--output", "runs/x"])
    assert settings.dataset == "needles" and settings.model in memzoo.presets()
    memzoo.preset(settings.model, **settings.set)


def test_which_architectures():
    known = sorted(path.stem for path in demo.CONFIGS.glob("*.yaml"))
    assert demo.parse([]).names == list(demo.DEMO) and set(demo.DEMO) <= set(known)
    assert demo.parse(["--all"]).names == known and demo.parse(["--only", known[0]]).names == [known[0]]
    for flags in (["--only", "nonesuch"], ["--samples", "0"], ["--all", "--only", known[0]]):
        with pytest.raises(SystemExit) as stop:
            demo.parse(flags)
        assert stop.value.code == 2


def test_a_failed_training_is_shown(tmp_path, monkeypatch):
    training = demo.Training("nonesuch", tmp_path / "runs" / "nonesuch", threads=1)
    monkeypatch.setattr(sys, "executable", "false")  # a program that fails at once
    training.start()
    training.process.wait()
    training.printed.write_text("error: no such model\n")
    with pytest.raises(RuntimeError, match=r"training nonesuch failed .*\n(.*\n)*error: no such model"):
        training.finished()


def test_the_table_has_every_length():
    rows = [{"length": n, "accuracy": a} for n, a in ((128, 1.0), (256, 0.5))]
    common = {"parameters": 1234, "training_length": 128, "training_seconds": 1.0, "seconds": 2.0, "lengths": rows}
    grows, constant = {"128": 1280, "256": 2560}, {"128": 512, "256": 512}
    results = [{**common, "name": "a", "state_bytes": grows}, {**common, "name": "b", "state_bytes": constant}]
    console = Console(width=120, record=True, quiet=False)
    console.print(demo.table(results))
    shown = console.export_text()
    assert all(part in shown for part in ("128", "256", "1.00", "0.50", "10 a token", "512", "1,234"))
    assert demo.at_training_length(results[0]) == 1.0
