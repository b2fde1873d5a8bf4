"""The scripts for machines with a GPU, as far as a machine without one can tell: they refuse clearly, and their code runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memzoo import kernels

ROOT = Path(__file__).parents[1]


def load(name):
    """A file of scripts/ as a module."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def run(*command, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "MEMZOO_PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", **variables}
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_check_without_a_gpu_says_so_in_one_line(tmp_path):
    done = run("bash", "scripts/gpu_check.sh", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gpu_check: no CUDA GPU that torch can see") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_check_needs_a_folder():
    done = run("bash", "scripts/gpu_check.sh")
    assert done.returncode == 2 and "name a folder for the results" in done.stderr


def test_check_names_what_is_missing(tmp_path):
    """A Python whose torch sees a GPU but that has neither pytest nor hypothesis."""
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    done = run("bash", "scripts/gpu_check.sh", tmp_path / "out", MEMZOO_PYTHON=str(python))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "this Python lacks: triton transformers pytest hypothesis; install them, or lay their wheels in .whl" in done.stderr


def test_gpu_tests_are_collected_without_what_a_gpu_machine_lacks():
    """Test files of kernels and models import neither datasets nor lm-eval, nor the packages that only the demo and training need."""
    absent = ("datasets", "lm_eval", "wonderwords", "nltk", "tensorboard", "rich", "matplotlib", "yaml")
    block = f"import sys\nfor name in {absent}: sys.modules[name] = None\nimport pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    check = load("gpu_check")
    files = check.test_files()
    done = run(sys.executable, "-c", block, "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    covered = {check.group({"file": path}) for path in files}
    folders = {path.parent.name for path in (ROOT / "memzoo" / "kernels").glob("*/kernel.py")}
    assert covered >= folders, f"no gpu test for {sorted(folders - covered)}"
    assert any(path.parent.name == "models" for path in files)


def test_outcomes_of_a_file(tmp_path, monkeypatch):
    """Passes and failures are recorded as they come; a process that dies or hangs is a failure, and what came before it counts."""
    check = load("gpu_check")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts"))
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: as in the project\n")
    head = "import os, time, pytest\npytestmark = pytest.mark.gpu\ndef test_a(): pass\n"
    files = {
        "good": "",
        "bad": "def test_b(): assert 1 == 2, 'numbers differ'\n",
        "dead": "def test_b(): os._exit(7)\n",
        "stuck": "def test_b(): time.sleep(60)\n",
        "broken": "import no_such_module\n",
    }
    results = {}
    for name, text in files.items():
        path = folder / f"test_{name}.py"
        path.write_text(head + text)
        results[name] = check.run_file(path, check.time.monotonic() + (4 if name == "stuck" else 60))
    assert results["good"]["passed"] == 1 and not results["good"]["failed"]
    assert results["bad"]["passed"] == 1 and "numbers differ" in results["bad"]["failed"][0]["reason"]
    assert results["dead"]["passed"] == 1 and "pytest ended with 7" in results["dead"]["failed"][0]["reason"]
    assert results["stuck"]["passed"] == 1 and "out of time" in results["stuck"]["failed"][0]["reason"]
    assert "no_such_module" in results["broken"]["failed"][0]["reason"]
    expected = {"good": "passed", "bad": "failed", "dead": "failed", "stuck": "failed", "broken": "failed"}
    assert check.verdicts(list(results.values())) == expected


OPERATORS = {name for name in kernels.__all__ if name.islower()}


def test_benchmark_refuses_a_cpu(tmp_path):
    done = run(sys.executable, "scripts/benchmark.py", "--out", tmp_path / "out.json")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "a time from a CPU is never a claim" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_benchmark_refuses_an_unknown_operator():
    done = run(sys.executable, "scripts/benchmark.py", "--dry-run", "--operators", "atention")
    assert done.returncode == 2 and "no operator atention; there are attention, " in done.stderr


def test_benchmark_dry_run_covers_every_operator(tmp_path):
    out = tmp_path / "out.json"
    done = run(sys.executable, "scripts/benchmark.py", "--dry-run", "--out", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "a dry run on a CPU: no time above is a claim"
    result = json.loads(out.read_text())
    assert result["dry_run"] and not result["not_run"]
    assert {row["operator"] for row in result["rows"]} == OPERATORS == set(result["operators"])
    for row in result["rows"]:
        assert row["ms"] > 0 and row["floor_ms"] > 0 and row["errors"] and "sdpa" in row["peers"], row
    assert {row["pass"] for row in result["rows"]} == {"forward", "forward+backward", "step"}


def test_benchmark_gate_stops_a_wrong_kernel(monkeypatch):
    """A row whose numbers are wrong has an error and no time."""
    benchmark = load("benchmark")
    bench = benchmark.Bench(dry_run=True)
    case = next(case for case in benchmark.CASES if case.operator == "causal_conv1d")
    assert benchmark.measure_row(bench, case, benchmark.TINY)
    run_rightly = benchmark.Case.run

    wide = benchmark.Shape(1, 64, 8, 16)  # 128 channels, of which the gate's exact form sees 64

    def run_wrongly(self, tensors, implementation=None):
        scale = 1.1 if tensors["x"].shape[2] == 128 else 1.0
        return tuple(o * scale for o in run_rightly(self, tensors, implementation))

    monkeypatch.setattr(benchmark.Case, "run", run_wrongly)
    with pytest.raises(AssertionError, match=r"wrong: output 0 by 0\.1, gradient of x by 0\.1"):
        benchmark.measure_row(bench, case, wide)


def test_operations_counted():
    benchmark = load("benchmark")
    shape = benchmark.Shape(1, 5, 1, 16)
    assert benchmark.attention_operations(shape) == 4 * 16 * 15
    # Window 2, prefix 1: the rows see 1, 2, 3, 3, 3 positions.
    assert benchmark.attention_operations(shape, window=2, prefix=1) == 4 * 16 * 12
    assert benchmark.memory_operations(shape, products=3) == 6 * 16 * 16 * 5
    # Three segments: a token of the second scores and reads one cached memory, one of the third two; all score their own.
    long = benchmark.Shape(1, 2 * benchmark.SEGMENT + 8, 1, 16)
    earlier = benchmark.SEGMENT + 2 * 8
    own = (4 * 16 * 16 + 2 * 16) * long.length
    counted = benchmark.caching_operations(long, **benchmark.CACHING["gated, mean"])
    assert counted == pytest.approx(own + earlier * (2 * 16 * 16 + 2 * 16))
    # A decode step after 16 segments reads the four that it chose, and scores all and its own.
    step = benchmark.Shape(1, 1, 1, 16)
    assert benchmark.caching_step_operations(step, read=4) == (2 + 4) * 2 * 16 * 16 + 17 * 2 * 16
    case = next(case for case in benchmark.CASES if case.operator == "memory_caching" and case.variant.startswith("step, sparse"))
    tensors = case.inputs(step, torch.randn)
    size = {name: 4 * tensor.numel() for name, tensor in tensors.items()}
    assert case.input_bytes(tensors) == sum(size.values()) - size["state.cached"] * 12 / 16
