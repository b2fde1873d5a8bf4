"""A results store of invented models, so that the report's tests need no model: every kind of suite, and figures known beforehand."""

import json
import math

MODELS = {
    "sdnc-link": ("sdnc", lambda length: 1040 * length, lambda length: 620e3 + 1040.0 * length, 1.0),
    "linear-transformer-gated-delta": ("linear_transformer", lambda length: 20992, lambda length: 716e3, 0.55),
    "sdnc-window": ("sdnc", lambda length: 512 * min(length, 128), lambda length: 700e3, 0.2),
    "titans-mac": ("titans", lambda length: 65536, lambda length: 1.9e6, 0.8),
}
LENGTHS = (128, 256, 512, 1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def wilson(correct, count, z=1.96):
    share = correct / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [max(middle - half, 0.0), min(middle + half, 1.0)]


def model(name, training_length=256):
    model_type, *_ = MODELS[name]
    return {
        "name": name, "path": f"runs/{name}", "model_type": model_type, "parameters": 345000 + len(name),
        "training_length": training_length, "training_tokens": 1228800, "dtype": "float32", "fingerprint": f"f-{name}", "config": {},
    }  # fmt: skip


def cell(name, suite, task, length, share, count, **changes):
    _, state, flops, _ = MODELS[name]
    correct = round(share * count)
    found = {
        "format": 1, "id": f"{name}-{task}-{length}", "model": model(name), "suite": suite, "task": task, "length": length,
        "metric": "accuracy", "higher_is_better": True, "value": correct / count, "count": count, "correct": correct,
        "interval": wilson(correct, count), "cells": [], "state_bytes": state(length), "flops_per_token": flops(length),
        "settings": {"difficulty": {"value_digits": 2}, "batch_size": 8}, "seed": 0, "versions": {"torch": "2.13.0"},
        "device": "cpu", "seconds": 1.0, "date": "2026-01-02T03:04:05", "samples": "samples/x.jsonl",
    }  # fmt: skip
    return {**found, **changes}


def quality(name, length):
    """Falls past the training length, the faster the weaker the memory."""
    good = MODELS[name][3]
    return 1.0 if length <= 256 else max(0.05, good ** math.log2(length / 128))


def cells(names=tuple(MODELS)):
    rows = []
    for name in names:
        for length in LENGTHS:
            for task, ease in (("niah_single_1", 1.0), ("niah_single_2", 0.9)):
                depths = []
                for depth in DEPTHS:
                    share = quality(name, length) * ease * (1 - 0.3 * (1 - depth) * (length > 256))
                    correct = round(20 * share)
                    depths.append({"depth": depth, "value": correct / 20, "count": 20, "interval": wilson(correct, 20)})
                whole = sum(d["value"] for d in depths) / len(depths)
                rows.append(cell(name, "niah", task, length, whole, 100, cells=depths))
            rows.append(cell(name, "mqar", "mqar", length, 0.9 * quality(name, length), 200, settings={}))
        edges = (0, 128, 256, 512, 1024, 2048)
        buckets = []
        for a, b in zip(edges, edges[1:]):
            bits = 2.2 - 0.08 * math.log2(b / 64) + (0 if b <= 256 else (1 - quality(name, b)) * 1.5)
            buckets.append({"from": a, "to": b, "loss": bits * 2.7, "bits_per_byte": bits, "count": b - a})
        mean = sum(b["bits_per_byte"] * b["count"] for b in buckets) / edges[-1]
        rows.append(
            cell(
                name,
                "ppl_by_length",
                "prose",
                2048,
                0.5,
                16,
                metric="bits_per_byte",
                higher_is_better=False,
                value=mean,
                correct=None,
                interval=[mean - 0.05, mean + 0.05],
                cells=buckets,
                settings={},
            )
        )
    return rows


def flow(names=tuple(MODELS)):
    """What scripts/gradient_flow.py writes."""
    lags = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 511]
    curves = [
        {"name": "plain tanh RNN", "when": "initialisation", "anchor": True, "lags": lags, "norms": [0.6**lag for lag in lags]},
        {"name": "softmax attention", "when": "initialisation", "anchor": True, "lags": lags, "norms": [0.02] * len(lags)},
    ]
    for i, name in enumerate(names):
        for when in ("initialisation", "trained"):
            norms = [0.3 * (lag + 1) ** -(0.3 + 0.2 * i) for lag in lags]
            curves.append({"name": name, "when": when, "anchor": False, "lags": lags, "norms": norms})
    return {"format": 1, "length": 512, "measured": "random tokens, 8 sequences", "curves": curves}


def write(folder, rows=None, gradients=True):
    folder.mkdir(parents=True, exist_ok=True)
    rows = cells() if rows is None else rows
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if gradients:
        (folder / "gradient_flow.json").write_text(json.dumps(flow()))
    return folder
