"""One model on one needle task through lm-eval, by length and depth, as one dict; and the heat map of such results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..data.niah import answer_tokens, find_format, needle_samples
from ..data.tasks import DEPTHS, LENGTHS, TASKS
from .common import check_place, described, device_name, load_model, read_tokenizer, versions
from .run import score_documents

__all__ = ["evaluate_niah", "heat_map", "save_results"]


def evaluate_niah(
    model,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 10,
    *,
    task: str = "niah_single_2",
    tokenizer=None,
    name: str | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    training_length: int | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, dict | None], None] | None = None,
    **difficulty,
) -> dict:
    """Score one model on one needle task with lm-eval, one length at a time, greedily, generating no more than a value needs.

    Args:
        model: a folder, a hub name, a transformers model, or an lm-eval `LM`.
        lengths: tokens of prompt and answer together.
        depths: shares of the haystack before the needle, 0 to 1.
        samples: documents for every length and depth; the same seed gives the same documents whatever the grid.
        task: one of the needle tasks that ask for one value.
        tokenizer: an object, folder or name; the model's own folder if None, or memzoo's tokenizer for a model given as an object.
        name: what to call the model in tables; the folder's name if None.
        batch_size: prompts at a time, padded on the left.
        dtype, device: how a model given by name is loaded.
        training_length: tokens the model was trained at, to be marked; the config's `training_length` if None.
        progress: called with (length, None) before a length and (length, its row) after it.
        difficulty: `value_digits` and `key_words` of `make_sample`; never the default in a published score.

    Returns:
        A dict that JSON can hold: name, path, task, parameters, config, training_length, settings, versions, accuracy,
        lengths (rows with length, accuracy, correct, count, seconds), cells (the same with depth) and samples (every answer).

    Raises:
        ValueError: no model or tokenizer there, an unknown task, a depth outside 0 to 1, or a length too short, in one line.
    """
    if find_format(task).answers > 1:
        raise ValueError(f"{task} asks for several needles, which have no one depth; scripts/evaluate.py scores it")
    path = None
    if isinstance(model, (str, Path)):
        # The cheap things first: a missing folder or tokenizer should not wait for weights and lm-eval.
        path = check_place(model)
        tokenizer = read_tokenizer(path if tokenizer is None else tokenizer, trust_remote_code)
        model = load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(tokenizer, trust_remote_code)
    started = time.perf_counter()
    settings = {"samples": samples, "seed": seed, "batch_size": batch_size, **difficulty}
    lengths, depths = sorted(set(map(int, lengths))), sorted(set(map(float, depths)))
    documents = {}
    for length in lengths[:1]:  # refuses bad arguments before lm-eval is imported
        documents[length] = list(needle_samples(task, tokenizer, [length], depths, samples, seed, **difficulty))
    lm, network = _as_lm(model, tokenizer, batch_size)
    config = getattr(network, "config", None)

    rows, cells, answers = [], [], []
    for length in lengths:
        if progress:
            progress(length, None)
        if length not in documents:
            documents[length] = list(needle_samples(task, tokenizer, [length], depths, samples, seed, **difficulty))
        begun = time.perf_counter()
        scored = _run_lm_eval(lm, task, documents.pop(length), tokenizer)
        row = {"length": length, **_accuracy(scored), "seconds": round(time.perf_counter() - begun, 3)}
        rows.append(row)
        cells += [{"length": length, "depth": d, **_accuracy([s for s in scored if s["depth"] == d])} for d in depths]
        answers += scored
        if progress:
            progress(length, row)

    known = getattr(config, "training_length", None) if training_length is None else training_length
    return {
        "name": name or (Path(path).name if path else getattr(config, "model_type", None) or type(model).__name__),
        "path": path,
        "task": task,
        "parameters": sum(p.numel() for p in network.parameters()) if network is not None else None,
        "training_length": known,
        "config": described(config),
        "settings": settings,
        "device": device_name(network),
        "dtype": str(network.dtype).removeprefix("torch.") if network is not None else None,
        "versions": versions(),
        "accuracy": _accuracy(answers)["accuracy"],
        "lengths": rows,
        "cells": cells,
        "samples": answers,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _as_lm(model, tokenizer, batch_size: int):
    """The model as an lm-eval LM, and the network in it (None for an LM that has none)."""
    from lm_eval.api.model import LM

    if isinstance(model, LM):
        return model, getattr(model, "model", None)
    from .reader import MemoryLM

    return MemoryLM(model, tokenizer, batch_size), model


def _run_lm_eval(lm, task: str, documents: list[dict], tokenizer) -> list[dict]:
    """Every document with the model's answer to it and its score."""
    cap = max(answer_tokens(document, tokenizer) for document in documents)
    scored = score_documents(lm, TASKS[task], documents, cap=cap)
    if scored is None:
        raise RuntimeError("evaluate_niah runs on one process; start it without a distributed launcher")
    return [
        {
            **{key: document[key] for key in ("length", "depth", "tokens", "key", "value")},
            "answer": sample["answer"],
            "score": sample["score"],
        }
        for document, sample in zip(documents, scored)
    ]


def _accuracy(scored: list[dict]) -> dict:
    correct = sum(s["score"] for s in scored)
    return {"accuracy": round(correct / len(scored), 6), "correct": int(correct), "count": len(scored)}


def save_results(results: dict | Sequence[dict], path: str | Path) -> None:
    """Write results as JSON; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(path)


def heat_map(results: dict | Sequence[dict], path: str | Path) -> None:
    """Draw accuracy by depth and length, one panel a result, as a PNG; a dashed line marks the end of the training length.

    Args:
        results: what `evaluate_niah` returned, one or several.
        path: the PNG.

    Raises:
        ValueError: no results.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    from ..report.style import HEAT, ink_on

    results = [results] if isinstance(results, dict) else list(results)
    if not results:
        raise ValueError("heat_map: there are no results to draw")
    widest, deepest = max(len(r["lengths"]) for r in results), max(len({c["depth"] for c in r["cells"]}) for r in results)
    columns = min(len(results), 2 if widest <= 8 else 1)
    rows = -(-len(results) // columns)
    colours = LinearSegmentedColormap.from_list("memzoo", HEAT)
    width, height = max(0.72 * widest + 1.5, 4.2), max(0.5 * deepest + 1.7, 3.0)
    figure = Figure(figsize=(columns * width + 1.0, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(results) :]:
        panel.set_axis_off()
    for panel, result in zip(panels, results):
        lengths, depths = sorted({c["length"] for c in result["cells"]}), sorted({c["depth"] for c in result["cells"]})
        accuracy = {(c["depth"], c["length"]): c["accuracy"] for c in result["cells"]}
        grid = [[accuracy.get((d, n), float("nan")) for n in lengths] for d in depths]
        image = panel.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if value == value:
                    shown, ink = f"{value:.2f}".replace("1.00", "1.0"), ink_on(colours(float(value))[:3])
                    panel.text(j, i, shown, ha="center", va="center", fontsize=8, color=ink)
        panel.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
        panel.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        panel.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
        panel.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
        panel.grid(which="minor", color="white", linewidth=1.5)
        panel.tick_params(which="both", length=0)
        for side in panel.spines.values():
            side.set_visible(False)
        panel.set_xlabel("length (tokens)")
        panel.set_ylabel("depth of the needle")
        trained = result.get("training_length")
        inside = sum(n <= trained for n in lengths) if trained else 0
        if inside:
            panel.axvline(inside - 0.5, color="#222222", linestyle=(0, (4, 3)), linewidth=1.4)
        parameters = f", {_short_count(result['parameters'])} parameters" if result.get("parameters") else ""
        note = f", trained at {_short(trained)} (dashed)" if inside else ""
        panel.set_title(f"{result['name']}{parameters}\n{result['task']}: {result['accuracy']:.2f}{note}", fontsize=10, loc="left")
    figure.colorbar(image, ax=list(panels[: len(results)]), label="accuracy", shrink=0.9, pad=0.02)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, format="png")


def _short(tokens: int) -> str:
    for unit, size in (("M", 1024**2), ("k", 1024)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def _short_count(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
