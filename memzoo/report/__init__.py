"""The report: one self-contained page that compares models, made from the results store; no network and no torch needed."""

from __future__ import annotations

from .page import write_report
from .store import Results, read_results

__all__ = ["Results", "read_results", "write_report"]
