"""Settings: flags win over the file, and whatever does not fit is one line that helps."""

import dataclasses

import pytest

from memzoo.training import BadInput, Settings, parse_settings
from memzoo.training.optim import build_optimizer, learning_rate
from memzoo.training.settings import read_settings, write_settings

NEEDED = ["--model", "m", "--dataset", "d", "--output", "o"]


def test_flags_win_over_the_file_and_join_its_mappings(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndataset: d\noutput: o\nlearning_rate: 3e-3\nsteps: 7\nset: {hidden_size: 64, head_dim: 32}\n")
    settings = parse_settings(["--config", str(file), "--steps", "9", "--set", "hidden_size=128", "rate=1e-3", "--batch-size=3"])
    assert (settings.model, settings.steps, settings.learning_rate, settings.batch_size) == ("a", 9, 0.003, 3)
    assert settings.set == {"hidden_size": 128, "head_dim": 32, "rate": 0.001}


def test_resume_takes_a_step_or_none():
    assert parse_settings([*NEEDED, "--resume"]).resume == "latest"
    assert parse_settings([*NEEDED, "--resume", "20"]).resume == "20"
    assert parse_settings(NEEDED).resume == ""


def test_settings_are_read_back(tmp_path):
    settings = parse_settings([*NEEDED, "--set", "a=1", "b=x", "--no-compile", "--clip", "0"])
    write_settings(settings, tmp_path / "settings.yaml")
    assert read_settings(tmp_path / "settings.yaml") == settings


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lerning_rate", "1"], "no setting --lerning_rate; close: learning_rate"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "0"], "--steps is 0, needs at least 1"),
        (["--eval_fraction", "1"], "--eval_fraction is 1.0, needs"),
        (["--packing", "loose"], "argument --packing: invalid choice: 'loose'"),
        (["--set", "hidden_size"], "--set hidden_size: needs key=value"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--length", "1"], "--length is 1, needs at least 2"),
    ],
)
def test_flags_that_do_not_fit(flags, says):
    with pytest.raises(BadInput) as error:
        parse_settings([*NEEDED, *flags])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("learning_rat: 1", "there is no setting 'learning_rat'; close: learning_rate"),
        ("steps: soon", "steps is 'soon', needs int"),
        ("learning_rate: fast", "learning_rate is 'fast', needs a number"),
        ("compile: 3", "compile is 3, needs bool"),
        ("- a", "needs a mapping of settings, has a list"),
        ("a: [", "run.yaml: "),
        ("packing: loose", "packing is 'loose', needs one of concat, apart"),
    ],
)
def test_files_that_do_not_fit(yaml, says, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml)
    with pytest.raises(BadInput) as error:
        parse_settings([*NEEDED, "--config", str(file)])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(BadInput, match="--model is missing"):
        parse_settings(["--dataset", "d", "--output", "o"])
    with pytest.raises(BadInput, match="there is no such file"):
        parse_settings([*NEEDED, "--config", str(tmp_path / "none.yaml")])


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(Settings))


def test_decay_is_for_matrices_only():
    from torch import nn

    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4))
    groups = build_optimizer(model, Settings(weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], sorted(p.ndim for p in g["params"])) for g in groups] == [(0.3, [2, 2]), (0.0, [1, 1, 1])]


def test_the_rate_warms_up_and_falls_as_a_cosine():
    settings = Settings(learning_rate=1.0, warmup=10, steps=110, final_learning_rate=0.1)
    assert [learning_rate(settings, step) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert learning_rate(settings, 60) == pytest.approx(0.55)
    assert learning_rate(settings, 110) == pytest.approx(0.1)
