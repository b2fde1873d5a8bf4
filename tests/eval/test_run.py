"""Running suites: the store and what it says, going on after a stop, several processes, intervals, lm-eval's own tasks by name."""

import json
import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER, Guesser, Reader, tiny
from lm_eval.api.task import ConfigurableTask

from memzoo.data.tasks import TASKS
from memzoo.evaluation import PAPERS, Progress, Store, evaluate, evaluate_papers, load_model, run, wilson
from memzoo.evaluation.common import fingerprint, training_tokens
from memzoo.evaluation.reader import MemoryLM
from memzoo.evaluation.store import mean_interval
from memzoo.evaluation.tasks import MemzooTask

ROOT = Path(__file__).resolve().parents[2]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Told(Progress):
    def __init__(self):
        self.planned, self.cells, self.done, self.notes, self.records = None, [], 0.0, [], []

    def plan(self, work, cells, finished):
        self.planned = (work, cells, finished)

    def cell(self, model, task, length):
        self.cells.append((task, length))

    def work(self, done):
        self.done += done

    def record(self, record):
        self.records.append(record)

    def note(self, text):
        self.notes.append(text)


def test_importing_costs_no_lm_eval_and_no_torch():
    code = "import sys, memzoo.evaluation; print([name for name in ('torch', 'transformers', 'lm_eval') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_store_says_everything(folders, tmp_path):
    folder = folders["linear-transformer"]
    told = Told()
    names = ["niah_single_2", "mqar", "ppl_by_length"]
    records = evaluate([folder], names, tmp_path, lengths=[300, 200], limit=4, depths=[0.0, 1.0], progress=told)
    assert lines(tmp_path / "results.jsonl") == records == told.records and len(records) == 6
    assert [(r["task"], r["length"]) for r in records] == [(name, length) for name in names for length in (200, 300)]
    assert told.planned == (4 * 500 * 3, 6, 0) and told.done == pytest.approx(4 * 500 * 3)
    model = load_model(folder)
    for record in records:
        assert record["format"] == 1 and record["seed"] == 0 and record["settings"]["limit"] == 4 and record["count"] == 4
        assert record["state_bytes"] == model.state_bytes(record["length"])
        assert record["flops_per_token"] == model.flops_per_token(record["length"])
        assert {"torch", "lm-eval", "python"} <= set(record["versions"]) and record["date"].endswith("+00:00")
        facts = record["model"]
        assert (
            facts["name"] == "linear-transformer"
            and facts["path"] == str(folder)
            and facts["model_type"] == model.config.model_type
        )
        assert facts["parameters"] == sum(p.numel() for p in model.parameters()) and facts["config"]["hidden_size"] == 32
        assert (
            facts["fingerprint"] == fingerprint(None, folder) and facts["dtype"] == "float32" and facts["training_tokens"] is None
        )
        kept = lines(tmp_path / record["samples"])
        assert [sample["number"] for sample in kept] == [0, 1, 2, 3] and all(sample["prompt"] for sample in kept)
        if record["metric"] == "accuracy":
            assert record["value"] == sum(sample["score"] for sample in kept) / 4 and record["interval"] == wilson(
                record["correct"], 4
            )
        else:
            assert record["interval"][0] < record["value"] < record["interval"][1] and record["correct"] is None
    assert [(c["depth"], c["count"]) for c in records[0]["cells"]] == [(0.0, 2), (1.0, 2)]
    assert [(c["from"], c["to"]) for c in records[-1]["cells"]] == [(0, 128), (128, 256), (256, 300)]
    (other,) = evaluate([folder], ["ppl_by_length"], lengths=[300], limit=2, difficulty={"first_bucket": 100})
    assert [(c["from"], c["to"]) for c in other["cells"]] == [(0, 100), (100, 200), (200, 300)]
    losses = [(c["loss"] / math.log(2), c["bits_per_byte"]) for c in records[-1]["cells"]]
    assert all(1.0 < bits / per_byte < 5.0 for bits, per_byte in losses)  # bytes a token


def test_a_finished_cell_is_not_run_again(tmp_path):
    def again(progress=None, **change):
        settings = {"lengths": [200], "limit": 3, "tokenizer": TOKENIZER, "progress": progress, **change}
        return evaluate([Reader()], ["mqar", "niah_single_1"], tmp_path, **settings)

    first, told = again(), Told()
    assert again(told) == first and told.planned == (0, 2, 2) and told.cells == [] and len(lines(tmp_path / "results.jsonl")) == 2
    for change in ({"limit": 4}, {"seed": 1}, {"lengths": [220]}, {"difficulty": {"pairs": 5, "value_digits": 3}}):
        told = Told()
        again(told, **change)
        assert len(told.cells) == 2, change
    told = Told()
    again(told, depths=[0.5])  # means nothing to mqar
    assert told.cells == [("niah_single_1", 200)]
    assert len({record["id"] for record in Store(tmp_path).records()}) == 11
    told = Told()
    evaluate([Guesser()], ["mqar"], tmp_path, lengths=[200], limit=3, tokenizer=TOKENIZER, progress=told)
    assert told.cells == [("mqar", 200)]


def test_a_stop_loses_the_cell_at_hand_only(tmp_path):
    class Stops(Reader):
        calls = 0

        def generate_until(self, requests, disable_tqdm=False):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().generate_until(requests)

    settings = {"lengths": [200, 300], "limit": 2, "tokenizer": TOKENIZER}
    with pytest.raises(KeyboardInterrupt):
        evaluate([Stops()], ["copy"], tmp_path, **settings)
    (kept,) = lines(tmp_path / "results.jsonl")
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"format": 1, "id": "cut of')  # the machine stopped while it wrote
    told = Told()
    records = evaluate([Stops()], ["copy"], tmp_path, progress=told, **settings)
    assert records[0] == kept and [record["length"] for record in records] == [200, 300] and told.cells == [("copy", 300)]
    assert [record["id"] for record in Store(tmp_path).records()] == [record["id"] for record in records]


def test_what_does_not_fit_is_left_out_and_said(tmp_path):
    told = Told()
    records = evaluate([Reader()], ["vt", "copy"], tmp_path, lengths=[100, 800], limit=2, tokenizer=TOKENIZER, progress=told)
    assert [(r["task"], r["length"]) for r in records] == [("vt", 800), ("copy", 100), ("copy", 800)]
    assert len(told.notes) == 1 and "vt: length 100 is too short" in told.notes[0] and told.done == pytest.approx(2 * 1800)
    with pytest.raises(ValueError, match="vt: length 100 is too short for the template, needs at least"):
        evaluate([Reader()], ["vt"], tmp_path, lengths=[100], limit=2, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "limit is 0, needs at least 1"),
        ({"depths": [2.0]}, "depths are"),
        ({"lengths": [0]}, "length 0 is too short"),
        ({"difficulty": {"ease": 1}}, "no task of these has a setting 'ease', they have key_words, value_digits"),
        ({"models": []}, "nothing to do"),
        ({"suites": ["mmlu"]}, "unknown suite or task 'mmlu'"),
        ({"models": ["/nowhere/at/all"]}, "no such folder"),
    ],
)
def test_bad_input(change, message, tmp_path):
    arguments = {"models": [Reader()], "suites": ["niah_single_1"], "store": tmp_path / "out", "tokenizer": TOKENIZER, **change}
    with pytest.raises(ValueError, match=message) as error:
        evaluate(**arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, results need a folder"):
        Store(tmp_path / "file")


def test_a_model_in_memory_and_one_in_a_folder_score_the_same(folders, tmp_path):
    settings = {"lengths": [200], "limit": 3, "tokenizer": TOKENIZER}
    (held,) = evaluate([load_model(folders["sdnc"])], ["copy"], tmp_path, **settings)
    (saved,) = evaluate([folders["sdnc"]], ["copy"], tmp_path, **settings)
    assert lines(tmp_path / held["samples"]) == lines(tmp_path / saved["samples"]) and held["model"]["name"] == "sdnc"
    again = tiny("sdnc")
    assert fingerprint(again) == fingerprint(tiny("sdnc")) != fingerprint(tiny("linear-transformer"))
    next(again.parameters()).data[0, 0] += 1
    assert fingerprint(again) != fingerprint(tiny("sdnc"))


def test_a_model_with_its_memories_cached_is_another_one(folders, tmp_path):
    folder, options = folders["linear-transformer"], {"lengths": [300], "limit": 2}
    plain = evaluate([folder], ["ppl_by_length"], tmp_path, **options)
    cached = evaluate([folder], ["ppl_by_length"], tmp_path, cache_segments=64, **options)
    assert cached[0]["model"]["name"] == plain[0]["model"]["name"] + " + average 64" and cached[0]["id"] != plain[0]["id"]
    # Sums of keys and values start anew every 64 tokens and are averaged: the same quotient. The sum is kept beside the open segment's.
    assert cached[0]["value"] == pytest.approx(plain[0]["value"], rel=1e-4)
    assert cached[0]["state_bytes"] > plain[0]["state_bytes"]
    with pytest.raises(ValueError, match="LlamaForCausalLM has no recurrent memory"):
        evaluate([folders["llama"]], ["ppl_by_length"], tmp_path, cache_segments=64, **options)


def test_the_run_beside_a_checkpoint_says_its_tokens(folders, tmp_path):
    final = tmp_path / "my-run" / "final"
    final.parent.mkdir()
    final.symlink_to(folders["llama"])
    (tmp_path / "my-run" / "log.jsonl").write_text('{"step": 1, "tokens": 100}\n{"step": 2, "tokens": 200}\n{"eval_loss": 1.0}\n')
    assert training_tokens(final) == 200 and training_tokens(tmp_path) is None
    (record,) = evaluate([final], ["copy"], lengths=[100], limit=1)
    assert record["model"]["training_tokens"] == 200 and record["model"]["name"] == "my-run"
    assert record["model"]["training_length"] == 256 and record["state_bytes"] is None


def test_a_loss_that_is_no_number_is_kept_as_that(folders, tmp_path):
    model = load_model(folders["llama"])
    model.lm_head.weight.data.fill_(float("nan"))
    (record,) = evaluate([model], ["ppl_by_length"], tmp_path, lengths=[200], limit=2, tokenizer=TOKENIZER)
    assert record["value"] is None and record["interval"] is None and record["cells"][0]["loss"] is None
    text = (tmp_path / "results.jsonl").read_text() + (tmp_path / record["samples"]).read_text()
    assert "NaN" not in text and Store(tmp_path).records() == [record]


@pytest.mark.parametrize("name", ["mqar", "ppl_by_length", "copy"])
def test_documents_may_be_scored_in_portions(folders, tmp_path, monkeypatch, name):
    settings = {"lengths": [150], "limit": 5}
    (whole,) = evaluate([folders["linear-transformer"]], [name], tmp_path / "whole", **settings)
    monkeypatch.setattr(run, "TOGETHER", 1500)
    told = Told()
    (parts,) = evaluate([folders["linear-transformer"]], [name], tmp_path / "parts", progress=told, **settings)
    assert parts["value"] == pytest.approx(whole["value"], rel=1e-6) and told.done == pytest.approx(750)
    first, second = (lines(tmp_path / place / whole["samples"]) for place in ("whole", "parts"))
    assert [sample["number"] for sample in second] == [0, 1, 2, 3, 4]
    assert [(x["prompt"], x.get("answer")) for x in first] == [(x["prompt"], x.get("answer")) for x in second]


def test_portions_give_every_process_a_document(monkeypatch):
    asked = [{"input": "x" * 1000}] * 7
    assert run._portions(TASKS["copy"], asked, 1) == [(0, 7)]
    monkeypatch.setattr(run, "TOGETHER", 3000)
    assert run._portions(TASKS["copy"], asked, 1) == [(0, 3), (3, 6), (6, 7)]
    assert run._portions(TASKS["copy"], asked, 2) == [(0, 3), (3, 7)] and run._portions(TASKS["copy"], asked, 4) == [(0, 7)]


# Intervals


def test_wilson_is_wilsons():
    assert wilson(38, 40) == pytest.approx([0.8350, 0.9862], abs=1e-4)  # by hand
    assert wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4) and wilson(10, 10)[1] == 1.0
    assert wilson(2.5, 10)[0] < 0.25 < wilson(2.5, 10)[1]
    for share in (0.0, 0.07, 0.5, 1.0):
        low, high = wilson(share * 100, 100)
        assert 0.0 <= low <= share <= high <= 1.0
    with pytest.raises(ValueError, match="is no share"):
        wilson(3, 2)


def test_wilson_holds_what_it_says():
    """Of many draws, 95 in a hundred intervals hold the true share, or a little more."""
    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.9):
        drawn = (torch.rand(2000, 40, generator=generator) < share).sum(1).tolist()
        held = sum(low <= share <= high for low, high in (wilson(correct, 40) for correct in drawn)) / 2000
        assert 0.93 < held < 0.99


def test_intervals_of_losses():
    assert mean_interval([1.0], [1.0]) is None and mean_interval([2.0, 4.0], [1.0, 2.0]) == [2.0, 2.0]
    low, high = mean_interval([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)), abs=1e-3)  # t of two degrees


# Several processes


class Two:
    """An accelerator of two processes, of which this is the second."""

    num_processes, process_index, is_main_process = 2, 1, False
    device = torch.device("cpu")


def test_documents_are_split_among_processes(folders):
    lm = MemoryLM(load_model(folders["llama"]), TOKENIZER, accelerator=Two())
    task = MemzooTask(
        {"task": "memzoo_copy", "metadata": {"tokenizer": TOKENIZER.name_or_path, "max_seq_lengths": [64], "samples": 5}}
    )
    task.build_all_requests(rank=lm.rank, world_size=lm.world_size)
    assert [instance.doc_id for instance in task.instances] == [1, 3]


def test_two_processes_give_what_one_gives(folders, tmp_path):
    """The script under a launcher, with two processes on CPUs: the same samples, and each read its half."""
    arguments = [
        str(ROOT / "scripts" / "evaluate.py"),
        str(folders["linear-transformer"]),
        "--suite",
        "niah_single_1,mqar,ppl_by_length",
    ]
    arguments += ["--lengths", "200", "--limit", "5", "--device", "cpu"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *launch, *arguments, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("score by length") == 1  # one process speaks
    one = evaluate(
        [folders["linear-transformer"]], ["niah_single_1", "mqar", "ppl_by_length"], tmp_path / "one", lengths=[200], limit=5
    )
    two = lines(tmp_path / "two" / "results.jsonl")
    assert [record["id"] for record in one] == [record["id"] for record in two]
    for a, b in zip(one, two):
        assert b["settings"]["processes"] == 2 and a["settings"]["processes"] == 1 and b["count"] == 5
        assert b["tokens_read"] == pytest.approx(a["tokens_read"] * 3 / 5, rel=0.05)  # documents 0, 2 and 4, padded to three each
        assert b["value"] == pytest.approx(a["value"], rel=1e-6)
        for x, y in zip(lines(tmp_path / "one" / a["samples"]), lines(tmp_path / "two" / b["samples"])):
            assert (x["number"], x["prompt"], x.get("answer")) == (y["number"], y["prompt"], y.get("answer"))


def test_fewer_documents_than_processes_are_refused(folders):
    with pytest.raises(ValueError, match="limit is 1, needs at least one document for each of the 2 processes"):
        evaluate([folders["llama"]], ["copy"], lengths=[64], limit=1, accelerator=Two())


# lm-eval's own tasks


def test_papers_name_tasks_that_lm_eval_has():
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    folders = {
        "babilong_longctx": "babilong",
        "lambada_openai": "lambada",
        "social_iqa": "siqa",
        "boolq": "super_glue",
        "arc_easy": "arc",
    }
    folders |= {"arc_challenge": "arc"}
    for name in PAPERS["papers"]:
        files = [*(root / folders.get(name, name)).rglob("*.yaml")]
        found = [
            config for file in files if name in ((config := load_yaml(file, resolve_func=False)).get("task"), config.get("group"))
        ]
        assert found, name
    assert {"ruler", "babilong", "longbench", "longbench2", "fda", "swde", "squad_completion", "wikitext", "lambada"} < set(PAPERS)


def test_without_a_network_papers_say_so_in_one_line(folders, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(ValueError, match=r"fda: documents come from huggingface\.co, which cannot be reached") as error:
        evaluate_papers([folders["llama"]], ["fda"], Store(tmp_path / "out"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_papers_run_what_lm_eval_has(folders, tmp_path, monkeypatch):
    """With documents at hand instead of a network: lm-eval's own task, its score, interval and samples in the store, once."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"question": f"Is it {i}?", "label": i % 2}) + "\n" for i in range(6)))
    config = {
        "task": "tiny_choice", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(documents)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": ["yes", "no"], "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    import lm_eval

    asked = []

    def run_here(tasks, task_manager=None, **settings):
        asked.append((tasks, settings["limit"]))
        return lm_eval.evaluator.simple_evaluate(tasks=[ConfigurableTask(config=config)], task_manager=task_manager, **settings)

    monkeypatch.setattr(lm_eval, "simple_evaluate", run_here)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))  # seconds
    monkeypatch.setitem(PAPERS, "tiny", ("tiny_choice",))
    (record,) = evaluate_papers([folders["llama"]], ["tiny"], Store(tmp_path / "out"), limit=4)
    assert (record["suite"], record["task"], record["metric"], record["count"], record["length"]) == (
        "tiny",
        "tiny_choice",
        "acc",
        4,
        0,
    )
    assert record["interval"] == wilson(record["correct"], 4) and record["value"] == record["correct"] / 4
    assert set(record["metrics"]) == {"acc", "acc_norm"} and len(lines(tmp_path / "out" / record["samples"])) == 4
    assert evaluate_papers([folders["llama"]], ["tiny"], Store(tmp_path / "out"), limit=4) == [record]
    assert asked == [(["tiny_choice"], 4)]


def test_every_task_has_a_file():
    files = [*(ROOT / "eval" / "tasks").rglob("*.yaml")]
    assert sorted(file.stem for file in files) == sorted(f"memzoo_{name}" for name in TASKS)
    for file in files:
        assert f"task: {file.stem}\n" in file.read_text() and file.parent.name == TASKS[file.stem.removeprefix("memzoo_")].suite
