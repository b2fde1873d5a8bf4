"""Every launch-table entry of every operator, compiled for sm_80, sm_90 and sm_100 as a GPU would: no spill, shared memory fits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memzoo.kernels import aot

ROOT = Path(__file__).parents[1]
TARGETS = (80, 90, 100)

# A matrix product whose tiles are, in turn: right; too large for shared memory; too large for the registers; too small for a dot.
TOY = """
import json

import triton
import triton.language as tl

from memzoo.kernels import aot
from memzoo.kernels.common.launch import CompileSpec


@triton.jit
def kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        left = tl.load(a + m[:, None] * K + start + k[None, :])
        total += tl.dot(left, tl.load(b + (start + k)[:, None] * BN + n[None, :]))
    tl.store(c + m[:, None] * BN + n[None, :], total)


def spec(bm, bn, bk, stages):
    types = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "K": "i32"}
    return CompileSpec("toy", kernel, types, {"BM": bm, "BN": bn, "BK": bk}, 4, stages, ("K",))


specs = [spec(64, 64, 64, 2), spec(64, 64, 256, 6), spec(256, 256, 32, 1), spec(64, 64, 4, 1)]
aot.compile_specs = lambda operator, capability: specs
print(json.dumps([aot.faults(aot._work(("toy", 90, index))) for index in range(len(specs))]))
"""


def run(*arguments):
    """Python in a process of its own, where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operator", aot.OPERATORS)
def test_every_entry_compiles_fits_and_does_not_spill(operator, target, tmp_path):
    figures = tmp_path / "figures.json"
    done = run("-m", "memzoo.kernels.aot", "--only", operator, "--targets", target, "--jobs", 1, "--json", figures)
    assert figures.exists(), done.stderr[-2000:]
    rows = json.loads(figures.read_text())
    found = [f"{row['kernel']} on sm_{target}: {fault}" for row in rows for fault in aot.faults(row)]
    assert not found, "\n" + "\n".join(found)
    assert rows and done.returncode == 0, done.stderr[-2000:]
    names = [row["kernel"] for row in rows]
    assert len(set(names)) == len(names), f"entries need names of their own: {sorted({n for n in names if names.count(n) > 1})}"


def test_every_operator_is_compiled():
    folders = {path.parent.name for path in (ROOT / "memzoo" / "kernels").glob("*/kernel.py")}
    assert folders == set(aot.OPERATORS)


def test_faults_are_found(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    done = run(script)
    assert done.returncode == 0, done.stderr[-2000:]
    right, oversized, spilling, broken = json.loads(done.stdout)
    assert right == []
    assert len(oversized) == 1 and re.fullmatch(r"wants \d+ bytes of shared memory, 232448 fit", oversized[0])
    assert any(re.fullmatch(r"spills \d+ bytes a thread", fault) for fault in spilling)
    assert broken[0].startswith("does not compile: ")


def test_faults_of_a_row():
    row = {"target": "sm_80", "registers": 255, "spilled_bytes": 0, "shared_bytes": 166_912, "tensor_memory": 512}
    assert aot.faults(row) == []
    assert aot.faults({**row, "shared_bytes": 166_913}) == ["wants 166913 bytes of shared memory, 166912 fit"]
    assert aot.faults({**row, "spilled_bytes": 8, "tensor_memory": 513}) == [
        "spills 8 bytes a thread",
        "wants 513 columns of tensor memory, 512 fit",
    ]
    assert aot.faults({**row, "error": "does not compile: why"}) == ["does not compile: why"]


def test_tool_refuses_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "memzoo.kernels.aot"], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr


def test_table_in_the_documentation_has_every_entry():
    """Figures differ between Triton versions; which entries there are does not."""
    names = 'print("\\n".join(s.name for o in aot.OPERATORS for c in (80, 90, 100) for s in aot.compile_specs(o, c)))'
    done = run("-c", f"from memzoo.kernels import aot; {names}")
    assert done.returncode == 0, done.stderr[-2000:]
    table = set(re.findall(r"^\| (.+?) \| sm_\d+ \|", (ROOT / "docs" / "kernels.md").read_text(), re.MULTILINE))
    assert table == set(done.stdout.splitlines()), "run: python -m memzoo.kernels.aot --markdown docs/kernels.md"


def test_table_says_where_each_operator_was_validated():
    row = {"operator": "a", "kernel": "a forward", "target": "sm_90", "warps": 4, "stages": 2, "registers": 9}
    row |= {"spilled_bytes": 0, "shared_bytes": 0, "tensor_memory": 0, "matrix_instructions": 0}
    assert "| a | not validated on a GPU |" in aot.markdown([row], [])
    check = {"gpu": "X100", "versions": {"torch": "2", "triton": "3"}, "operators": {"a": "passed", "b": "failed"}}
    table = aot.markdown([row, {**row, "operator": "b"}], [check, check])
    assert "| a | X100 (torch 2, Triton 3) |" in table and "| b | not validated on a GPU |" in table
