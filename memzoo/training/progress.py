"""What a run shows and writes down: a progress bar (plain lines where there is no terminal), log.jsonl and trackers."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def quiet() -> None:
    """Keep what libraries say about every save and map off the screen; errors stay."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


class Reporter:
    """Shows progress and keeps the log; does nothing in processes other than the first."""

    def __init__(self, accelerator: Accelerator, log: Path, start: int, steps: int):
        self.accelerator, self.start, self.steps = accelerator, start, steps
        self.console = Console(quiet=not accelerator.is_main_process, highlight=False)
        self.log = log.open("a") if accelerator.is_main_process else None
        self.began = time.perf_counter()
        self.bar: Progress | None = None
        if self.console.is_terminal and accelerator.is_main_process:
            self.bar = Progress(
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=steps, completed=start, shown="")
            self.bar.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Write the values of a step to the log and the trackers, and show them."""
        self.accelerator.log({name: value for name, value in values.items() if isinstance(value, (int, float))}, step=step)
        if self.log is None:
            return
        self.log.write(json.dumps({"step": step, **values}) + "\n")
        self.log.flush()
        shown = "  ".join(f"{name} {values[key]:{form}}" for key, (name, form) in _SHOWN.items() if key in values)
        if "eval_loss" in values:
            self.say(f"step {step}/{self.steps}  {shown}")
        elif self.bar:
            self.bar.update(self.task, completed=step, shown=shown)
        else:
            self.say(f"step {step}/{self.steps}  {shown}  left {self._left(step)}")

    def _left(self, step: int) -> str:
        done = step - self.start
        seconds = (time.perf_counter() - self.began) / max(1, done) * (self.steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()
        if self.log:
            self.log.close()
        self.accelerator.end_training()


# What a line shows of a step, by which name, and how.
_SHOWN = {
    "loss": ("loss", ".4f"),
    "learning_rate": ("lr", ".1e"),
    "tokens_per_second": ("tok/s", ",.0f"),
    "eval_loss": ("eval loss", ".4f"),
    "eval_accuracy": ("accuracy", ".4f"),
}
