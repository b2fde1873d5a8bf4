"""The one exception that training raises for what its user can put right: a single line, shown without a traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class BadInput(ValueError):
    """A setting, file or folder that training cannot work with."""


def close_names(name: str, names: Iterable[str]) -> str:
    """`"; close ones: a, b"` for a misspelt name, or all of them when few, or nothing."""
    names = sorted(set(names))
    found = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    if found:
        return f"; close: {', '.join(found)}"
    return f"; there are: {', '.join(names)}" if 0 < len(names) <= 12 else ""


@contextmanager
def refusing(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors of a library call on the user's input into one line that starts with `what`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if not isinstance(error, kinds or (OSError, ValueError, KeyError, TypeError, ImportError)):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BadInput(f"{what}: {' '.join(lines)[:400] or type(error).__name__}") from error


def run_or_refuse(main: Callable[[], int]) -> int:
    """Run `main`; a BadInput becomes one line on stderr (from the first process only) and exit code 2."""
    try:
        return main()
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
