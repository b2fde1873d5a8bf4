"""Runs the tests marked gpu, each file in a process of its own, then the benchmark of what passed; started by scripts/gpu_check.sh.

As a pytest plugin, this file writes each test's outcome as it comes, so that a crash or a hang in one file loses nothing before it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 4
TEST_SHARE = 0.5  # of the seconds, at most, for tests; the benchmark has the rest


def pytest_runtest_logreport(report) -> None:
    """One line a test: name, outcome, seconds, and for a failure its last line (pytest calls this when the file is its plugin)."""
    if report.when == "call" or report.outcome != "passed":
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            row["reason"] = (crash.message if crash else str(report.longrepr)).strip()[:600]
        with open(os.environ["GPU_CHECK_OUTCOMES"], "a") as file:
            file.write(json.dumps(row) + "\n")


def test_files() -> list[Path]:
    """The test files of kernels and models that have a test marked gpu."""
    found = [path for folder in ("kernels", "models") for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))]
    return [path for path in found if "mark.gpu" in path.read_text()]


def run_file(path: Path, deadline: float) -> dict[str, object]:
    """The outcomes of one file's gpu tests; a process that dies or runs out of time is a failure with its reason."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        environment = {**os.environ, "GPU_CHECK_OUTCOMES": str(outcomes)}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "gpu_check", "-p", "no:cacheprovider", str(path)]
        start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(deadline - start, 1),
                stdin=subprocess.DEVNULL,
            )
            status, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            status, output = "out of time", ""
        rows = [json.loads(line) for line in outcomes.read_text().splitlines()] if outcomes.exists() else []
    failed = [row for row in rows if row["outcome"] == "failed"]
    if status not in (0, 1, 5) or (status == 1 and not failed):
        tail = [line for line in output.strip().splitlines() if line.strip()][-5:]
        failed.append({"test": path.name, "outcome": "failed", "reason": f"pytest ended with {status}: " + " | ".join(tail)[-600:]})
    return {
        "file": path.relative_to(ROOT).as_posix(),
        "passed": sum(row["outcome"] == "passed" for row in rows),
        "skipped": sum(row["outcome"] == "skipped" for row in rows),
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
    }


def group(result: dict[str, object]) -> str:
    """The operator that a test file is about (test_<operator>.py, or test_<operator>_<part>.py), or "models"."""
    path = Path(str(result["file"]))
    if path.parent.name != "kernels":
        return "models"
    name = path.stem.removeprefix("test_")
    operators = [path.parent.name for path in (ROOT / "memzoo" / "kernels").glob("*/kernel.py")]
    return next((operator for operator in operators if name.startswith(operator + "_")), name)


def verdicts(results: list[dict[str, object]]) -> dict[str, str]:
    """ "passed" or "failed" for each operator; an operator none of whose tests ran has no verdict."""
    found: dict[str, str] = {}
    for result in results:
        if result["failed"]:
            found[group(result)] = "failed"
        elif result["passed"]:
            found.setdefault(group(result), "passed")
    return found


def commit() -> str:
    """The commit checked, with "+" where files differ from it; "unknown" outside a git checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tests and times memzoo's kernels on this machine's GPU.")
    parser.add_argument("out", type=Path, help="folder for the JSON files")
    parser.add_argument("--quick", action="store_true", help="few shapes in the benchmark")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything (default: 540)")
    arguments = parser.parse_args(argv)
    start = time.monotonic()

    import torch
    import transformers
    import triton

    if not torch.cuda.is_available():
        print("gpu_check: no CUDA GPU that torch can see; run this on a machine with one", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {"triton": triton.__version__, "transformers": transformers.__version__}
    print(f"gpu_check: {gpu}, " + ", ".join(f"{key} {value}" for key, value in versions.items()), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)

    report: dict[str, object] = {"gpu": gpu, "versions": versions, "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    results: list[dict[str, object]] = []
    with ThreadPoolExecutor(PROCESSES) as pool:
        deadline = start + TEST_SHARE * arguments.seconds
        for result in pool.map(lambda path: run_file(path, deadline), test_files()):
            results.append(result)
            word = "FAILED" if result["failed"] else "passed" if result["passed"] else "no test ran"
            print(f"{result['file']:45} {word}: {result['passed']} passed, {len(result['failed'])} failed, {result['seconds']} s")
            for failure in result["failed"]:
                print(f"    {failure['test']}: {failure['reason'].splitlines()[0] if failure['reason'] else ''}"[:220], flush=True)
            report |= {"operators": verdicts(results), "tests": results}
            (arguments.out / f"gpu_check.{name}.json").write_text(json.dumps(report, indent=1) + "\n")

    verdict = verdicts(results)
    # linked_attention lives with attention and is tested beside it.
    operators = {path.parent.name for path in (ROOT / "memzoo" / "kernels").glob("*/kernel.py")}
    timed = [operator for operator, word in verdict.items() if word == "passed" and operator in operators]
    timed += ["linked_attention"] * ("attention" in timed)
    status = 0
    if timed:
        left = max(arguments.seconds - (time.monotonic() - start), 30)
        command = [
            sys.executable,
            str(ROOT / "scripts" / "benchmark.py"),
            "--operators",
            ",".join(timed),
            "--seconds",
            f"{left:.0f}",
        ]
        command += ["--out", str(arguments.out / f"benchmark.{name}.json"), "--shapes", "quick" if arguments.quick else "standard"]
        status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    failed = [operator for operator, word in verdict.items() if word == "failed"]
    good = bool(verdict) and not failed and status == 0
    parts = [f"{len(verdict) - len(failed)} of {len(verdict)} groups of tests passed"]
    parts += [f"failed: {', '.join(failed)}"] if failed else []
    parts += ["nothing was timed"] if not timed else [f"benchmark: {'complete' if status == 0 else 'incomplete or with errors'}"]
    print(f"gpu_check: {'; '.join(parts)}; {time.monotonic() - start:.0f} s; results in {arguments.out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
