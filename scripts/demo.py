"""The demo: trains a tiny model of each architecture on needles in real prose, scores all with lm-eval, shows table and heat map.

Run it with `bash scripts/demo.sh`, which makes the environment first. Each file in scripts/configs/demo is one model's training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("TQDM_DELAY", "3600")  # lm-eval's own bars stay away; read when tqdm is imported

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "scripts" / "configs" / "demo"
DEMO = ("sdnc-link", "linear-transformer-delta", "titans-mac", "mc-linear-gated")  # one architecture of each family
LENGTHS = (1, 2, 4, 8)  # times the training length
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
GOAL = 0.95  # accuracy at the training length

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=140)  # a log file has no width; the table needs this much


class Training:
    """One run of scripts/train.py in a process of its own, followed through the log it writes."""

    def __init__(self, name: str, folder: Path, threads: int):
        self.name, self.folder, self.threads = name, folder, threads
        self.process: subprocess.Popen | None = None
        self.began = self.seconds = 0.0

    def start(self) -> None:
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
        accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        train = [str(ROOT / "scripts" / "train.py"), "--config", str(CONFIGS / f"{self.name}.yaml")]
        train += ["--output", str(self.folder), "--overwrite"]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / "log.jsonl").unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with self.printed.open("w") as out:
            self.process = subprocess.Popen([*accelerate, *train], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        self.began = time.perf_counter()

    @property
    def printed(self) -> Path:
        """The file of what the process says."""
        return self.folder.with_suffix(".log")

    def finished(self) -> bool:
        """Whether it is done; RuntimeError with the end of what it said if it failed."""
        if self.process is None or self.process.poll() is None:
            return False
        self.seconds = self.seconds or time.perf_counter() - self.began
        if self.process.returncode:
            end = "\n".join(self.printed.read_text().splitlines()[-12:])
            raise RuntimeError(f"training {self.name} failed ({self.printed}):\n{end}")
        return True

    def progress(self) -> dict:
        """The last line of its log: step, loss, ..."""
        try:
            lines = (self.folder / "log.jsonl").read_text().splitlines()
        except OSError:
            return {}
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return next((row for row in reversed(rows) if "loss" in row), {})


def train_all(trainings: list[Training], steps: dict[str, int], jobs: int) -> None:
    """Run them, `jobs` at a time, and show how far each is: bars on a terminal, else a line now and then."""
    waiting, running = list(trainings), []
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.fields[shown]:<24}"), TimeElapsedColumn())
    spoke = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {t.name: bars.add_task(f"train {t.name}", total=steps[t.name], shown="", start=False) for t in trainings}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(waiting.pop(0))
                    running[-1].start()
                    bars.start_task(tasks[running[-1].name])
                time.sleep(0.5)
                speak = not console.is_terminal and time.perf_counter() - spoke > 10
                for training in list(running):
                    done, row = training.finished(), training.progress()
                    shown = f"step {row['step']} loss {row['loss']:.3f}" if row else "starting"
                    bars.update(tasks[training.name], completed=row.get("step", 0), shown=shown)
                    if speak or (done and not console.is_terminal):
                        console.print(
                            f"train {training.name}: {shown} of {steps[training.name]}, {clock(training)}", soft_wrap=True
                        )
                        spoke = time.perf_counter()
                    if done:
                        running.remove(training)
                        bars.stop_task(tasks[training.name])
        finally:
            for training in running:
                training.process.terminate()


def clock(training: Training) -> str:
    seconds = int(training.seconds or time.perf_counter() - training.began)
    return f"{seconds // 60}:{seconds % 60:02d}"


def score_all(trainings: list[Training], settings: dict[str, dict], samples: int) -> list[dict]:
    """Score every model in this process, so that lm-eval is imported once; results as evaluate_niah returns them, and state bytes."""
    from memzoo.evaluation import evaluate_niah, load_model, quiet

    quiet()
    results = []
    for training in trainings:
        length = settings[training.name]["length"]
        lengths = [int(length * times) for times in LENGTHS]
        difficulty = {k: v for k, v in settings[training.name]["needles"].items() if k in ("task", "value_digits", "key_words")}
        model = load_model(training.folder / "final")
        with console.status(f"score {training.name}") if console.is_terminal else nullcontext():
            result = evaluate_niah(
                model,
                lengths,
                DEPTHS,
                samples,
                tokenizer=str(training.folder / "final"),
                name=training.name,
                batch_size=samples * len(DEPTHS),
                training_length=length,
                **difficulty,
            )
        result["path"] = os.path.relpath(training.folder / "final", ROOT)
        result["state_bytes"] = {str(n): model.state_bytes(n) for n in lengths}
        result["training_seconds"] = round(training.seconds, 1)
        results.append(result)
        console.print(f"score {training.name}: {result['seconds']:.0f} s", soft_wrap=True)
    return results


def at_training_length(result: dict) -> float:
    return next(row["accuracy"] for row in result["lengths"] if row["length"] == result["training_length"])


def table(results: list[dict]) -> Table:
    """One line a model: accuracy by length, size, state and seconds."""
    lengths = sorted({row["length"] for result in results for row in result["lengths"]})
    grid = Table(title=f"Needle in a haystack: accuracy by length in tokens (trained at {results[0]['training_length']})")
    grid.add_column("architecture")
    for heading in ("parameters", *(f"{n:,}" for n in lengths), "state bytes", "train s", "score s"):
        grid.add_column(heading, justify="right")
    for result in results:
        accuracy = {row["length"]: f"{row['accuracy']:.2f}" for row in result["lengths"]}
        state = list(result["state_bytes"].values())
        held = f"{state[0]:,}" if state[0] == state[-1] else f"{(state[-1] - state[0]) // (lengths[-1] - lengths[0]):,} a token"
        cells = [f"{result['parameters']:,}", *(accuracy.get(n, "-") for n in lengths), held]
        grid.add_row(result["name"], *cells, f"{result['training_seconds']:.0f}", f"{result['seconds']:.0f}")
    return grid


def parse(argv: list[str] | None) -> argparse.Namespace:
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every architecture: " + ", ".join(known))
    which.add_argument("--only", nargs="+", choices=known, metavar="NAME", help="these architectures")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "demo", help="folder of results.json and heatmap.png")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demo", help="folder of the training runs")
    parser.add_argument("--samples", type=int, default=8, help="documents for every length and depth [8]")
    options = parser.parse_args(argv)
    if options.samples < 1:
        parser.error(f"--samples is {options.samples}, needs at least 1")
    options.names = options.only or (known if options.all else list(DEMO))
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import yaml

    from memzoo.evaluation import heat_map, save_results

    began = time.perf_counter()
    settings = {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in options.names}
    # Models this small keep one core busy each: several at a time on a CPU, one after the other on a GPU.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = 1 if torch.cuda.is_available() else max(1, min(cores, len(options.names), 4))
    trainings = [Training(name, options.runs / name, max(1, cores // jobs)) for name in options.names]
    try:
        train_all(trainings, {name: settings[name]["steps"] for name in options.names}, jobs)
        results = score_all(trainings, settings, options.samples)
    except (RuntimeError, ValueError, OSError) as error:
        console.print(f"demo: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    save_results(results, options.out / "results.json")
    heat_map(results, options.out / "heatmap.png")
    console.print(table(results))
    console.print(f"{options.out}: results.json, heatmap.png; models in {options.runs}/*/final", soft_wrap=True)
    console.print(f"{time.perf_counter() - began:.0f} seconds in all")
    low = [result["name"] for result in results if at_training_length(result) < GOAL]
    if low:
        console.print(f"below {GOAL} at the training length: {', '.join(low)}", style="red")
    return int(bool(low))


if __name__ == "__main__":
    sys.exit(main())
