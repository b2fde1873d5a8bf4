"""Scores models on recall and long contexts; every finished cell is kept, and a second run goes on where the first one stopped.

python scripts/evaluate.py runs/linear runs/titans --suite niah,mqar,ppl_by_length --lengths 512,1k,4k,32k --limit 50 --out results
accelerate launch --num_processes 4 scripts/evaluate.py runs/titans --suite niah --lengths 32k    # documents are split among GPUs

Suites: {suites}.
With a network, lm-eval's own: {papers}.
The folder gets results.jsonl (one line a model, task and length), samples/ (what was asked and answered) and, for needles, heatmap.png;
`python scripts/report.py results` makes a page of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TQDM_DELAY", "3600")  # lm-eval's own bars stay away; read when tqdm is imported


def reader(kind, several: bool = True):
    """`kind` for argparse, on one text or on parts with commas between them, with the message of its ValueError kept."""

    def read(text: str):
        try:
            return [kind(part.strip()) for part in text.split(",")] if several else kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"depth {text!r} is not a share from 0 to 1")
    return value


def suite(text: str) -> str:
    from memzoo.data.tasks import SUITES, TASKS
    from memzoo.evaluation import PAPERS

    if text not in SUITES and text not in TASKS and text not in PAPERS and text != "all":
        raise ValueError(
            f"unknown suite or task {text!r}, needs all, {', '.join(SUITES)}, a task of theirs, or {', '.join(PAPERS)}"
        )
    return text


def setting(text: str) -> tuple[str, object]:
    import ast

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"setting {text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(f"setting {text!r}: {value!r} is no number, True or False") from None


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from memzoo.data.tasks import DEPTHS, SUITES
    from memzoo.evaluation import PAPERS, parse_length

    said = __doc__.format(suites=", ".join(SUITES), papers=", ".join(PAPERS))
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folder or hub name of a causal language model with its tokenizer"
    )
    parser.add_argument(
        "--suite", type=reader(suite), default=["niah"], help="suites or tasks, with commas between them; all: every offline one"
    )
    parser.add_argument("--lengths", type=reader(parse_length), help="tokens, such as 512,1k,64k; each task's own by default")
    parser.add_argument("--limit", type=positive, help="documents for every task and length (default: 50; lm-eval's own: all)")
    parser.add_argument("--depths", type=reader(share), default=list(DEPTHS), help="shares of the haystack before the needle")
    parser.add_argument(
        "--samples", type=positive, help="documents for every length and depth: a limit of so many times the depths"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results (default: results)")
    parser.add_argument("--tokenizer", help="folder or name; the model's own by default")
    parser.add_argument(
        "--training-length",
        type=reader(parse_length, several=False),
        help="marked in pictures; the config's training_length by default",
    )
    parser.add_argument(
        "--cache-segments",
        type=reader(parse_length, several=False),
        metavar="TOKENS",
        help="cache the memories of a model trained without a cache after every so many tokens",
    )
    parser.add_argument(
        "--cache-aggregation",
        choices=("average", "residual", "gated", "sparse"),
        default="average",
        help="how they are read: their mean, their sum, or by gates from key energies (default: average)",
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="prompts at a time, in each process")
    parser.add_argument("--chunk", type=reader(parse_length, several=False), default=2048, help="tokens of a prompt read at a time")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; a GPU where there is one by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-length", type=reader(parse_length, several=False), help="for lm-eval's own tasks: where it cuts prompts"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that a model's folder brings with it")
    easier = parser.add_argument_group("difficulty", "easier than published, for tiny models; scores are not comparable")
    easier.add_argument("--value-digits", type=int, help="digits of a needle's value (RULER: 7)")
    easier.add_argument("--key-words", type=int, choices=(1, 2), help="words of a needle's key (RULER: 2)")
    easier.add_argument(
        "--set",
        type=reader(setting, several=False),
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="pairs=8, words=64, hops=1",
    )
    return parser.parse_args(arguments)


def processes(device: str | None):
    """An Accelerator where a launcher started several processes, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    import torch
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    from rich.console import Console

    from memzoo.evaluation import PAPERS, SUITES, Store, evaluate, evaluate_papers, quiet

    accelerator = processes(args.device)
    first = accelerator is None or accelerator.is_main_process
    console = Console(stderr=True, quiet=not first)
    quiet()
    depths = sorted(set(args.depths))
    limit = args.samples * len(depths) if args.samples else args.limit
    easier = {"value_digits": args.value_digits, "key_words": args.key_words}
    difficulty = {key: value for key, value in easier.items() if value is not None} | dict(args.set)
    names = [name for given in args.suite for name in (SUITES if given == "all" else [given])]
    own, papers = [name for name in names if name not in PAPERS], [name for name in names if name in PAPERS]
    shared = {
        "lengths": args.lengths,
        "seed": args.seed,
        "tokenizer": args.tokenizer,
        "batch_size": args.batch_size,
        "chunk": args.chunk,
        "dtype": args.dtype,
        "device": args.device,
        "training_length": args.training_length,
        "trust_remote_code": args.trust_remote_code,
        "accelerator": accelerator,
    }
    if args.cache_segments and papers:
        console.print("evaluate: --cache-segments goes with the offline suites only", style="red", markup=False, highlight=False)
        return 2
    records: list[dict] = []
    try:
        store = Store(args.out)
        if own:
            with shown(console) as progress:
                records += evaluate(
                    args.models, own, store, limit=limit or 50, depths=depths, difficulty=difficulty, progress=progress,
                    cache_segments=args.cache_segments, cache_aggregation=args.cache_aggregation, **shared,
                )  # fmt: skip
        if papers:
            with shown(console) as progress:
                records += evaluate_papers(
                    args.models, papers, store, limit=limit, max_length=args.max_length, progress=progress, **shared
                )
    except (ValueError, OSError) as error:
        console.print(f"evaluate: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"stopped; finished cells are in {args.out}, and the same command goes on", highlight=False, soft_wrap=True)
        return 130
    if first:
        Console().print(table(records))
        written = [str(store.path)]
        if drawn(records, args.out / "heatmap.png"):
            written.append(str(args.out / "heatmap.png"))
        console.print(", ".join(written), highlight=False, soft_wrap=True)
    return 0


def shown(console):
    """A Progress of `evaluate` on a console: a bar with the time left on a terminal, else a line a finished cell."""
    from rich import progress as rich_progress

    from memzoo.evaluation import Progress

    class Shown(Progress):
        def __init__(self) -> None:
            columns = (
                rich_progress.SpinnerColumn(),
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(bar_width=24),
                rich_progress.TaskProgressColumn(),
                rich_progress.TimeRemainingColumn(),
            )
            self.bar = rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
            self.all, self.number, self.cells = self.bar.add_task("loading", total=None), 0, 0
            self.total = self.done = 0.0
            self.begun = time.perf_counter()

        def __enter__(self):
            self.bar.start()
            return self

        def __exit__(self, *_) -> None:
            self.bar.stop()

        def plan(self, work: int, cells: int, finished: int) -> None:
            self.bar.update(self.all, total=max(work, 1))
            self.total = work
            self.cells, self.number = cells, finished
            if finished:
                console.print(f"{finished} of {cells} cells are finished", highlight=False)

        def cell(self, model: str, task: str, length: int) -> None:
            self.number += 1
            at = f" at {length:,} tokens" if length else ""
            self.label = f"{model} {task}{at}"
            self.bar.update(self.all, description=f"{self.number}/{self.cells} {self.label}")

        def work(self, done: float) -> None:
            self.done += done
            self.bar.update(self.all, advance=done)

        def record(self, record: dict) -> None:
            if not console.is_terminal:
                score = f"{record['metric']} {figure(record)} of {record['count']}"
                said = f"{self.number}/{self.cells} {self.label}: {score}, {record['seconds']:.0f} s"
                left = (time.perf_counter() - self.begun) * (self.total - self.done) / max(self.done, 1)
                if left >= 1:
                    said += f", about {left / 60:.0f} min left" if left >= 60 else f", about {left:.0f} s left"
                console.print(said, highlight=False, soft_wrap=True)

        def note(self, text: str) -> None:
            console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    return Shown()


def figure(record: dict, between: str = " (", after: str = ")") -> str:
    """A score with its interval; a loss that is no number is said to be that."""
    if record["value"] is None:
        return "not finite"
    low, high = record["interval"] or (None, None)
    return f"{record['value']:.2f}" + (f"{between}{low:.2f}-{high:.2f}{after}" if low is not None else "")


def table(records: list[dict]):
    """One line a model and task, one column a length: the score, and its 95% interval below."""
    from rich.table import Table

    lengths = sorted({record["length"] for record in records})
    grid = Table(title="score by length (tokens), 95% interval below; n: documents a cell", show_lines=True)
    grid.add_column("model", overflow="fold")
    grid.add_column("task", overflow="fold")
    grid.add_column("metric", overflow="fold")
    grid.add_column("n", justify="right")
    for length in lengths:
        grid.add_column(f"{length:,}" if length else "own", justify="right", no_wrap=True)
    rows: dict[tuple, dict[int, dict]] = {}
    for record in records:
        model = record["model"]
        key = (model["name"], model["path"], record["task"], record["metric"], str(record["settings"]["difficulty"]))
        rows.setdefault(key, {})[record["length"]] = record
    for (name, _, task, metric, _), by_length in rows.items():
        cells = [figure(by_length[length], "\n", "") if length in by_length else "-" for length in lengths]
        counts = {record["count"] for record in by_length.values()}
        grid.add_row(name, task, metric.replace("_", " "), "/".join(map(str, sorted(counts))), *cells)
    return grid


def drawn(records: list[dict], path: Path) -> bool:
    """Draw the needles' scores by depth and length, one panel a model and task; whether there were any."""
    from memzoo.evaluation import heat_map

    panels: dict[tuple, dict] = {}
    for record in records:
        parts = [part for part in record["cells"] if "depth" in part]
        if not parts:
            continue
        model = record["model"]
        panel = panels.setdefault(
            (model["name"], model["path"], record["task"]),
            {
                "name": model["name"],
                "task": record["task"],
                "parameters": model["parameters"],
                "training_length": model["training_length"],
                "lengths": [],
                "cells": [],
            },
        )
        panel["lengths"].append({"length": record["length"], "accuracy": record["value"]})
        panel["cells"] += [{"length": record["length"], "depth": part["depth"], "accuracy": part["value"]} for part in parts]
    for panel in panels.values():
        panel["accuracy"] = sum(row["accuracy"] for row in panel["lengths"]) / len(panel["lengths"])
    if panels:
        heat_map(list(panels.values()), path)
    return bool(panels)


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # As in scripts/train.py: the destructor of a process group can hang.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
