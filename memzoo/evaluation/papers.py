"""The papers' own benchmarks, which lm-eval has and whose documents come from the network: their names, run as lm-eval runs them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from urllib.parse import urlparse

from .common import device_name, versions
from .run import Progress, Subject, _agreed, _processes
from .store import Store, identity, wilson

__all__ = ["PAPERS", "evaluate_papers"]

# Suite: names of lm-eval tasks and groups. `papers` is all of them.
PAPERS: dict[str, tuple[str, ...]] = {
    "ruler": ("ruler",),
    "babilong": ("babilong_longctx",),
    "longbench": ("longbench",),
    "longbench2": ("longbench2",),
    "fda": ("fda",),
    "swde": ("swde",),
    "squad_completion": ("squad_completion",),
    "wikitext": ("wikitext",),
    "lambada": ("lambada_openai",),
    "commonsense": ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa", "boolq"),
}
PAPERS["papers"] = tuple(name for names in PAPERS.values() for name in names)

BY_LENGTH = ("ruler", "babilong_longctx")  # these have documents of every length; the others have the documents they have
METRICS = ("acc", "contains", "score", "exact_match", "word_perplexity")  # the first that a task reports is its score
NORMALISED = ("hellaswag", "arc_challenge")  # papers give acc_norm for these
FALLING = ("perplexity", "bits_per_byte", "loss")


def evaluate_papers(
    models: Sequence,
    suites: Sequence[str],
    store: Store | None = None,
    *,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    tokenizer=None,
    batch_size: int = 8,
    chunk: int = 2048,
    dtype: str = "auto",
    device: str | None = None,
    training_length: int | None = None,
    trust_remote_code: bool = False,
    accelerator=None,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> list[dict]:
    """Run lm-eval's own tasks and append their scores to the store, one record a task (and length, for RULER and BABILong).

    Args:
        models, store, tokenizer, ...: as `evaluate` takes them.
        suites: names in PAPERS.
        lengths: tokens, for RULER and BABILong; 4,096 if None.
        limit: the first so many documents of every task; all if None.
        max_length: tokens after which lm-eval cuts prompts and texts; what the model's config says if None.

    Raises:
        ValueError: no network, or a task that cannot be loaded, in one line.
    """
    progress = progress or Progress()
    names = list(dict.fromkeys(name for suite in suites for name in PAPERS[suite]))
    suite_of = {name: suite for suite, held in PAPERS.items() if suite != "papers" for name in held}
    _check_network(suites)
    options = {
        "batch_size": batch_size, "chunk": chunk, "dtype": dtype, "device": device, "training_length": training_length,
        "trust_remote_code": trust_remote_code, "accelerator": accelerator,
    }  # fmt: skip
    subjects = [Subject(model, tokenizer, options) for model in models]
    done: dict[str, list[dict]] = {}
    for record in _agreed(store, accelerator):
        done.setdefault(record.get("settings", {}).get("run", record["id"]), []).append(record)
    runs = [
        (subject, name, length)
        for subject in subjects
        for name in names
        for length in (sorted(set(lengths or (4096,))) if name in BY_LENGTH else (0,))
    ]
    keys = [
        identity(model=s.fingerprint, papers=name, length=length, limit=limit, seed=seed, max_length=max_length, dtype=dtype)
        for s, name, length in runs
    ]
    progress.plan(sum(key not in done for key in keys), len(runs), sum(key in done for key in keys))
    records = []
    for key, (subject, name, length) in zip(keys, runs):
        if key in done:
            records += done[key]
            continue
        progress.cell(subject.name, name, length)
        begun = time.perf_counter()
        outcome = _run(subject, name, length, limit, seed, max_length)
        progress.work(1)
        if outcome is None:
            continue
        run = {"run": key, "limit": limit, "batch_size": batch_size, "processes": _processes(accelerator), "max_length": max_length}
        common = {
            **subject.facts(length),
            "settings": {"difficulty": {}, **run},
            "seed": seed,
            "versions": versions(),
            "device": device_name(subject.model),
            "seconds": round(time.perf_counter() - begun, 3),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        for task, samples in outcome["samples"].items():
            found = _summary(task, outcome["results"][task], samples, length)
            record = {
                "id": identity(run=key, task=task),
                "suite": suite_of[name],
                "task": task,
                "length": length,
                **found,
                **common,
            }
            kept = [_kept(sample, found["metric"]) for sample in samples]
            record = store.append(record, kept) if store is not None else record
            records.append(record)
            progress.record(record)
    return records


def _check_network(suites: Sequence[str]) -> None:
    """ValueError in one line where the hub that the documents come from cannot be reached.

    A machine that is set to be offline may have them, and behind a proxy the hub cannot be asked this way: lm-eval will tell.
    """
    from huggingface_hub.constants import ENDPOINT

    if any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        return
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    host = urlparse(ENDPOINT).hostname
    try:
        socket.create_connection((host, 443), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"{', '.join(suites)}: documents come from {host}, which cannot be reached ({error}); {_INSTEAD}"
        ) from None


_INSTEAD = "the other suites need no network"


def _run(subject: Subject, name: str, length: int, limit: int | None, seed: int, max_length: int | None) -> dict | None:
    """lm-eval's outcome; None in processes after the first."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tokenizer = subject.path or subject.tokenizer.name_or_path
    metadata: dict[str, object] = {"tokenizer": tokenizer, "pretrained": tokenizer}
    if name == "ruler":
        metadata["max_seq_lengths"] = [length]
    elif length:
        metadata["max_seq_lengths"] = f"{length // 1024}k"
    lm = subject.load()
    for key, value in (("_max_length", max_length), ("on_read", None)):
        if hasattr(lm, key):
            setattr(lm, key, value)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        manager = TaskManager(metadata=metadata)
        return simple_evaluate(
            model=lm, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True, **seeds
        )
    except (OSError, ValueError, ImportError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: lm-eval could not run it, its documents come from the network: {said}; {_INSTEAD}") from error


def _summary(task: str, results: dict, samples: Sequence[dict], length: int) -> dict:
    """Metric, value, count and interval of a task; every metric lm-eval reports is kept in `metrics`."""
    metrics = {
        key.split(",")[0]: value
        for key, value in results.items()
        if isinstance(value, (int, float)) and "_stderr" not in key and value != -1 and "," in key
    }
    usual = ("acc_norm", *METRICS) if task in NORMALISED else METRICS
    metric = str(length) if str(length) in metrics else next((name for name in usual if name in metrics), next(iter(metrics)))
    values = [sample[metric] for sample in samples if isinstance(sample.get(metric), (int, float))]
    share = len(values) == len(samples) > 0 and all(0 <= value <= 1 for value in values)
    return {
        "metric": "accuracy" if metric == str(length) else metric,
        "higher_is_better": not any(word in metric for word in FALLING),
        "value": metrics[metric],
        "count": len(samples),
        "correct": round(sum(values), 9) if share else None,
        "interval": wilson(sum(values), len(values)) if share else None,
        "cells": [],
        "metrics": metrics,
    }


def _kept(sample: dict, metric: str) -> dict:
    prompt = sample["arguments"][0][0] if sample["arguments"] else ""
    return {
        "number": sample["doc_id"],
        "prompt": str(prompt)[-400:],
        "answer": str(sample["filtered_resps"][0] if len(sample["filtered_resps"]) == 1 else sample["filtered_resps"]),
        "target": str(sample["target"]),
        "score": sample.get(metric) if isinstance(sample.get(metric), (int, float)) else None,
    }
