"""Checkpoints that a kill in mid-save cannot spoil: written under a temporary name, listed in a manifest, renamed when whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .errors import BadInput

MANIFEST = "manifest.json"
STATE = "state.json"


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first. Temporary folders do not count."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in (run / "checkpoints").glob("step-*")]
    return sorted(int(match[1]) for match in found if match)


def save(accelerator: Accelerator, run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write model, optimizer, random states and `state` as the checkpoint of `step`; then drop all but the `keep` newest."""
    target = folder(run, step)
    temporary = target.with_name("." + target.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        _seal(temporary)
        if target.exists():  # only after going on from an older checkpoint than this one
            shutil.rmtree(target)
        os.replace(temporary, target)
        _flush(target.parent)
        for old in steps(run)[:-keep]:
            if old != step:
                shutil.rmtree(folder(run, old))
    accelerator.wait_for_everyone()
    return target


def choose(run: Path, wanted: str) -> int:
    """The step to go on from, `wanted` being "latest" or a number, once its files are known to be whole; 0 if there is none."""
    present = steps(run)
    if wanted == "latest":
        if not present:
            return 0
        step = present[-1]
    elif not wanted.isdigit() or int(wanted) not in present:
        raise BadInput(f"--resume {wanted}: {run} has no such checkpoint; it has {', '.join(map(str, present)) or 'none'}")
    else:
        step = int(wanted)
    fault = find_fault(folder(run, step))
    if fault:
        whole = next((s for s in reversed(present) if s < step and not find_fault(folder(run, s))), None)
        advice = "no older checkpoint is whole" if whole is None else f"step {whole} is whole: --resume {whole}"
        raise BadInput(f"checkpoint {folder(run, step)} is broken: {fault}; {advice}")
    return step


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None if every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or cannot be read"
    for name, (size, digest) in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, needs {size}"
        if _digest(path) != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def read_state(run: Path, step: int, now: dict[str, Any]) -> dict[str, Any]:
    """The state kept with a checkpoint, if it was written with as many processes and examples as there are `now`."""
    state = json.loads((folder(run, step) / STATE).read_text())
    for name, what in (("processes", "processes"), ("examples", "training sequences")):
        if state[name] != now[name]:
            raise BadInput(f"checkpoint {folder(run, step)}: written with {state[name]:,} {what}, now there are {now[name]:,}")
    return state


def load(accelerator: Accelerator, run: Path, step: int) -> None:
    """Put model, optimizer and random states back as they were after `step`."""
    accelerator.load_state(str(folder(run, step)))


def _seal(checkpoint: Path) -> None:
    """List every file with its size and SHA-256, and have the disk take all of it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(checkpoint)): (path.stat().st_size, _digest(path)) for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, checkpoint / MANIFEST, checkpoint]:
        _flush(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
