"""Suites: a perfect reader scores 1, a guesser chance; lm-eval's own tasks and lm_eval unmodified give the same prompts and numbers."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TOKENIZER, Guesser, Reader
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.tasks._yaml_loader import load_yaml

from memzoo.data.haystack import NOISE
from memzoo.data.tasks import SUITES, TASKS, requests_of
from memzoo.evaluation import evaluate
from memzoo.evaluation.run import score_documents
from memzoo.evaluation.tasks import MemzooTask, bits_per_byte

ROOT = Path(__file__).resolve().parents[2]


def test_a_perfect_reader_scores_1_on_every_suite():
    records = {record["task"]: record for record in evaluate([Reader()], list(SUITES), lengths=[900], limit=4, tokenizer=TOKENIZER)}
    assert set(records) == set(TASKS)
    for name, record in records.items():
        assert record["value"] == (0.0 if name == "ppl_by_length" else 1.0), name
        assert record["count"] == 4 and record["higher_is_better"] == (name != "ppl_by_length")
        if name != "ppl_by_length":
            assert record["correct"] == 4 and record["interval"][0] < 0.6 and record["interval"][1] == 1.0


def test_a_guesser_scores_chance_on_every_suite():
    (*records,) = evaluate([Guesser()], list(SUITES), lengths=[600], limit=24, tokenizer=TOKENIZER)
    assert {record["task"] for record in records} == set(TASKS)
    for record in records:
        if record["metric"] == "bits_per_byte":
            assert all(abs(cell["loss"] - math.log(len(TOKENIZER))) < 1e-6 for cell in record["cells"])
            continue
        chance = record["chance"] or 0.0
        units = 24 * {"selective_copy": 16, "copy": 10, "denoise": 10, "transfer": 10, "mqar": 37}.get(record["task"], 1)
        assert abs(record["value"] - chance) <= 4 * math.sqrt(chance * (1 - chance) / units), record["task"]
    assert sum(bool(record["chance"]) for record in records) == 10


class Nearly(Reader):
    """Right, but for the last character."""

    def answer(self, prompt, doc):
        return super().answer(prompt, doc)[:-1]

    def recall(self, words):
        return super().recall(words)[:-1]


def test_a_near_miss_is_a_miss():
    names = ["niah_single_1", "niah_multikey_3", "mqar", "babi_long_qa1", "fwe", "niah_multivalue", "copy"]
    scores = {
        record["task"]: record["value"] for record in evaluate([Nearly()], names, lengths=[900], limit=2, tokenizer=TOKENIZER)
    }
    parts = {"fwe": 2 / 3, "niah_multivalue": 0.75, "copy": 0.9}
    assert scores == pytest.approx({name: parts.get(name, 0.0) for name in names})


def test_loss_is_of_bytes_and_tokens():
    document = {"input": "One two three.", "cuts": [0, 7, 14], "bytes": [7, 7], "edges": [0, 2, 4], "tokens": 4, "length": 4}
    assert requests_of("ppl_by_length", document) == [("", "One two"), ("One two", " three.")]
    assert bits_per_byte([(-7 * math.log(2), 7), (-14 * math.log(2), 7), -1.0]) == pytest.approx(1.5)
    assert bits_per_byte([-1.0]) == -1.0


# lm-eval's own tasks


class Half(LM):
    """Says the first half of what is asked for, and every second answer wrong; it keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args[0] for request in requests]
        outputs = [request.doc["outputs"] for request in requests]
        return [
            "no" if number % 2 else f"  {', '.join(values[: -(-len(values) // 2)]).upper()}\x07\n"
            for number, values in enumerate(outputs)
        ]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def samples_of(name, monkeypatch):
    """A few samples of lm-eval's own generator."""
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("wonderwords")
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: True)
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, prepare_niah, vt_utils
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    random.seed(7)
    np.random.seed(7)
    kinds = {"niah_single_1": ("repeat", "words", "numbers"), "niah_multikey_2": ("needle", "words", "numbers")}
    kinds["niah_multikey_3"] = ("needle", "uuids", "uuids")
    if name in kinds:
        haystack, keys, values = kinds[name]
        return prepare_niah.generate_samples(
            prepare_niah.get_haystack(haystack), TOKENIZER, max_seq_length=1024, template=TEMPLATE, num_samples=4,
            type_haystack=haystack, type_needle_k=keys, type_needle_v=values,
        )  # fmt: skip
    if name == "cwe":
        return cwe_utils.sys_word_pair_random(4, 1024, TOKENIZER)
    if name == "fwe":
        return fwe_utils.sys_kwext(TOKENIZER, 1024, num_samples=4)
    # Their search for the size of variable tracking does not end with every tokenizer: the pieces are put together here as it does.
    example = vt_utils.sys_vartrack_w_noise_random(TOKENIZER, 1, 500, 5)[0]
    return vt_utils.sys_vartrack_w_noise_random(TOKENIZER, 4, 2048, icl_example=example)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_lm_evals_own_tasks_ask_and_score_the_same(name, monkeypatch):
    import lm_eval.tasks
    from datasets import Dataset

    theirs = samples_of(name, monkeypatch)
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / "ruler" / f"{name}.yaml", resolve_func=True)
    config |= {"custom_dataset": lambda **_: {"test": Dataset.from_list(theirs)}}
    config.pop("tag", None)
    ours = [{**sample, "length": sample["max_length"], "tokens": sample["length"]} for sample in theirs]
    asked = {"task": f"memzoo_{name}", "custom_dataset": lambda **_: {"test": Dataset.from_list(ours)}}
    found = {}
    for task in (ConfigurableTask(config=config), MemzooTask(asked)):
        lm = Half()
        outcome = run_lm_eval(lm, {"tasks": {"task": task}}, bootstrap_iters=0)
        metric = "acc" if isinstance(task, MemzooTask) else str(theirs[0]["max_length"])
        found[type(task)] = lm.asked, [sample[metric] for sample in outcome["samples"]["task"]]
    assert found[MemzooTask] == found[ConfigurableTask]
    prompts, scores = found[MemzooTask]
    assert scores[1] == scores[3] == 0.0 < scores[0] == scores[2] and len(set(prompts)) == 4
    assert NOISE in prompts[0] or name in ("niah_multikey_2", "niah_multikey_3", "cwe", "fwe")


def test_lm_eval_unmodified_gives_the_same_numbers(folders, tmp_path):
    """The command of eval/README.md in a process of its own, against `evaluate`, answer by answer."""
    folder = folders["linear-transformer"]
    metadata = json.dumps({"max_seq_lengths": [256], "samples": 2, "depths": [0, 1]})
    names = ["niah_multikey_1", "mqar", "copy", "ppl_by_length"]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True"]
    command += ["--include_path", str(ROOT / "eval" / "tasks"), "--tasks", ",".join(f"memzoo_{name}" for name in names)]
    command += ["--metadata", metadata, "--device", "cpu", "--batch_size", "3", "--output_path", str(tmp_path), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"memzoo_mqar *\|.*acc", done.stdout) and "length_256" in done.stdout and "depth_1" in done.stdout
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    for name in names:
        theirs = results[f"memzoo_{name}"]
        logged = next(tmp_path.rglob(f"samples_memzoo_{name}_*.jsonl")).read_text().splitlines()
        logged = sorted(map(json.loads, logged), key=lambda sample: sample["doc_id"])
        limit = 4 if name == "niah_multikey_1" else 2
        (record,) = evaluate(
            [folder], [name], tmp_path / "store", lengths=[256], limit=limit, depths=[0.0, 1.0], batch_size=4, chunk=64
        )
        kept = [json.loads(line) for line in (tmp_path / "store" / record["samples"]).read_text().splitlines()]
        assert len(kept) == len(logged) == limit
        if name == "ppl_by_length":
            assert record["value"] == pytest.approx(theirs["bits_per_byte,none"], rel=1e-5)
            assert record["cells"][1]["bits_per_byte"] == pytest.approx(theirs["from_128,none"], rel=1e-5)
        else:
            assert record["value"] == theirs["acc,none"] == theirs["length_256,none"]
        for ours, sample in zip(kept, logged):
            if TASKS[name].kind == "generate":
                assert [ours["answer"]] == sample["filtered_resps"] and ours["answer"]
            else:
                chances = [float(chance) for chance, _ in (answer for answer in sample["filtered_resps"])]
                assert ours["log_likelihoods"] == pytest.approx(chances, rel=1e-4)


def test_answers_are_in_order_of_the_documents():
    asked = [
        {"input": f"a b c {word} d", "gen_prefix": "", "outputs": [word], "length": 9, "tokens": 5} for word in ("x", "y", "z")
    ]
    scored = score_documents(Reader(), TASKS["copy"], asked)
    assert [sample["target"] for sample in scored] == [["x"], ["y"], ["z"]] and [sample["number"] for sample in scored] == [0, 1, 2]
