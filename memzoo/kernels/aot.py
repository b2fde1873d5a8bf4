"""Compiles every launch-table entry for NVIDIA targets on any machine and reports registers, spills and shared memory.

    python -m memzoo.kernels.aot --targets 80,90,100 --only attention --json figures.json --markdown docs/kernels.md

Exit status 1 if an entry does not compile, spills registers, or wants more shared memory than the target has. Needs Linux (Triton's
wheel brings the assembler) and TRITON_INTERPRET unset; needs no GPU.
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

OPERATORS = ("attention", "causal_conv1d", "delta_rule", "linear_attention")


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
    if row["spilled_bytes"]:
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


def markdown(rows: list[dict[str, object]]) -> str:
    lines = [
        "| kernel | target | warps | stages | registers | spilled | shared (B) | matrix instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['kernel']} | {r['target']} | {r['warps']} | {r['stages']} | {r['registers']} | {r['spilled_bytes']} "
        f"| {r['shared_bytes']} | {r['matrix_instructions']} |"
        for r in rows
        if not r.get("error")
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="80,90,100", help="compute capabilities, comma-separated (default: 80,90,100)")
    parser.add_argument("--only", default=",".join(OPERATORS), help="operators, comma-separated (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes (default: one a core)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
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
            print(
                f"{'FAULT' if found else 'ok':5} {row['target']:6} {row['kernel']}: {'; '.join(found) or figures}", flush=True
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows))
    bad = sum(bool(faults(row)) for row in rows)
    print(f"{len(rows)} entries, {bad} with a fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
