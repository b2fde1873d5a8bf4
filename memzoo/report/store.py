"""Reading the results store: JSON lines, one a finished cell (a model on a task at a length), as scripts/evaluate.py appends them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Suites as the report shows them, others after these.
ORDER = ("niah", "mqar", "ppl_by_length", "babi_long", "vt", "cwe", "fwe", "selective_copy", "copy", "denoise", "transfer")
SHARES = {"accuracy", "acc", "acc_norm", "exact_match", "f1", "score", "contains"}
RESULTS = "results.jsonl"
GRADIENT_FLOW = "gradient_flow.json"
FORMAT = 1

# What the settings hold that changes how a cell was run, not what was asked.
_HOW = {
    "batch_size",
    "chunk",
    "chunk_size",
    "device",
    "dtype",
    "limit",
    "samples",
    "processes",
    "num_processes",
    "tokenizer",
    "depths",
    "run",
    "max_length",
}


@dataclass
class Model:
    """One model as the report shows it: `label` is its name, made unique; `index` chooses colour and marker in every plot."""

    key: tuple[str, str]
    label: str
    index: int
    info: dict[str, Any] = field(repr=False)

    @property
    def training_length(self) -> int | None:
        return self.info.get("training_length")


@dataclass
class Task:
    """One task of a suite at one difficulty, and its cells by model and length."""

    suite: str
    name: str
    difficulty: dict[str, Any]
    metric: str
    higher_is_better: bool
    several: bool = False  # whether the store has this task at other difficulties too
    cells: dict[tuple[int, int], dict] = field(default_factory=dict, repr=False)  # by (model index, length)

    @property
    def title(self) -> str:
        return f"{self.name} ({self.asked or 'as published'})" if self.several else self.name

    @property
    def asked(self) -> str:
        """The difficulty in words; empty if it is the task's own."""
        return ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in self.difficulty.items())

    @property
    def share(self) -> bool:
        """Whether scores are shares from 0 to 1."""
        return self.metric in SHARES and all(0.0 <= cell["value"] <= 1.0 for cell in self.cells.values())

    @property
    def lengths(self) -> list[int]:
        """Lengths in tokens, ascending; 0 stands for documents as they come."""
        return sorted({length for _, length in self.cells})

    def of(self, model: Model) -> dict[int, dict]:
        """The model's cells by length, in order."""
        return {n: self.cells[model.index, n] for n in self.lengths if (model.index, n) in self.cells}


@dataclass
class Results:
    """Everything one report shows."""

    models: list[Model]
    tasks: list[Task]
    gradient_flow: list[dict]
    notes: list[str]
    cells: list[dict] = field(repr=False)

    @property
    def suites(self) -> dict[str, list[Task]]:
        found: dict[str, list[Task]] = {}
        for task in self.tasks:
            found.setdefault(task.suite, []).append(task)
        return found


def read_results(folder: str | Path) -> Results:
    """Every result under `folder`: its own results.jsonl, or those of the folders in it; and gradient_flow.json beside them.

    Lines that hold no result (one cut off by a crash, say) are left out and named in `notes`. Of two results for the same model, task,
    length and difficulty the one with more documents counts, then the later.

    Raises:
        ValueError: no such folder, or nothing in it that can be shown, in one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no results folder {folder}; scripts/evaluate.py --out {folder} makes one")
    stores = [folder / RESULTS] if (folder / RESULTS).is_file() else sorted(folder.rglob(RESULTS))
    flows = [folder / GRADIENT_FLOW] if (folder / GRADIENT_FLOW).is_file() else sorted(folder.rglob(GRADIENT_FLOW))
    if not stores and not flows:
        raise ValueError(f"{folder} holds no {RESULTS}; scripts/evaluate.py MODEL --out {folder} writes it")
    notes: list[str] = []
    cells: dict[str, dict] = {}
    for path in stores:
        for cell in _lines(path, notes):
            cells[str(cell["id"])] = cell  # the later one of the same name
    flow = [curves for path in flows if (curves := _flow(path, notes))]
    if not cells and not flow:
        said = f": {notes[0]}" if notes else ""
        where = stores[0] if stores else flows[0]
        raise ValueError(f"{where} holds no result to show{said}")
    models = _models(list(cells.values()))
    tasks, superseded = _tasks(list(cells.values()), models)
    if superseded:
        notes.append(f"{superseded} results not shown: the same cell was run again with more documents, or later")
    return Results(models, tasks, flow, notes, list(cells.values()))


def _lines(path: Path, notes: list[str]) -> list[dict]:
    found, bad = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            cell = json.loads(line)
            fault = _fault(cell)
        except ValueError:
            fault = "not JSON (cut off?)"
        if fault:
            bad.append((number, fault))
        else:
            found.append(cell)
    if bad:
        number, fault = bad[0]
        more = f", and {len(bad) - 1} more lines" if len(bad) > 1 else ""
        notes.append(f"{path}, line {number} left out: {fault}{more}")
    return found


def _fault(cell: Any) -> str | None:
    """Why a line cannot be shown, or None."""
    if not isinstance(cell, dict):
        return "not an object"
    if cell.get("format") != FORMAT:
        return f"format is {cell.get('format')!r}, this memzoo reads {FORMAT}"
    missing = [name for name in ("id", "model", "suite", "task", "length", "metric", "value") if name not in cell]
    if missing:
        return f"no {', '.join(missing)}"
    if not isinstance(cell["model"], dict) or "name" not in cell["model"]:
        return "model has no name"
    if cell["value"] is None:
        return f"{cell['model']['name']} on {cell['task']} at {cell['length']} tokens has a score that is no number"
    if not isinstance(cell["value"], (int, float)) or not math.isfinite(cell["value"]):
        return f"value is {cell['value']!r}"
    if not isinstance(cell["length"], int):
        return f"length is {cell['length']!r}"
    return None


def _flow(path: Path, notes: list[str]) -> dict | None:
    try:
        flow = json.loads(path.read_text(encoding="utf-8"))
        usable = [c for c in flow["curves"] if len(c["lags"]) == len(c["norms"]) > 0 and "name" in c and "when" in c]
    except (ValueError, KeyError, TypeError) as error:
        notes.append(f"{path} left out: {type(error).__name__}: {error}")
        return None
    return {**flow, "curves": usable} if usable else None


def _models(cells: list[dict]) -> list[Model]:
    """Models by name; two of one name that differ are told apart by their folder, or by their fingerprint."""
    infos: dict[tuple[str, str], dict] = {}
    for cell in cells:
        infos[cell["model"]["name"], str(cell["model"].get("fingerprint"))] = cell["model"]
    names = [name for name, _ in infos]
    labels = {}
    for key, info in infos.items():
        if names.count(key[0]) == 1:
            labels[key] = key[0]
            continue
        folders = [i.get("path") for k, i in infos.items() if k[0] == key[0]]
        distinct = info.get("path") and folders.count(info["path"]) == 1
        labels[key] = f"{key[0]} ({info['path'] if distinct else key[1][:6]})"
    ordered = sorted(infos, key=lambda key: labels[key])
    return [Model(key, labels[key], index, infos[key]) for index, key in enumerate(ordered)]


def _tasks(cells: list[dict], models: list[Model]) -> tuple[list[Task], int]:
    index = {model.key: model.index for model in models}
    tasks: dict[tuple, Task] = {}
    superseded = 0
    for cell in cells:
        difficulty = _difficulty(cell)
        key = (cell["suite"], cell["task"], cell["metric"], json.dumps(difficulty, sort_keys=True, default=str))
        task = tasks.get(key)
        if task is None:
            better = cell.get("higher_is_better", True)
            task = tasks[key] = Task(cell["suite"], cell["task"], difficulty, cell["metric"], better)
        place = (index[cell["model"]["name"], str(cell["model"].get("fingerprint"))], cell["length"])
        other = task.cells.get(place)
        superseded += other is not None
        if other is None or _weight(cell) >= _weight(other):
            task.cells[place] = cell
    for task in tasks.values():
        task.several = sum(t.name == task.name and t.suite == task.suite for t in tasks.values()) > 1
    order = {suite: number for number, suite in enumerate(ORDER)}
    ordered = sorted(tasks.values(), key=lambda t: (order.get(t.suite, len(order)), t.suite))  # within a suite as they were run
    return ordered, superseded


def _weight(cell: dict) -> tuple:
    return (cell.get("count") or 0, str(cell.get("date") or ""))


def _difficulty(cell: dict) -> dict:
    settings = cell.get("settings") or {}
    if isinstance(settings.get("difficulty"), dict):
        settings = settings["difficulty"]
    return {key: value for key, value in sorted(settings.items()) if key not in _HOW and value not in (None, {}, [])}


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
