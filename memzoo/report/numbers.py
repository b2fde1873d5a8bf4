"""Numbers as the report shows them: intervals of means, which score is the best beyond doubt, lengths, bytes and counts in short."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .store import SHARES

Interval = tuple[float, float] | None


def interval(cell: dict) -> Interval:
    """The cell's 95% interval, or None if the store has none."""
    found = cell.get("interval")
    if not isinstance(found, (list, tuple)) or len(found) != 2 or not all(isinstance(x, (int, float)) for x in found):
        return None
    low, high = found
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def mean(cells: Sequence[dict]) -> tuple[float, Interval]:
    """(mean of the cells' values, its interval): each side's distances added as standard errors are (MOVER, Zou and Donner 2008)."""
    values, spans = [c["value"] for c in cells], [interval(c) for c in cells]
    middle = sum(values) / len(values)
    if any(span is None for span in spans):
        return middle, None
    down = math.sqrt(sum((v - low) ** 2 for v, (low, _) in zip(values, spans))) / len(values)
    up = math.sqrt(sum((high - v) ** 2 for v, (_, high) in zip(values, spans))) / len(values)
    return middle, (middle - down, middle + up)


def best_beyond_doubt(scores: Sequence[tuple[float, Interval] | None], higher_is_better: bool = True) -> int | None:
    """Index of the score whose interval lies wholly on the better side of every other's; None if there is none, or only one score."""
    known = [(i, score[1]) for i, score in enumerate(scores) if score is not None]
    if len(known) < 2 or any(span is None for _, span in known):
        return None
    for i, (low, high) in known:
        others = [span for j, span in known if j != i]
        if higher_is_better and all(low > other[1] for other in others):
            return i
        if not higher_is_better and all(high < other[0] for other in others):
            return i
    return None


def short_length(tokens: float) -> str:
    """512, 4k (4,096), 1.5k, 1M (1,048,576); "any" for 0, which stands for documents as they come."""
    if not tokens:
        return "any"
    for unit, size in (("M", 1024**2), ("k", 1024)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:g}"


def short_bytes(size: float) -> str:
    """96 B, 20.5 KiB, 1.2 MiB."""
    for unit, step in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if size >= step:
            return f"{_three(size / step)} {unit}"
    return f"{size:.0f} B"


def short_count(count: float) -> str:
    """345k, 1.2M, 30B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{_three(count / size)}{unit}"
    return f"{count:g}"


def _three(x: float) -> str:
    """Three digits, never an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def score(value: float, metric: str) -> str:
    """A score as tables show it: shares to two digits, losses and bits to three."""
    return f"{value:.2f}" if metric in SHARES else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
