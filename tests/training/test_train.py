"""scripts/train.py run in this process: what it leaves behind, the losses it keeps to, and what it refuses."""

import json
import shutil

import pytest
import torch
from conftest import SHORT, TINY, log, losses, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from memzoo.training import checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """A finished run of 6 steps with checkpoints at 2, 4 and 6."""
    from conftest import script

    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = [*TINY, "--dataset", text, *SHORT, "--output", str(folder), "--save_every", "2", "--eval_every", "3", "--keep", "3"]
    assert script.main([*flags, "--tracker", "tensorboard"]) == 0
    return folder, flags


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run before its end, as a kill after its last checkpoint leaves it."""
    folder, flags = finished
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run", [str(tmp_path / "run") if flag == str(folder) else flag for flag in flags]


def test_the_final_folder_loads_and_is_what_was_scored(finished, text):
    folder, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert model.config.hidden_size == 32 and model.config.training_length == 32
    assert tokenizer("the cat").input_ids
    card = (folder / "final" / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "linear_transformer",
        f"{model.num_parameters():,}",
        text,
        "eval_loss",
        "from_pretrained",
    ):
        assert part in card
    assert list((folder / "tracker").rglob("events.*"))
    rows = log(folder)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6] and [r["step"] for r in rows if "eval_loss" in r] == [3, 6]
    assert rows[-2]["tokens"] == 6 * 4 * 32 and rows[-2]["loss"] < rows[0]["loss"]
    assert not list(folder.rglob("*.tmp"))


def test_resumed_losses_are_those_of_one_go(train, text, llama, tmp_path):
    flags = ["--model", llama, "--dataset", text, *SHORT, "--steps", 20, "--log_every", 3, "--eval_every", 5, "--output"]
    assert train(*flags, tmp_path / "whole")[0] == 0
    assert train(*flags, tmp_path / "parts", "--stop_after", 10)[0] == 0
    assert not (tmp_path / "parts" / "final").exists()
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:  # what a run that went further before its kill leaves
        file.write('{"step": 12, "loss": 1.0}\n{"step": 15, "lo')
    code, out, _ = train(*flags, tmp_path / "parts", "--resume")
    assert code == 0 and "going on after step 10" in out
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "whole")) == 7 + 4
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_accumulation_counts_tokens_not_batches(train, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": sentences(1 + i % 5, i)}) + "\n" for i in range(150)))
    flags = [*TINY, "--dataset", tmp_path / "rows.jsonl", *SHORT, "--packing", "apart", "--output"]
    assert train(*flags, tmp_path / "one", "--batch_size", 8)[0] == 0
    assert train(*flags, tmp_path / "four", "--batch_size", 2, "--gradient_accumulation", 4)[0] == 0
    one, four = ([row["loss"] for row in log(tmp_path / name) if "loss" in row] for name in ("one", "four"))
    assert one == pytest.approx(four, abs=2e-5)


def test_needles_are_learned_from_their_answers(train, tmp_path):
    needles = [
        "--dataset",
        "needles",
        "--needles",
        "value_digits=1",
        "key_words=1",
        "needles=2",
        "--length",
        160,
        "--text_loss",
        0.1,
    ]
    code, out, err = train(*TINY, *SHORT, *needles, "--batch_size", 2, "--eval_examples", 4, "--output", tmp_path / "run")
    assert (code, err) == (0, "") and "eval_accuracy" in log(tmp_path / "run")[-1] and "needles: 2" in out


def test_gradient_checkpointing_and_bf16(train, text, tmp_path):
    flags = [*TINY, "--dataset", text, *SHORT, "--output"]
    assert train(*flags, tmp_path / "plain")[0] == 0
    assert train(*flags, tmp_path / "checkpointed", "--gradient_checkpointing")[0] == 0
    assert train(*flags, tmp_path / "bf16", "--precision", "bf16")[0] == 0
    plain, again, bf16 = ([float(loss) for _, loss in losses(tmp_path / n)] for n in ("plain", "checkpointed", "bf16"))
    assert plain == pytest.approx(again, abs=1e-5) and plain == pytest.approx(bf16, abs=0.05) and plain != bf16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16" / "final").dtype == torch.float32


def test_training_goes_on_from_a_checkpoint_folder(train, finished, text, tmp_path):
    folder, _ = finished
    code, _, err = train("--model", folder / "final", "--dataset", text, *SHORT, "--output", tmp_path / "more")
    assert code == 0, err
    assert log(tmp_path / "more")[0]["loss"] < log(folder)[0]["loss"]


def refused(result, *says):
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err
    assert all(part in err for part in says), err


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_refuses_the_folder_of_another_run(train, finished, tmp_path):
    folder, flags = finished
    before = contents(folder)
    refused(train(*flags), "holds a run already", "--resume", "--overwrite")
    refused(
        train(*flags, "--resume", "--learning_rate", "1e-4", "--steps", 7),
        "steps was 6, is 7; learning_rate was 0.001, is 0.0001",
    )
    (tmp_path / "file").write_text("x")
    refused(train(*flags, "--output", tmp_path / "file"), "is not a folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(train(*flags, "--output", tmp_path / "mine", "--overwrite"), "holds no run")
    assert (tmp_path / "mine" / "thesis.tex").exists() and contents(folder) == before


def test_a_complete_run_is_left_alone_and_overwrite_starts_anew(train, finished, copy):
    folder, flags = finished
    before = contents(folder)
    code, out, _ = train(*flags, "--resume")
    assert code == 0 and "complete" in out and contents(folder) == before
    run, flags = copy
    refused(train(*flags, "--overwrite", "--dataset", "nowhere.txt"), "no such file")
    assert checkpoint.steps(run) == [2, 4, 6]  # nothing is thrown away for a run that cannot start
    assert train(*flags, "--overwrite", "--save_every", 0)[0] == 0
    assert checkpoint.steps(run) == [] and losses(run) == losses(folder)


def test_a_kill_before_the_final_folder_loses_only_that(train, finished, copy):
    folder, _ = finished
    run, flags = copy
    assert train(*flags, "--resume")[0] == 0
    assert losses(run) == losses(folder) and "eval_loss" in (run / "final" / "README.md").read_text()
    assert (run / "final" / "model.safetensors").read_bytes() == (folder / "final" / "model.safetensors").read_bytes()


def test_a_broken_checkpoint_is_named_and_the_whole_one_too(train, finished, copy):
    run, flags = copy
    broken = run / "checkpoints" / "step-00000006" / "optimizer.bin"
    size = broken.stat().st_size
    broken.write_bytes(broken.read_bytes()[: size // 2])
    before = contents(run)
    refused(
        train(*flags, "--resume"),
        str(broken.parent),
        f"optimizer.bin has {size // 2} bytes, needs {size}",
        "step 4 is whole: --resume 4",
    )
    assert contents(run) == before
    weights = run / "checkpoints" / "step-00000004" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    refused(train(*flags, "--resume", "4"), "model.safetensors is not what was written", "step 2 is whole")
    refused(train(*flags, "--resume", "3"), "has no such checkpoint; it has 2, 4, 6")
    assert train(*flags, "--resume", "2")[0] == 0
    assert losses(run) == losses(finished[0])
    (run / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    shutil.rmtree(run / "final")
    refused(train(*flags, "--resume", "2"), "manifest.json is missing", "no older checkpoint is whole")


def test_refuses_data_that_changed_since(train, copy, tmp_path):
    run, flags = copy
    (tmp_path / "short.txt").write_text(sentences(200))
    settings = run / "settings.yaml"
    settings.write_text(settings.read_text().replace(flags[flags.index("--dataset") + 1], str(tmp_path / "short.txt")))
    before = contents(run)
    refused(train(*flags, "--dataset", tmp_path / "short.txt", "--resume"), "training sequences, now there are")
    assert contents(run) == before


def test_resume_with_nothing_there_starts_anew(train, text, tmp_path):
    code, out, _ = train(*TINY, "--dataset", text, *SHORT, "--output", tmp_path / "new", "--resume", "--steps", 2)
    assert code == 0 and "starting anew" in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--model", "sdnc-tinny"], "no preset, file or folder has this name; close: sdnc-tiny"),
        (["--model", "nowhere/"], "no preset, file or folder has this name"),
        (["--set", "hidden_sise=3"], "--set hidden_sise: linear_transformer has no such setting; close: hidden_size"),
        (["--set", "hidden_size=33"], "num_attention_heads"),
        (["--set", "vocab_size=100"], "has 4096 tokens, the model's vocabulary has 100"),
        (["--tokenizer", "nowhere"], "no tokenizer at 'nowhere'"),
        (["--dataset", "nowhere.txt"], "--dataset nowhere.txt: there is no such file or folder"),
        (["--dataset", "nowhere"], "--dataset nowhere: "),
        (["--length", "100000"], "tokens, needs at least one sequence of 100000"),
        (["--dataset", "needles", "--needles", "neddles=3"], "--needles neddles: there is no such option; close: needles"),
        (["--dataset", "needles", "--length", "20"], "too short"),
        (["--needles", "task=x"], "--needles and --text_loss are for --dataset needles"),
        (["--tracker", "nonesuch"], "--tracker"),
    ],
)
def test_refuses_in_one_line_and_leaves_nothing(train, text, tmp_path, change, says):
    refused(train(*TINY, "--dataset", text, *SHORT, "--output", tmp_path / "run", *change), says)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(train, text, tmp_path):
    result = train(*TINY, "--dataset", text, *SHORT, "--output", tmp_path / "run", "--learning_rate", "1e30", "--clip", 0)
    refused(result, "the loss is", "lower --learning_rate")


def test_the_oldest_checkpoints_go(train, text, tmp_path):
    assert train(*TINY, "--dataset", text, *SHORT, "--output", tmp_path / "run", "--save_every", 1, "--keep", 2)[0] == 0
    assert checkpoint.steps(tmp_path / "run") == [5, 6]
