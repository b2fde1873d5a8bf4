"""The output folder of a run: whose it is, and what may be done with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from . import checkpoint
from .errors import BadInput
from .settings import Settings, read_settings, write_settings

SETTINGS, LOG, FINAL = "settings.yaml", "log.jsonl", "final"


def inspect(settings: Settings) -> int:
    """Check the output folder before anything costly starts, and change nothing in it. Returns the step to go on from, or 0."""
    run = Path(settings.output)
    if run.exists() and not run.is_dir():
        raise BadInput(f"--output {run}: is not a folder")
    if not run.exists() or not any(run.iterdir()):
        return 0
    if not (run / SETTINGS).is_file():
        raise BadInput(f"--output {run}: is not empty and holds no run of memzoo ({SETTINGS} is missing); take another folder")
    if settings.overwrite:
        return 0
    if not settings.resume:
        raise BadInput(f"--output {run}: holds a run already; --resume goes on with it, --overwrite throws it away")
    before, now = read_settings(run / SETTINGS).identity(), settings.identity()
    differ = [f"{name} was {before[name]!r}, is {now[name]!r}" for name in now if before[name] != now[name]]
    if differ:
        raise BadInput(f"--output {run}: holds another run: {'; '.join(differ)}")
    return 0 if complete(settings) else checkpoint.choose(run, settings.resume)


def complete(settings: Settings) -> bool:
    """Whether the run to go on with has its final folder already, which is the last thing written."""
    return bool(settings.resume) and (Path(settings.output) / FINAL).is_dir()


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is done at this one."""
    return bool(every) and step % every == 0


def prepare(settings: Settings, start: int) -> None:
    """Make the folder ready: empty for a new run; for one that goes on, without what came after its checkpoint."""
    run = Path(settings.output)
    if not start:
        for name in (SETTINGS, LOG):
            (run / name).unlink(missing_ok=True)
        for name in ("checkpoints", "tracker", FINAL):
            shutil.rmtree(run / name, ignore_errors=True)
        run.mkdir(parents=True, exist_ok=True)
    else:
        for path in (run / "checkpoints").glob(".step-*.tmp"):
            shutil.rmtree(path)
        cut_log(run / LOG, start)
    write_settings(settings, run / SETTINGS)


def cut_log(path: Path, step: int) -> None:
    """Drop the log's lines of later steps than `step`, and a last line that a kill left unfinished."""
    kept = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
