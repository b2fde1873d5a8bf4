"""The results store: a folder with results.jsonl, one line a finished cell, and samples/, what was asked and answered in each."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["FORMAT", "Store", "mean_interval", "wilson"]

FORMAT = 1
Z = 1.959963984540054  # 95% of a normal distribution lie within so many standard deviations


class Store:
    """Finished cells in `folder`, which is made when the first is appended.

    A line that a crash cut off is passed over, and the cell run again. A cell's samples are written before its line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, results need a folder")

    @property
    def path(self) -> Path:
        return self.folder / "results.jsonl"

    def records(self) -> list[dict]:
        """Every finished cell, in the order they were finished."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("format") == FORMAT and "id" in record:
                found.append(record)
        return found

    def append(self, record: dict, samples: Sequence[dict]) -> dict:
        """Write a cell; the record as it was written, with its format and the file of its samples."""
        record = {"format": FORMAT, **record, "samples": f"samples/{record['id']}.jsonl"}
        line = json.dumps(record, allow_nan=False) + "\n"
        place = self.folder / record["samples"]
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(".part")
        part.write_text("".join(json.dumps(finite(sample)) + "\n" for sample in samples), encoding="utf-8")
        part.replace(place)
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the rest of a line that a crash cut off
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        return record


def finite(value):
    """The same with None for numbers that JSON has none for, such as the loss of a model that falls apart."""
    if isinstance(value, dict):
        return {key: finite(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def identity(**what) -> str:
    """16 digits that are the same for the same cell and for no other."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def wilson(correct: float, count: int) -> list[float]:
    """The 95% interval of a share, `correct` of `count` (Wilson 1927).

    `correct` may be a sum of scores between 0 and 1 (partial credit): such scores spread no more than coins of the same mean, so the
    interval is never too narrow.
    """
    if count < 1 or not 0.0 <= correct <= count:
        raise ValueError(f"wilson: {correct} of {count} is no share")
    share, weight = correct / count, Z * Z / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    # At 0 and 1 the interval ends there exactly; rounding would leave it a hair off.
    return [0.0 if correct == 0 else max(middle - half, 0.0), 1.0 if correct == count else min(middle + half, 1.0)]


def mean_interval(sums: Sequence[float], sizes: Sequence[float]) -> list[float] | None:
    """The 95% interval of sum(sums) / sum(sizes) from its spread over documents (a ratio estimator, Student's t); None for one document."""
    count, size = len(sums), sum(sizes)
    if count < 2:
        return None
    from scipy.stats import t

    value = sum(sums) / size
    spread = sum((a - value * b) ** 2 for a, b in zip(sums, sizes)) * count / (count - 1)
    half = float(t.ppf(0.975, count - 1)) * math.sqrt(spread) / size
    return [value - half, value + half]
