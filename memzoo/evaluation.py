"""Scores of language models on needles in a haystack through lm-eval, by length and depth, and the heat map of them.

`import memzoo.evaluation` is cheap; lm-eval and matplotlib are imported when something runs.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .data.niah import FORMATS, answer_tokens, find_format, needle_samples, score
from .data.text import load_tokenizer

__all__ = ["SUITES", "evaluate_niah", "heat_map", "load_model", "parse_length", "quiet", "save_results"]

SUITES = {"niah": ("niah_single_2",), "niah_all": tuple(FORMATS)} | {task: (task,) for task in FORMATS}
LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def parse_length(text: str) -> int:
    """ "512", "4k" (4,096) or "1m" (1,048,576) as a number of tokens; ValueError for anything else or less than 1."""
    scale = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text if scale == 1 else text[:-1]
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise ValueError(f"length {text!r} is not a number of tokens such as 512 or 4k")
    return int(digits) * scale


def load_model(path: str | Path, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False):
    """A causal language model in evaluation mode from a folder or a hub name.

    Raises:
        ValueError: nothing there, or not a model, in one line.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import memzoo  # noqa: F401  (after this the Auto classes know every memzoo model)

    name = _check_place(path)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown, needs auto, float32, bfloat16 or float16")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"no model could be loaded from {name}: {lines[0]}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def _check_place(path: str | Path) -> str:
    """The path or hub name as text; ValueError if it names a folder that is not there or holds no model."""
    name, folder = str(path), Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{name} is not a model: it has no config.json")
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"there is no model at {name}: no such folder")
    return name


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
        task: "niah_single_1", "niah_single_2" or "niah_single_3".
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
    find_format(task)
    path = None
    if isinstance(model, (str, Path)):
        # The cheap things first: a missing folder or tokenizer should not wait for weights and lm-eval.
        path = _check_place(model)
        tokenizer = _tokenizer(path if tokenizer is None else tokenizer, trust_remote_code)
        model = load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = _tokenizer(tokenizer, trust_remote_code)
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
        scored = _run_lm_eval(lm, task, documents.pop(length), tokenizer, length, seed)
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
        "config": _described(config),
        "settings": settings,
        "device": _device_name(network),
        "dtype": str(network.dtype).removeprefix("torch.") if network is not None else None,
        "versions": _versions(),
        "accuracy": _accuracy(answers)["accuracy"],
        "lengths": rows,
        "cells": cells,
        "samples": answers,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _described(config) -> dict | None:
    """A configuration as JSON holds it, without the path it was loaded from: `path` says that."""
    if config is None:
        return None
    fields = json.loads(config.to_json_string(use_diff=False))
    fields.pop("_name_or_path", None)
    return fields


def _tokenizer(tokenizer, trust_remote_code: bool):
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        return load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    return tokenizer


def _as_lm(model, tokenizer, batch_size: int):
    """The model as an lm-eval LM, and the network in it (None for an LM that has none)."""
    from lm_eval.api.model import LM

    if isinstance(model, LM):
        return model, getattr(model, "model", None)
    from lm_eval.models.huggingface import HFLM

    model.eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max(LENGTHS))
    lm.generate_until = partial(lm.generate_until, disable_tqdm=True)
    return lm, model


def _run_lm_eval(lm, task: str, documents: list[dict], tokenizer, length: int, seed: int) -> list[dict]:
    """Every document with the model's answer to it and its score."""
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    cap = max(answer_tokens(document, tokenizer) for document in documents)
    needle_task = ConfigurableTask(
        config={
            "task": f"memzoo_{task}",
            "dataset_path": "",
            "dataset_name": "",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{outputs}}",
            "gen_prefix": "{{gen_prefix}}",
            "target_delimiter": " ",
            "process_results": lambda document, results: {"acc": score(document, results[0])},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"do_sample": False, "max_gen_toks": cap, "until": []},
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
    )
    if hasattr(lm, "_max_length"):
        lm._max_length = length + cap  # a prompt must never be cut; a model that cannot take it should say so
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    manager = TaskManager(include_defaults=False)  # indexing lm-eval's own tasks takes seconds and none is needed
    outcome = simple_evaluate(model=lm, tasks=[needle_task], task_manager=manager, bootstrap_iters=0, log_samples=True, **seeds)
    if outcome is None:
        raise RuntimeError("evaluate_niah runs on one process; start it without a distributed launcher")
    return [
        {
            **{key: sample["doc"][key] for key in ("length", "depth", "tokens", "key", "value")},
            "answer": sample["filtered_resps"][0],
            "score": sample["acc"],
        }
        for sample in outcome["samples"][f"memzoo_{task}"]
    ]


def quiet() -> None:
    """Turn off what lm-eval, transformers and datasets say while they work, errors aside, for command lines with a bar of their own."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _accuracy(scored: list[dict]) -> dict:
    correct = sum(s["score"] for s in scored)
    return {"accuracy": round(correct / len(scored), 6), "correct": int(correct), "count": len(scored)}


def _device_name(network) -> str:
    import torch

    if network is not None and network.device.type == "cuda":
        return torch.cuda.get_device_name(network.device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("memzoo", "torch", "triton", "transformers", "tokenizers", "datasets", "lm-eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


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

    results = [results] if isinstance(results, dict) else list(results)
    if not results:
        raise ValueError("heat_map: there are no results to draw")
    widest, deepest = max(len(r["lengths"]) for r in results), max(len({c["depth"] for c in r["cells"]}) for r in results)
    columns = min(len(results), 2 if widest <= 8 else 1)
    rows = -(-len(results) // columns)
    colours = LinearSegmentedColormap.from_list("memzoo", ["#8c2d3a", "#e3a15f", "#f4ecc8", "#8fbf9b", "#1f6f5c"])
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
                    ink = "white" if value < 0.15 or value > 0.85 else "#222222"
                    panel.text(j, i, f"{value:.2f}".replace("1.00", "1.0"), ha="center", va="center", fontsize=8, color=ink)
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
