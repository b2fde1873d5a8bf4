"""Compiles every launch-table entry for NVIDIA targets on any machine and reports registers, spills and shared memory.

    python -m memzoo.kernels.aot --targets 80,90,100 --only attention --json figures.json --markdown docs/kernels.md

Exit status 1 if an entry does not compile, spills registers (more than it is known to), or wants more shared memory than the target
has. Needs Linux (Triton's wheel brings the assembler) and TRITON_INTERPRET unset; needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .common.launch import SHARED_MEMORY, CompileSpec

OPERATORS = (
    "attention",
    "causal_conv1d",
    "delta_rule",
    "gated_scan",
    "gru",
    "linear_attention",
    "lstm",
    "memory_caching",
    "neural_memory",
)


def compile_specs(operator: str, capability: int) -> list[CompileSpec]:
    """The launch-table entries of one operator for one target."""
    module = importlib.import_module(f".{operator}.kernel", __package__)
    return list(module.compile_specs(capability))


def compile_one(spec: CompileSpec, capability: int) -> dict[str, object]:
    """Compile one entry as Triton's JIT would (pointers 16-byte aligned) and read what the assembler says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = spec.kernel
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what the JIT does today; unset, Triton 3.9 warns of a later change
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    types = {name: "constexpr" if name in spec.constants else spec.signature[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in spec.divisible
    }
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=dict(spec.constants), attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(tools / "cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    return {
        "kernel": spec.name,
        "target": f"sm_{capability}",
        "warps": spec.num_warps,
        "stages": spec.num_stages,
        "registers": int(fields["REG"]),
        "spilled_bytes": int(fields["STACK"]),
        "spill_limit": spec.spill_limit,
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "matrix_instructions": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
    }


def faults(row: dict[str, object]) -> list[str]:
    """What is wrong with one compiled entry; empty if nothing."""
    capability = int(str(row["target"])[3:])
    found = []
    if row.get("error"):
        return [str(row["error"])]
    if row["spilled_bytes"] > row.get("spill_limit", 0):
        found.append(f"spills {row['spilled_bytes']} bytes a thread")
    if row["shared_bytes"] > SHARED_MEMORY[capability]:
        found.append(f"wants {row['shared_bytes']} bytes of shared memory, {SHARED_MEMORY[capability]} fit")
    if row["tensor_memory"] > 512:
        found.append(f"wants {row['tensor_memory']} columns of tensor memory, 512 fit")
    return found


def _work(job: tuple[str, int, int]) -> dict[str, object]:
    operator, capability, index = job
    spec = compile_specs(operator, capability)[index]
    try:
        return {"operator": operator, **compile_one(spec, capability)}
    except Exception as error:  # a compiler's failure is this tool's finding, whatever its type
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return {"operator": operator, "kernel": spec.name, "target": f"sm_{capability}", "error": f"does not compile: {line}"}


HEADER = """# Kernels: what the compiler says of each, and where they have run

Made by `python -m memzoo.kernels.aot --markdown docs/kernels.md` with Triton {version}; do not edit by hand. Every entry of every launch
table is compiled for each target without a GPU, and `tests/test_compile.py` does the same in each test run: it must compile, spill
nothing (or, where a kernel could not be made to fit, no more than its source says), and fit the target's shared memory. Registers are
per thread; another Triton version gives somewhat other figures.

## Validated on

An operator is validated on a machine when the tests marked `gpu` passed there (`scripts/gpu_check.sh`); compiling proves no numbers.
{status}

| operator | validated on |
|---|---|
{validated}

## Compiled
"""


def validated_on(operator: str, checks: list[dict]) -> str:
    """The machines whose GPU check passed for one operator, from the JSON files that `scripts/gpu_check.sh` writes."""
    passed = [check for check in checks if check.get("operators", {}).get(operator) == "passed"]
    machines = [f"{c['gpu']} (torch {c['versions']['torch']}, Triton {c['versions']['triton']})" for c in passed]
    return ", ".join(dict.fromkeys(machines)) or "not validated on a GPU"


def markdown(rows: list[dict[str, object]], checks: list[dict]) -> str:
    """The kernel table: a header, where each operator has run, and every compiled entry."""
    import triton

    operators = list(dict.fromkeys(str(row["operator"]) for row in rows))
    validated = [f"| {operator} | {validated_on(operator, checks)} |" for operator in operators]
    status = "No kernel has been validated on a GPU yet." if not any(f.get("operators") for f in checks) else ""
    lines = [
        HEADER.format(version=triton.__version__, status=status, validated="\n".join(validated)),
        "| kernel | target | warps | stages | registers | spilled (B) | shared (B) | matrix instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['kernel']} | {row['target']} |"
        if row.get("error"):
            lines.append(f"{head} {row['error']} | | | | | |")
            continue
        names = ("warps", "stages", "registers", "spilled_bytes", "shared_bytes", "matrix_instructions")
        lines.append(f"{head} {' | '.join(str(row[name]) for name in names)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="80,90,100", help="compute capabilities, comma-separated (default: 80,90,100)")
    parser.add_argument("--only", default=",".join(OPERATORS), help="operators, comma-separated (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes (default: one a core)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--gpu-checks", default="benchmarks/gpu_check*.json", help="files that say what ran on a GPU")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    jobs = [
        (operator, int(target), index)
        for operator in arguments.only.split(",")
        for target in arguments.targets.split(",")
        for index in range(len(compile_specs(operator, int(target))))
    ]
    rows = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(_work, jobs):
            rows.append(row)
            found = faults(row)
            figures = "" if row.get("error") else f"{row['registers']} registers, {row['shared_bytes']} B shared"
            print(f"{'FAULT' if found else 'ok':5} {row['target']:6} {row['kernel']}: {'; '.join(found) or figures}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.markdown:
        checks = [json.loads(path.read_text()) for path in sorted(Path().glob(arguments.gpu_checks))]
        arguments.markdown.write_text(markdown(rows, checks))
    bad = sum(bool(faults(row)) for row in rows)
    print(f"{len(rows)} entries, {bad} with a fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
