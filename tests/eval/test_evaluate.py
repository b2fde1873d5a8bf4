"""Scoring: lm-eval tasks and evaluate_niah agree, right answers score 1 and wrong ones 0, the command line, the heat map, bad input."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import TOKENIZER, Reader
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from memzoo.evaluation import SUITES, evaluate_niah, heat_map, load_model, parse_length, save_results

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "eval" / "tasks"


class Known(Reader):
    """A perfect reader whose answer is changed to `answer(answer, number of the request)`; it keeps what it was asked."""

    def __init__(self, change=lambda value, number: f" {value}."):
        super().__init__()
        self.change, self.asked = change, []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [self.change(self.answer(request.args[0], request.doc), number) for number, request in enumerate(requests)]


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory):
    """A tiny random Llama with memzoo's tokenizer, saved."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    shutil.copytree(folders["llama"], path)
    return path


def run_tasks(lm, tasks, path=TASKS, **metadata):
    manager = TaskManager(
        include_path=str(path), include_defaults=False, metadata={"tokenizer": TOKENIZER.name_or_path, **metadata}
    )
    return simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)


GRID = {"max_seq_lengths": [256, 400], "depths": [0, 0.5, 1], "samples": 2}
NAMES = [f"memzoo_niah_single_{i}" for i in (1, 2, 3)]
SEVERAL = ("memzoo_niah_multivalue", "memzoo_niah_multiquery")


def test_right_answers_score_1():
    results = run_tasks(Known(), ["memzoo_niah"], **{**GRID, "max_seq_lengths": [300, 400]})["results"]
    assert sorted(results) == sorted(f"memzoo_{task}" for task in SUITES["niah"])
    for name in results:
        scores = {key.split(",")[0]: value for key, value in results[name].items() if key.endswith(",none") and "stderr" not in key}
        depths = [] if name in SEVERAL else ["depth_0", "depth_0.5", "depth_1"]
        assert scores == dict.fromkeys(["acc", "length_300", "length_400", *depths], 1.0)


def test_wrong_answers_score_0():
    results = run_tasks(Known(lambda value, number: f" {value[::-1]}x"), ["memzoo_niah_single_2"], **GRID)["results"]
    assert results[NAMES[1]]["acc,none"] == results[NAMES[1]]["length_256,none"] == 0.0


def test_scores_are_by_length_and_depth():
    # Six documents a length, two a depth: right at every second document of the first length, and nowhere at the other.
    answer = lambda value, number: value if number < 6 and number % 2 else "no"  # noqa: E731
    scores = run_tasks(Known(answer), ["memzoo_niah_single_2"], **GRID)["results"][NAMES[1]]
    assert (scores["acc,none"], scores["length_256,none"], scores["length_400,none"]) == (0.25, 0.5, 0.0)
    assert scores["depth_0,none"] == scores["depth_1,none"] == 0.25
    result = evaluate_niah(Known(answer), [256], [0, 0.5, 1], 2, tokenizer=TOKENIZER)
    assert result["accuracy"] == 0.5 and [cell["correct"] for cell in result["cells"]] == [1, 1, 1]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_task_files_and_evaluate_niah_ask_the_same(number):
    by_task, by_function = Known(), Known()
    run_tasks(by_task, [NAMES[number - 1]], value_digits=5, key_words=1, seed=9, **GRID)
    evaluate_niah(
        by_function,
        [256, 400],
        [0, 0.5, 1],
        2,
        task=f"niah_single_{number}",
        tokenizer=TOKENIZER,
        value_digits=5,
        key_words=1,
        seed=9,
    )
    assert [context for context, _ in by_task.asked] == [context for context, _ in by_function.asked]
    for context, settings in by_task.asked:
        assert not settings["do_sample"] and settings["until"] == []
        length = 256 if by_task.asked.index((context, settings)) < 6 else 400
        assert len(TOKENIZER(context).input_ids) + settings["max_gen_toks"] <= length
    caps = {settings["max_gen_toks"] for _, settings in by_function.asked}
    assert caps == {3} if number < 3 else max(caps) <= 48


def test_evaluate_niah_reports_everything(folder):
    seen = []
    result = evaluate_niah(
        str(folder),
        [256, 192],
        [1.0, 0.0],
        3,
        batch_size=4,
        dtype="float32",
        device="cpu",
        progress=lambda *step: seen.append(step),
    )
    assert [(length, row is None) for length, row in seen] == [(192, True), (192, False), (256, True), (256, False)]
    assert result["name"] == "tiny-llama" and result["task"] == "niah_single_2" and result["training_length"] == 256
    assert result["parameters"] == sum(p.numel() for p in load_model(folder).parameters())
    assert result["config"]["hidden_size"] == 32 and result["dtype"] == "float32"
    assert result["settings"] == {"samples": 3, "seed": 0, "batch_size": 4}
    assert {"torch", "transformers", "lm-eval", "python"} <= set(result["versions"])
    assert [row["length"] for row in result["lengths"]] == [192, 256] and all(row["count"] == 6 for row in result["lengths"])
    assert [(c["length"], c["depth"], c["count"]) for c in result["cells"]] == [(192, 0, 3), (192, 1, 3), (256, 0, 3), (256, 1, 3)]
    assert len(result["samples"]) == 12 and all(s["score"] in (0.0, 1.0) for s in result["samples"])
    assert json.loads(json.dumps(result)) == result
    again = evaluate_niah(load_model(folder, dtype="float32"), [192], [0.0, 1.0], 3, tokenizer=folder, batch_size=1)
    assert [s["answer"] for s in again["samples"]] == [s["answer"] for s in result["samples"][:6]]


def test_prompts_are_never_cut(folder):
    """Longer than the model was configured for: every token of the prompt reaches the model."""
    model, widths = load_model(folder, dtype="float32"), []
    model.register_forward_pre_hook(lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    result = evaluate_niah(model, [1500], [0.5], 1, tokenizer=TOKENIZER)
    assert widths[0] == result["samples"][0]["tokens"] > 1470


def test_lm_evals_own_tasks_run_offline(folder, monkeypatch):
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("wonderwords")
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: True)
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / "ruler"
    manager = TaskManager(
        include_path=str(path), include_defaults=False, metadata={"pretrained": str(folder), "max_seq_lengths": [512]}
    )
    arguments = {"pretrained": str(folder), "max_length": 1024}
    results = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=["niah_single_1", "niah_multikey_2"],
        task_manager=manager,
        limit=1,
        bootstrap_iters=0,
        device="cpu",
        gen_kwargs={"max_gen_toks": 4},
    )["results"]
    assert results["niah_single_1"]["512,none"] in (0.0, 1.0) and results["niah_multikey_2"]["512,none"] in (0.0, 1.0)


def test_a_task_without_a_tokenizer_says_so():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    with pytest.raises(ValueError, match="memzoo_niah_single_2 sizes its documents by tokens: pass --metadata"):
        simple_evaluate(model=Known(), tasks=["memzoo_niah_single_2"], task_manager=manager)


def made_up(name, lengths=(256, 512, 1024), depths=(0.0, 0.5, 1.0), trained=512):
    cells = [
        {"length": n, "depth": d, "accuracy": min(1.0, 256 / n + d), "correct": 1, "count": 4} for n in lengths for d in depths
    ]
    rows = [{"length": n, "accuracy": 0.5, "correct": 2, "count": 4, "seconds": 1.0} for n in lengths]
    return {
        "name": name, "task": "niah_single_2", "parameters": 1_234_567, "training_length": trained, "cells": cells, "lengths": rows,
        "accuracy": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3])
def test_heat_map(count, tmp_path):
    from matplotlib.image import imread

    results = [made_up(f"model {i}", trained=None if i else 512) for i in range(count)]
    heat_map(results[0] if count == 1 else results, tmp_path / "new" / "map.png")
    image = imread(tmp_path / "new" / "map.png")
    assert image.shape[0] > 400 and image.shape[1] > 600 and image[..., :3].std() > 0.1


def test_heat_map_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        heat_map([], tmp_path / "map.png")


def test_results_appear_whole(tmp_path):
    save_results({"a": 1}, tmp_path / "deep" / "results.json")
    assert json.loads((tmp_path / "deep" / "results.json").read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        save_results({"a": object()}, tmp_path / "deep" / "results.json")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "deep" / "results.json").read_text()) == {"a": 1}


def test_lengths_are_read():
    assert [parse_length(text) for text in ("512", "1k", "64K", "1m")] == [512, 1024, 65536, 1048576]
    for text in ("", "k", "-1", "0", "1.5k", "5x", "²"):
        with pytest.raises(ValueError, match="is not a number of tokens"):
            parse_length(text)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script(script, folder, tmp_path, capsys):
    out = tmp_path / "out"
    grid = ["--lengths", "160,192", "--depths", "0,1", "--samples", "1", "--value-digits", "2", "--device", "cpu"]
    assert script.main([str(folder), "--suite", "niah_single_2", *grid, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "tiny-llama" in table and "160" in table and "192" in table
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(r["model"]["name"], r["length"], r["count"]) for r in records] == [("tiny-llama", 160, 2), ("tiny-llama", 192, 2)]
    assert records[0]["settings"]["difficulty"] == {"value_digits": 2}
    assert (out / "heatmap.png").stat().st_size > 5000


def test_a_stopped_script_says_how_to_go_on(script, folder, tmp_path, capsys, monkeypatch):
    import memzoo.evaluation

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(memzoo.evaluation, "evaluate", stop)
    assert script.main([str(folder), "--suite", "copy", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{missing}"], "there is no model at .*: no such folder"),
        (["{empty}"], "is not a model: it has no config.json"),
        (["{bare}"], "holds no tokenizer"),
        (["{broken}"], "no model could be loaded from"),
        (["{good}", "--tokenizer", "{missing}"], "no tokenizer at"),
        (["{good}", "--lengths", "64"], r"length 64 is too short for the template, needs at least \d+"),
        (["{good}", "--value-digits", "99"], "value_digits is 99, needs 1 to 14"),
        (["{good}", "--dtype", "float99"], "dtype 'float99' is unknown"),
        (["{good}", "--set", "pairs=4"], "no task of these has a setting 'pairs', they have key_words, value_digits"),
        (["{good}", "--suite", "mqar", "--set", "words=9999"], "mqar needs 9999 words that are one token each"),
        (["{good}", "--suite", "ppl_by_length", "--lengths", "1m"], "length 1048576 is more than the held-out prose has"),
    ],
)
def test_bad_input_is_one_line(script, folder, tmp_path, capsys, arguments, message):
    places = {
        "missing": tmp_path / "missing",
        "empty": tmp_path / "empty",
        "bare": tmp_path / "bare",
        "broken": tmp_path / "broken",
    }
    places["empty"].mkdir()
    for name in ("bare", "broken"):
        shutil.copytree(folder, places[name])
    for file in places["bare"].glob("tokenizer*"):
        file.unlink()
    (places["broken"] / "model.safetensors").write_bytes(b"not a checkpoint")
    arguments = [text.format(good=folder, **places) for text in arguments]
    suite = [] if "--suite" in arguments else ["--suite", "niah_single_2"]
    assert script.main([*arguments, *suite, "--samples", "1", "--depths", "0.5", "--out", str(tmp_path / "out")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate: ")]
    assert len(said) == 1 and re.search(message, said[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "niah,mmlu"], "unknown suite or task 'mmlu', needs all, niah, vt"),
        (["--set", "pairs"], "setting 'pairs' is not KEY=VALUE"),
        (["--set", "pairs=many"], "setting 'pairs=many': 'many' is no number, True or False"),
        (["--lengths", "512,many"], "length 'many' is not a number of tokens such as 512 or 4k"),
        (["--depths", "0,2"], "depth '2' is not a share from 0 to 1"),
        (["--samples", "0"], "'0' is not a whole number from 1 on"),
        (["--training-length", "5x"], "length '5x' is not a number of tokens"),
    ],
)
def test_bad_options(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        script.main(["model", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
