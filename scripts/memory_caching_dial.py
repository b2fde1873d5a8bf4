"""Measures the dial of Memory Caching: operations, bytes and time against the length of a segment, from RNN to attention.

    python scripts/memory_caching_dial.py --out benchmarks/memory_caching

One sequence is read with segments of 16, 32, ... tokens up to its whole length (one segment: linear attention), gated and sparse, beside
`linear_attention` and `attention` at the same sizes. Every time is a ratio: a memory and both others run in turn in this process, and the
ratio is the median over `--repeats` turns. The floor beside it is the operations, or the bytes, at the rates of a product and a copy
measured in the same run. Without a GPU the plain torch forms run on one thread and no absolute time is kept; with one the Triton forms
run (the tests marked gpu come first) and milliseconds are kept too. Writes dial.json and dial.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a machine that is only lent has no memzoo installed

from memzoo import kernels
from memzoo.layers.caching import CacheOptions

JSON, PICTURE = "dial.json", "dial.png"
SHORTEST, TOP_K = 16, 4
READS = {
    "gated, mean": {"aggregation": "gated", "routing": "mean"},
    "gated, energy": {"aggregation": "gated", "routing": "energy"},
    f"sparse (k = {TOP_K}), mean": {"aggregation": "sparse", "routing": "mean", "top_k": TOP_K},
}
PASSES = ("forward", "forward+backward")
OTHERS = ("linear_attention", "attention")


def segment_lengths(length: int) -> list[int]:
    """16, 32, ... below `length`, and `length` itself."""
    return [SHORTEST << i for i in range(length.bit_length()) if SHORTEST << i < length] + [length]


def counts(mixer: str, segment: int, length: int, dim: int, itemsize: int) -> dict[str, float]:
    """Of the forward, a token and head: operations (a multiply and an add are two) by the definition, and bytes moved at least: q, k, v,
    connectors and output once, and the memories and descriptors that later tokens read written once and read once. And the bytes that a
    head keeps after `length` tokens, in float32 but for attention's keys and values."""
    moved = 4 * dim * itemsize
    if mixer == "attention":
        return {"operations": 2 * dim * (length + 1), "state_bytes": 2 * length * dim * itemsize, "bytes": moved}
    operations, online = 4 * dim**2, 4 * dim**2  # a write and a read of one matrix, and that matrix in float32
    if mixer == "linear_attention":
        return {"operations": operations, "state_bytes": online, "bytes": moved}
    cache = CacheOptions(segment, **READS[mixer])
    held, read, pool = (cache.state_bytes(n, 1, dim**2, dim, linear=True) for n in (length, length - 1, 0))
    return {
        "operations": operations + cache.flops(length, 1, 2 * dim**2, dim, linear=True),
        "state_bytes": online + held,
        "bytes": moved + dim * itemsize + 2 * (read - pool) / length,
    }


def calls(length: int, heads: int, dim: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[int], tuple]]:
    """What runs, by name: from a segment length to (output, inputs that ask for gradients), of random numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, u = (torch.randn(1, length, heads, dim, generator=generator) for _ in range(4))
    inputs = [x.to(device, dtype).requires_grad_() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, u)]

    def caching(mixer: str) -> Callable[[int], tuple]:
        return lambda segment: (kernels.memory_caching(*inputs, segment_length=segment, **READS[mixer])[0], inputs)

    others = {
        "linear_attention": lambda segment: (kernels.linear_attention(*inputs[:3])[0], inputs[:3]),
        "attention": lambda segment: (kernels.attention(*inputs[:3]), inputs[:3]),
    }
    return others | {mixer: caching(mixer) for mixer in READS}


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call: on a GPU its stream's time, else this process' own time on its one thread, so that other processes count less."""
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(operations of a large product, bytes read and written by a large copy) a second."""
    n, size = (1024, 2**27) if device == "cpu" else (8192, 2**31)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    buffers = torch.ones(2, size, dtype=torch.int8, device=device)

    def best(call: Callable[[], object]) -> float:
        return min(seconds(call, device) for _ in range(6))

    return 2 * n**3 / best(lambda: a @ b), 2 * size / best(lambda: buffers[0].copy_(buffers[1]))


def floor(row: dict[str, float], name: str, inputs: float, tokens: int, ceilings: tuple[float, float]) -> float:
    """Seconds that a pass takes at least. A backward has two products for each of the forward's; it reads what the forward read and the
    output's gradient, and writes the gradients of the `inputs` bytes a token and head."""
    operations, moved = row["operations"], row["bytes"]
    if name != "forward":
        operations, moved = 3 * operations, 2 * moved + inputs
    return tokens * max(operations / ceilings[0], moved / ceilings[1])


def measure(length: int, heads: int, dim: int, repeats: int, device: str) -> dict:
    """What dial.json holds."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    runs = calls(length, heads, dim, device, dtype)
    grad = torch.randn(1, length, heads, dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ceilings = rates(device, dtype)

    def train(mixer: str, segment: int) -> None:
        y, inputs = runs[mixer](segment)
        torch.autograd.grad(y, inputs, grad, allow_unused=True)  # with one segment nothing depends on the connectors

    def once(mixer: str, name: str, segment: int) -> float:
        with torch.set_grad_enabled(name != "forward"):
            run = runs[mixer] if name == "forward" else functools.partial(train, mixer)
            return seconds(lambda: run(segment), device)

    kept: dict[tuple[str, str], list[float]] = {(other, name): [] for other in OTHERS for name in PASSES}
    rows = []
    for mixer in READS:
        for segment in segment_lengths(length):
            row = {"mixer": mixer, "segment_length": segment, "segments": -(-length // segment)}
            row |= counts(mixer, segment, length, dim, dtype.itemsize)
            for name in PASSES:
                trio, turns = (*OTHERS, mixer), []
                for turn in range(repeats + 1):
                    times = {one: once(one, name, segment) for one in trio}
                    if turn:  # the first warms up
                        turns.append(times)
                for other in OTHERS:
                    kept[other, name] += [times[other] for times in turns]
                own = statistics.median(times[mixer] for times in turns)
                row[name] = {f"x_{other}": rounded(statistics.median(t[mixer] / t[other] for t in turns)) for other in OTHERS}
                row[name]["x_floor"] = rounded(own / floor(row, name, 4 * dim * dtype.itemsize, length * heads, ceilings))
                if device != "cpu":
                    row[name]["ms"] = rounded(own * 1e3)
            rows.append(row)
            print(line(row), flush=True)
    others = {}
    for other in OTHERS:
        others[other] = counts(other, length, length, dim, dtype.itemsize)
        for name in PASSES:
            pairs = zip(kept[other, name], kept["linear_attention", name])
            own = statistics.median(kept[other, name])
            least = floor(others[other], name, 3 * dim * dtype.itemsize, length * heads, ceilings)
            found = {"x_linear_attention": rounded(statistics.median(a / b for a, b in pairs)), "x_floor": rounded(own / least)}
            others[other] = others[other] | {name: found | ({} if device == "cpu" else {"ms": rounded(own * 1e3)})}
    return {
        "format": 1, "length": length, "heads": heads, "head_dim": dim, "dtype": str(dtype)[6:], "repeats": repeats, **machine(device),
        "others": others, "rows": rows,
    }  # fmt: skip


def machine(device: str) -> dict[str, object]:
    """What it ran on."""
    if device == "cpu":
        return {"device": f"cpu ({platform.machine()})", "threads": torch.get_num_threads(), "torch": torch.__version__}
    import triton

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


def line(row: dict) -> str:
    parts = [f"{row['mixer']:<20} segment {row['segment_length']:>6}  {row['operations'] / 1e3:9.1f} kFLOP a token and head"]
    parts += [f"state {row['state_bytes'] / 2**20:8.2f} MiB a head"]
    for name in PASSES:
        found = row[name]
        parts.append(
            f"{name} x{found['x_linear_attention']:.3g} linear, x{found['x_attention']:.3g} attention, x{found['x_floor']:.3g} floor"
        )
    return "  ".join(parts)


def crossings(lengths: list[int], ratios: list[float]) -> list[float]:
    """Segment lengths at which a curve of ratios passes 1, along straight lines between its points on logarithmic axes."""
    found = []
    logs = [(math.log(length), math.log(ratio)) for length, ratio in zip(lengths, ratios)]
    for (x0, y0), (x1, y1) in zip(logs, logs[1:]):
        if (y0 > 0) != (y1 > 0):
            found.append(math.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))
    return found


def against_attention(dial: dict) -> list[str]:
    """Where each curve crosses attention: operations, state and times; one sentence a read and quantity."""
    lines = []
    for mixer in READS:
        rows = [row for row in dial["rows"] if row["mixer"] == mixer]
        lengths = [row["segment_length"] for row in rows]
        ratios = {key: [row[key] / dial["others"]["attention"][key] for row in rows] for key in ("operations", "state_bytes")}
        ratios |= {name: [row[name]["x_attention"] for row in rows] for name in PASSES}
        for key, values in ratios.items():
            at = ", ".join(f"{x:.0f}" for x in crossings(lengths, values))
            where = (
                f"crosses attention at segments of {at} tokens"
                if at
                else f"{'above' if values[0] > 1 else 'below'} attention everywhere"
            )
            lines.append(f"{mixer}: {key.replace('_', ' ')}: {where}")
    return lines


def save(dial: dict, path: Path) -> None:
    """A row a line; whole or not at all."""
    head = {key: value for key, value in dial.items() if key not in ("others", "rows")}
    others = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in dial["others"].items())
    rows = ",\n  ".join(json.dumps(row) for row in dial["rows"])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "others": {{\n  {others}\n }},\n "rows": [\n  {rows}\n ]\n}}\n')
    os.replace(temporary, path)


def draw(dial: dict, path: Path) -> None:
    """Operations, state and both times against the segment length, with attention, linear attention and the floors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    from memzoo.report.style import colour, marker, plot_style

    base = dial["others"]["linear_attention"]
    panels = {
        "operations": ("Operations, forward", "FLOP a token and head", lambda row: row["operations"]),
        "state": ("State after the sequence", "bytes a head", lambda row: row["state_bytes"]),
    }
    for name in PASSES:
        panels[name] = (f"Time, {name}", "times linear attention", lambda row, name=name: row[name]["x_linear_attention"])
    with plot_style():
        figure, grid = plt.subplots(2, 2, figsize=(10, 7.4), dpi=150, layout="constrained", sharex=True)
        for axes, (panel, (title, label, value)) in zip(grid.flat, panels.items()):
            for i, mixer in enumerate(READS):
                rows = [row for row in dial["rows"] if row["mixer"] == mixer]
                lengths = [row["segment_length"] for row in rows]
                # Where two reads keep or count the same, the later is drawn smaller, on top.
                style = {"color": colour(i), "linewidth": 2.6 - 0.7 * i}
                axes.plot(lengths, [value(row) for row in rows], marker=marker(i), markersize=7 - 1.5 * i, label=mixer, **style)
                if panel in PASSES:
                    floors = [value(row) / row[panel]["x_floor"] for row in rows]
                    axes.plot(lengths, floors, color=colour(i), linewidth=1, linestyle=":", label="floors" if i == 2 else None)
            axes.axhline(value(dial["others"]["attention"]), color="#1c2530", linestyle="--", linewidth=1.4, label="attention")
            axes.axhline(value(base), color=colour(None), linestyle="-.", linewidth=1.4, label="linear attention")
            axes.set(title=title, ylabel=label, yscale="log")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}" if panel in PASSES else EngFormatter(sep=" "))
            axes.grid(True)
        for axes in grid[1]:
            axes.set_xlabel("tokens a segment")
        figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
        unit = "one thread, plain torch" if dial["device"].startswith("cpu") else dial["device"]
        figure.suptitle(
            f"{dial['length']} tokens, heads x dimension {dial['heads']} x {dial['head_dim']}, {dial['dtype']}, {unit}",
            fontsize=10,
            x=0.01,
            ha="left",
        )
        temporary = path.with_suffix(".tmp")
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", help="tokens of the sequence, such as 4096 or 4k [4k on a CPU, 16k on a GPU]")
    parser.add_argument("--heads", type=int, help="[2 on a CPU, 16 on a GPU]")
    parser.add_argument("--head-dim", type=int, help="[64 on a CPU, 128 on a GPU]")
    parser.add_argument("--repeats", type=int, default=5, help="turns that a ratio is the median of [5]")
    parser.add_argument("--out", type=Path, default=Path("results/memory_caching"), help=f"folder for {JSON} and {PICTURE}")
    options = parser.parse_args(argv)
    from memzoo.evaluation import parse_length

    device = "cuda" if torch.cuda.is_available() else "cpu"
    length, heads, dim = ("4k", 2, 64) if device == "cpu" else ("16k", 16, 128)
    heads = heads if options.heads is None else options.heads
    dim = dim if options.head_dim is None else options.head_dim
    if device == "cpu":
        torch.set_num_threads(1)  # ratios of one thread's time, on a machine that others may be using
    try:
        length = parse_length(length if options.length is None else options.length)
        for name, value, least in (("length", length, 2 * SHORTEST), ("heads", heads, 1), ("repeats", options.repeats, 1)):
            if value < least:
                raise ValueError(f"--{name} is {value}, needs at least {least}")
        if dim % 8 or not 16 <= dim <= 256:
            raise ValueError(f"--head-dim is {dim}, needs a multiple of 8 from 16 to 256")
        options.out.mkdir(parents=True, exist_ok=True)
        dial = measure(length, heads, dim, options.repeats, device)
        save(dial, options.out / JSON)
        print(*against_attention(dial), sep="\n")
        draw(dial, options.out / PICTURE)
    except (ValueError, OSError, ImportError) as error:  # without matplotlib the figures are kept all the same
        print(f"memory_caching_dial: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.out / JSON}, {options.out / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
