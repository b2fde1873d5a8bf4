"""Suites on models, one cell (model, task, length) after the other, each appended to the store when it is finished."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from ..data.fit import DoesNotFit
from ..data.tasks import DEPTHS, SuiteTask, documents, find_tasks, requests_of
from .common import (
    check_place,
    described,
    device_name,
    fingerprint,
    load_model,
    read_tokenizer,
    tokenizer_fingerprint,
    training_tokens,
    versions,
)
from .store import Store, finite, identity, mean_interval, wilson

__all__ = ["Progress", "Subject", "evaluate", "score_documents"]

NEVER = 2**31  # a length at which lm-eval cuts prompts; ours are never cut, and a model that cannot read them should say so
TAIL = 400  # characters of a prompt that are kept with an answer
TOGETHER = 10**8  # characters of requests that lm-eval is given at a time


class Progress:
    """What `evaluate` tells while it works; a subclass shows it. Work is counted in tokens of documents."""

    def plan(self, work: int, cells: int, finished: int) -> None:
        """So much work in so many cells, of which so many were finished before."""

    def cell(self, model: str, task: str, length: int) -> None:
        """This cell begins."""

    def work(self, done: float) -> None:
        """So much more work is done."""

    def record(self, record: dict) -> None:
        """This cell is finished and in the store."""

    def note(self, text: str) -> None:
        """Something to tell in one line, such as a cell that cannot be run."""


class Subject:
    """One model to be scored: a folder, a hub name, a transformers model or an lm-eval LM; loaded when it is first needed."""

    def __init__(self, model, tokenizer, options: dict) -> None:
        self.options, self.lm, self.model, self.path = options, None, None, None
        trust = options["trust_remote_code"]
        if isinstance(model, (str, Path)):
            self.path = check_place(model)
            self.tokenizer = read_tokenizer(self.path if tokenizer is None else tokenizer, trust)
            folder = Path(self.path)
            self.name = folder.parent.resolve().name if folder.name == "final" else folder.name
        else:
            self.tokenizer = read_tokenizer(tokenizer, trust)
            self.model = getattr(model, "model", None) if hasattr(model, "generate_until") else model
            self.lm = model if hasattr(model, "generate_until") else None
            self.name = getattr(getattr(self.model, "config", None), "model_type", None) or type(model).__name__
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{self.name}: documents need a fast tokenizer, {type(self.tokenizer).__name__} is not one")
        self.fingerprint = fingerprint(self.model or self.lm, self.path)
        segments = options.get("cache_segments")
        if segments and self.path is not None:
            how = f"{options['cache_aggregation']} {segments}"
            self.name, self.fingerprint = f"{self.name} + {how}", f"{self.fingerprint} {how}"

    def load(self):
        """The lm-eval LM."""
        if self.lm is None:
            from .reader import MemoryLM

            options = self.options
            if self.model is None:
                device = options["accelerator"].device if _processes(options["accelerator"]) > 1 else options["device"]
                trust = options["trust_remote_code"]
                self.model = load_model(self.path, dtype=options["dtype"], device=device, trust_remote_code=trust)
                if options.get("cache_segments"):
                    from ..caching import enable_memory_caching

                    enable_memory_caching(self.model, options["cache_segments"], options["cache_aggregation"])
            self.lm = MemoryLM(
                self.model, self.tokenizer, options["batch_size"], options["chunk"], accelerator=options["accelerator"]
            )
        return self.lm

    def forget(self) -> None:
        """Free the memory of a model that was loaded from a folder or the hub."""
        if self.path is not None:
            self.lm = self.model = None

    def facts(self, length: int) -> dict:
        """What the store says about the model and what it costs at a length."""
        network = self.model
        config = getattr(network, "config", None)
        trained = self.options["training_length"]
        return {
            "model": {
                "name": self.name,
                "path": self.path,
                "model_type": getattr(config, "model_type", None),
                "parameters": sum(p.numel() for p in network.parameters()) if network is not None else None,
                "training_length": getattr(config, "training_length", None) if trained is None else trained,
                "training_tokens": training_tokens(self.path),
                "dtype": str(network.dtype).removeprefix("torch.") if network is not None else None,
                "fingerprint": self.fingerprint,
                "config": described(config),
            },
            "state_bytes": network.state_bytes(length) if hasattr(network, "state_bytes") and length else None,
            "flops_per_token": network.flops_per_token(length) if hasattr(network, "flops_per_token") and length else None,
        }


def _processes(accelerator) -> int:
    return 1 if accelerator is None else accelerator.num_processes


def evaluate(
    models: Sequence,
    suites: Sequence[str],
    store: Store | str | Path | None = None,
    *,
    lengths: Sequence[int] | None = None,
    limit: int = 50,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    difficulty: dict[str, object] | None = None,
    tokenizer=None,
    batch_size: int = 8,
    chunk: int = 2048,
    dtype: str = "auto",
    device: str | None = None,
    training_length: int | None = None,
    cache_segments: int | None = None,
    cache_aggregation: str = "average",
    trust_remote_code: bool = False,
    accelerator=None,
    progress: Progress | None = None,
) -> list[dict]:
    """Score models on suites; every finished cell is appended to the store, and a cell that is there already is not run again.

    Args:
        models: folders, hub names, transformers models or lm-eval LMs.
        suites: names of suites or tasks (`memzoo.data.tasks`).
        store: where results go; nowhere if None.
        lengths: tokens of prompt and answer together; each task's own if None.
        limit: documents of a cell, for needles shared out among the depths.
        depths: shares of the haystack before the needle.
        seed: another seed, other documents.
        difficulty: settings that make tasks easier, such as `value_digits` or `pairs`; each goes to the tasks that have it.
        tokenizer: an object, folder or name for all models; each model's own if None, memzoo's for a model given as an object.
        batch_size: prompts at a time.
        chunk: tokens of a prompt that are read at a time.
        dtype, device, trust_remote_code: how a model given by name is loaded.
        training_length: tokens the models were trained at; each config's `training_length` if None.
        cache_segments, cache_aggregation: read models given by name with `memzoo.enable_memory_caching` at segments of so many tokens;
            such a model is another one to the store.
        accelerator: an accelerate.Accelerator; documents are split among its processes.
        progress: told how the work goes.

    Returns:
        The records of all cells asked for, new and old, in order; in processes after the first only the old ones.

    Raises:
        ValueError: bad input, in one line: before anything runs if it can be known, else after the cells before it are in the store. A task
            that does not fit a length is a note, unless nothing could be run at all.
    """
    progress = progress or Progress()
    tasks = list({task.name: task for suite in suites for task in find_tasks(suite)}.values())
    difficulty = difficulty or {}
    _check(models, tasks, lengths, limit, depths, difficulty, _processes(accelerator))
    options = {
        "batch_size": batch_size, "chunk": chunk, "dtype": dtype, "device": device, "training_length": training_length,
        "cache_segments": cache_segments, "cache_aggregation": cache_aggregation,
        "trust_remote_code": trust_remote_code, "accelerator": accelerator,
    }  # fmt: skip
    subjects = [Subject(model, tokenizer, options) for model in models]
    store = Store(store) if isinstance(store, (str, Path)) else store
    done = {record["id"]: record for record in _agreed(store, accelerator)}

    cells = []
    for subject in subjects:
        for task in tasks:
            for length in sorted(set(lengths or task.lengths)):
                changed = {k: v for k, v in difficulty.items() if k in task.difficulty and v != task.difficulty[k]}
                cells.append((subject, task, length, changed))
    keys = [_identity(*cell, limit, seed, depths, dtype) for cell in cells]
    open_ = [key not in done for key in keys]
    progress.plan(sum(cell[2] * limit for cell, new in zip(cells, open_) if new), len(cells), len(cells) - sum(open_))
    records, notes = [], []
    for number, ((subject, task, length, changed), key) in enumerate(zip(cells, keys)):
        if key in done:
            records.append(done[key])
            continue
        progress.cell(subject.name, task.name, length)
        begun = time.perf_counter()
        try:
            asked = list(documents(task.name, subject.tokenizer, length, limit, seed, depths=depths, **changed))
        except DoesNotFit as error:
            notes.append(str(error))
            progress.note(f"left out: {error}")
            progress.work(length * limit)
            continue
        lm = subject.load()
        before = getattr(lm, "tokens_read", 0)
        scored = score_documents(lm, task, asked, _advancer(progress, length * limit))
        if scored is not None:
            settings = {
                "difficulty": changed,
                "limit": limit,
                **({"depths": list(depths)} if task.depths else {}),
                "batch_size": batch_size,
                "chunk": chunk,
                "processes": _processes(accelerator),
                "tokenizer": tokenizer_fingerprint(subject.tokenizer),
            }
            record = {
                "id": key,
                "suite": task.suite,
                "task": task.name,
                "length": length,
                **summary(task, scored),
                **subject.facts(length),
                "chance": _chance(asked),
                "settings": settings,
                "seed": seed,
                "versions": versions(),
                "device": device_name(subject.model),
                "tokens_read": getattr(lm, "tokens_read", before)
                - before,  # by the first process; what documents share counts once
                "seconds": round(time.perf_counter() - begun, 3),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            if store is not None:
                record = store.append(record, scored)
            done[key] = record
            records.append(record)
            progress.record(record)
        if number + 1 == len(cells) or cells[number + 1][0] is not subject:
            subject.forget()
    if notes and not records and (accelerator is None or accelerator.is_main_process):
        raise ValueError(notes[0])
    return records


def _check(models, tasks: Sequence[SuiteTask], lengths, limit: int, depths, difficulty: dict, processes: int) -> None:
    if not models or not tasks:
        raise ValueError(f"nothing to do: {len(models)} models and {len(tasks)} tasks")
    if limit < 1:
        raise ValueError(f"limit is {limit}, needs at least 1 document")
    if limit < processes:
        raise ValueError(f"limit is {limit}, needs at least one document for each of the {processes} processes")
    for length in lengths or ():
        if length < 1:
            raise ValueError(f"length {length} is too short, needs at least 1")
    if any(task.depths for task in tasks) and (not depths or not all(0.0 <= depth <= 1.0 for depth in depths)):
        raise ValueError(f"depths are {list(depths)}, need shares from 0 to 1")
    for key in difficulty:
        known = sorted({name for task in tasks for name in task.difficulty})
        if key not in known:
            raise ValueError(f"no task of these has a setting {key!r}, they have {', '.join(known)}")


def _agreed(store: Store | None, accelerator) -> list[dict]:
    """The store's records as the first process sees them, so that all processes leave out the same cells."""
    if _processes(accelerator) == 1:
        return store.records() if store else []
    from accelerate.utils import broadcast_object_list

    box = [store.records() if store and accelerator.is_main_process else []]
    return broadcast_object_list(box)[0]


def _identity(subject: Subject, task: SuiteTask, length: int, changed: dict, limit: int, seed: int, depths, dtype: str) -> str:
    return identity(
        model=subject.fingerprint,
        tokenizer=tokenizer_fingerprint(subject.tokenizer),
        task=task.name,
        length=length,
        limit=limit,
        seed=seed,
        difficulty=changed,
        depths=[float(depth) for depth in depths] if task.depths else None,
        dtype=dtype,
    )


def _advancer(progress: Progress, work: int):
    """What takes shares of a cell's work as they are done; a share of 1 means all that is left."""
    left = float(work)

    def advance(share: float) -> None:
        nonlocal left
        done = min(share * work, left)
        left -= done
        progress.work(done)

    return advance


def score_documents(lm, task: SuiteTask, asked: list[dict], advance=None, cap: int | None = None) -> list[dict] | None:
    """What is kept of every document: its number, the end of its prompt, answer, target, score and what the score needs; through lm-eval.

    None in processes after the first. `cap` is the most tokens to generate, the task's own if None.
    """
    from datasets import Dataset
    from lm_eval.evaluator import evaluate as run_lm_eval

    from .tasks import PREFIX, MemzooTask

    scored: list[dict] = []
    for start, stop in _portions(task, asked, getattr(lm, "world_size", 1)):
        data = Dataset.from_list([{**document, "monotone": task.monotone and cap is None} for document in asked[start:stop]])
        config = {"task": f"{PREFIX}{task.name}", "custom_dataset": lambda data=data, **_: {"test": data}}
        if cap is not None:
            config["generation_kwargs"] = {"do_sample": False, "max_gen_toks": cap, "until": list(task.until)}
        share = (stop - start) / len(asked)
        on_read = (lambda tokens, to_read, share=share: advance(share * tokens / to_read)) if advance else None
        for key, value in (("_max_length", NEVER), ("on_read", on_read)):
            if hasattr(lm, key):
                setattr(lm, key, value)
        # Not simple_evaluate: that indexes lm-eval's own tasks and asks git and pip what is installed, seconds for every cell.
        outcome = run_lm_eval(lm, {"tasks": {"task": MemzooTask(config)}}, bootstrap_iters=0, log_samples=True)
        if outcome is not None:
            samples = sorted(outcome["samples"]["task"], key=lambda sample: sample["doc_id"])
            scored += [{**_kept(task, sample), "number": start + sample["doc_id"]} for sample in samples]
    if advance:
        advance(1.0)
    return scored or None


def _portions(task: SuiteTask, asked: list[dict], processes: int) -> list[tuple[int, int]]:
    """(first, after the last) of documents that are scored together: lm-eval holds the text of every request, and a query has its own."""
    contexts = [asked[0]["input"]] if task.kind == "generate" else [context for context, _ in requests_of(task.name, asked[0])]
    size = max(sum(map(len, contexts)), 1)
    count = max(TOGETHER // size, processes)
    starts = list(range(0, len(asked), count))
    if len(starts) > 1 and len(asked) - starts[-1] < processes:  # each process needs a document
        starts.pop()
    return list(zip(starts, [*starts[1:], len(asked)]))


def _kept(task: SuiteTask, sample: dict) -> dict:
    document, answers = sample["doc"], sample["filtered_resps"]
    kept = {"number": sample["doc_id"], "length": document["length"], "tokens": document["tokens"]}
    if task.kind == "loss":
        return {
            **kept,
            "prompt": document["input"][-TAIL:],
            "log_likelihoods": [chance for chance, _ in answers],
            "bytes": document["bytes"],
            "buckets": document["buckets"],
            "edges": document["edges"],
        }
    kept |= {key: document[key] for key in ("depth", "key", "labels") if document.get(key) is not None}
    if task.kind == "recall":
        right = [bool(first) for _, first in answers]
        shown = [context[-TAIL // 4 :] for (context, _) in sample["arguments"][:4]]
        return {
            **kept,
            "prompt": shown,
            "answer": right,
            "target": document["outputs"],
            "log_likelihoods": [chance for chance, _ in answers],
            "score": sum(right) / len(right),
        }
    context = sample["arguments"][0][0]
    score = sample["acc"]
    return {**kept, "prompt": context[-TAIL:], "answer": answers[0], "target": document["outputs"], "score": score}


def summary(task: SuiteTask, scored: list[dict]) -> dict:
    """The figures of a cell: metric, value, count, interval, and its parts by depth or position."""
    if task.kind == "loss":
        return _loss_summary(scored)
    parts = []
    for depth in sorted({sample["depth"] for sample in scored if "depth" in sample}):
        parts.append({"depth": depth, **_accuracy([sample for sample in scored if sample.get("depth") == depth])})
    return {"metric": "accuracy", "higher_is_better": True, **_accuracy(scored), "cells": parts}


def _accuracy(scored: list[dict]) -> dict:
    correct, count = sum(sample["score"] for sample in scored), len(scored)
    correct = round(correct, 9)
    return {
        "value": correct / count,
        "count": count,
        "correct": int(correct) if correct == int(correct) else correct,
        "interval": wilson(correct, count),
    }


def _loss_summary(scored: list[dict]) -> dict:
    bits = [-sum(sample["log_likelihoods"]) / math.log(2) for sample in scored]
    sizes = [sum(sample["bytes"]) for sample in scored]
    buckets = scored[0]["buckets"]
    parts = []
    for index in range(len(scored[0]["bytes"])):
        nats = [-sample["log_likelihoods"][index] for sample in scored]
        tokens = [sample["edges"][index + 1] - sample["edges"][index] for sample in scored]
        piece = [sample["bytes"][index] for sample in scored]
        parts.append(
            {
                "from": buckets[index],
                "to": buckets[index + 1],
                "loss": sum(nats) / sum(tokens),
                "bits_per_byte": sum(nats) / math.log(2) / sum(piece),
                "count": len(scored),
                "interval": mean_interval([n / math.log(2) for n in nats], piece),
            }
        )
    found = {
        "metric": "bits_per_byte",
        "higher_is_better": False,
        "value": sum(bits) / sum(sizes),
        "count": len(scored),
        "correct": None,
        "interval": mean_interval(bits, sizes),
        "cells": parts,
    }
    found = finite(found)
    return found if found["value"] is not None else {**found, "interval": None}


def _chance(asked: list[dict]) -> float | None:
    """What guessing among the answers there are would score, where that is known."""
    known = [document["chance"] for document in asked if "chance" in document]
    return sum(known) / len(known) if known else None
