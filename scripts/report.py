"""Makes one self-contained page that compares models from a results folder, and every plot of it as PNG and SVG.

python scripts/report.py results/ --out report.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder that scripts/evaluate.py wrote, or one that holds several such folders")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page; its plots go to a folder beside it [report.html]"
    )
    parser.add_argument("--title", default="memzoo report", help="the page's heading")
    options = parser.parse_args(argv)
    from memzoo.report import read_results, write_report

    try:
        results = read_results(options.results)
        files = write_report(results, options.out, title=options.title, progress=lambda part: print(f"drawing {part}", flush=True))
    except ModuleNotFoundError as error:
        print(f"report: {error}; pip install 'memzoo[eval]' brings what drawing needs", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    for note in results.notes:
        print(f"report: {note}", file=sys.stderr)
    pictures = f"; {len(files) - 1} pictures in {files[1].parent}" if len(files) > 1 else ""
    held = {"model": results.models, "task": results.tasks, "result": results.cells}
    counted = ", ".join(f"{len(found)} {what}{'' if len(found) == 1 else 's'}" for what, found in held.items())
    print(f"{files[0]}: {counted}{pictures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
