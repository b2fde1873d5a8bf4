"""Compares routing rules: multi-query associative recall learned by one memory, by cached memories read in every way, and by attention.

    python scripts/memory_routing.py --out benchmarks/memory_routing

Trains small models on the CPU, one after the other (`--pairs`, then seeds, then mixers), and writes results.json after every one, so that
the same command goes on where it was stopped; then draws memory_routing.png. All models have the same stack, widths and convolutions;
only the mixer differs. A run stops when it answers (nearly) all of fresh queries, or at `--steps`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from memzoo.data.mqar import associative_recall
from memzoo.models.mc_rnn.configuration_mc_rnn import ROUTINGS, MemoryCachingConfig
from memzoo.models.titans.configuration_titans import TitansConfig

JSON, PICTURE = "results.json", "memory_routing.png"
CONV_WIDTH, TOP_K, ENOUGH, WARM_UP = 4, 2, 0.998, 50
LOW_RANK = "gated-energy-low-rank"  # descriptors of half the head's dimension: a quarter of their bytes
MIXERS = ("base", *(f"{read}-{routing}" for read in ("gated", "sparse") for routing in ROUTINGS), LOW_RANK, "attention")
MEASURE, FINAL = 128, 512  # fresh sequences of a point of a curve, and of a final accuracy


def build(mixer: str, length: int, options: argparse.Namespace) -> nn.Module:
    """An untrained model with `mixer`: "base" (one matrix), "attention", or a way to read cached matrices, such as "gated-mean".

    `length` is that of training sequences; cached memories are of length / `options.segments` tokens.
    """
    sizes = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": 2 * options.hidden_size,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "conv_width": CONV_WIDTH,
        "output_gate": False,
    }
    if mixer == "attention":  # rotary positions; a window that holds the longest sequence that is scored
        config = TitansConfig(variant="lmm", memory_layers=[], num_persistent_tokens=0, sliding_window=4 * length + 1, **sizes)
    elif mixer == "base":
        config = MemoryCachingConfig(memory="linear", aggregation="none", **sizes)
    else:
        aggregation, routing = mixer.removesuffix("-low-rank").split("-")
        config = MemoryCachingConfig(
            memory="linear",
            aggregation=aggregation,
            routing=routing,
            routing_dim=options.hidden_size // options.heads // 2 if mixer == LOW_RANK else None,
            top_k=TOP_K if aggregation == "sparse" else None,
            segment_length=length // options.segments,
            **sizes,
        )
    return AutoModelForCausalLM.from_config(config)


def accuracy(model: nn.Module, length: int, pairs: int, count: int, seed: int) -> float:
    """Share of the queries of `count` fresh sequences that are answered with the right value."""
    generator = torch.Generator().manual_seed(seed)
    right = asked = 0
    model.eval()
    with torch.no_grad():
        for begin in range(0, count, 32):
            ids, labels = associative_recall(min(32, count - begin), length, pairs, model.config.vocab_size, generator)
            guess = model(ids, use_cache=False).logits[:, :-1].argmax(-1)
            queries = labels[:, 1:] != -100
            right += (guess == labels[:, 1:])[queries].sum().item()
            asked += queries.sum().item()
    model.train()
    return right / asked


def learn(mixer: str, pairs: int, seed: int, options: argparse.Namespace) -> dict:
    """Train one model from scratch: its curve, then its accuracy on sequences of other lengths and numbers of pairs."""
    length = 4 * pairs
    others = [(2 * length, pairs), (4 * length, pairs), (2 * length, 2 * pairs)]
    torch.manual_seed(seed)
    model = build(mixer, length, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    batch = max(1, options.tokens // length)
    generator = torch.Generator().manual_seed(1000 + seed)
    curve, start = [], time.perf_counter()
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, step / WARM_UP)
        ids, labels = associative_recall(batch, length, pairs, options.vocab_size, generator)
        model(ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % options.every == 0 or step == options.steps:
            curve.append([step, round(accuracy(model, length, pairs, MEASURE, seed=10**6 + seed), 5)])
            rate = (time.perf_counter() - start) / step
            print(
                f"{pairs} pairs  seed {seed}  {mixer:<21} step {step:4}  accuracy {curve[-1][1]:.3f}  {rate:.2f} s a step",
                flush=True,
            )
            if curve[-1][1] >= ENOUGH:
                break
    seconds = time.perf_counter() - start
    scores = [[n, p, round(accuracy(model, n, p, FINAL if n == length else MEASURE, seed=2 * 10**6 + seed), 5)] for n, p in
              [(length, pairs), *others] if 2 * p < options.vocab_size - 1]  # fmt: skip
    return {
        "mixer": mixer, "pairs": pairs, "length": length, "seed": seed, "batch": batch, "steps": curve[-1][0], "step_limit": options.steps,
        "accuracy": scores[0][2], "state_bytes": model.state_bytes(length), "parameters": model.num_parameters(),
        "seconds": round(seconds, 1), "curve": curve, "other": [[n, p, score, model.state_bytes(n)] for n, p, score in scores[1:]],
    }  # fmt: skip


def settings(options: argparse.Namespace) -> dict:
    """What runs in one file share, beside the constants of this script."""
    names = ("vocab_size", "hidden_size", "layers", "heads", "segments", "tokens", "learning_rate", "every")
    constants = {"conv_width": CONV_WIDTH, "top_k": TOP_K, "stops_at_accuracy": ENOUGH, "warm_up_steps": WARM_UP}
    return {name: getattr(options, name) for name in names} | constants


def load(path: Path, wanted: dict) -> list[dict]:
    """The runs that the file holds; ValueError for a file that is broken or made with other settings."""
    if not path.exists():
        return []
    try:
        held = json.loads(path.read_text())
        found, runs = held["settings"], held["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of this script ({type(error).__name__}: {error}); move it away") from None
    differ = [f"{name} {found.get(name)} there, {value} asked" for name, value in wanted.items() if found.get(name) != value]
    if differ:
        raise ValueError(f"{path} holds runs with other settings ({'; '.join(differ)}); give another --out")
    return runs


def save(path: Path, wanted: dict, runs: list[dict]) -> None:
    """Whole or not at all: written under another name first."""
    rows = ",\n  ".join(json.dumps(run) for run in runs)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{"settings": {json.dumps(wanted)},\n "runs": [\n  {rows}\n ]}}\n')
    os.replace(temporary, path)


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def table(runs: list[dict]) -> str:
    """Markdown: a row a number of pairs and mixer; accuracies over the seeds."""
    lines = ["| pairs | mixer | seeds | accuracy (lowest) | steps | state | 2x length | 4x length | 2x pairs, 2x length |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for pairs in sorted({run["pairs"] for run in runs}):
        for mixer in MIXERS:
            group = [run for run in runs if (run["mixer"], run["pairs"]) == (mixer, pairs)]
            if not group:
                continue
            scores, length = [run["accuracy"] for run in group], group[0]["length"]
            steps = sorted(run["steps"] for run in group)
            others = [
                [o[2] for run in group for o in run["other"] if o[:2] == [n * length, p * pairs]]
                for n, p in ((2, 1), (4, 1), (2, 2))
            ]
            beyond = " | ".join(f"{mean(o):.3f}" if o else "-" for o in others)
            lines.append(
                f"| {pairs} | {mixer} | {len(group)} | {mean(scores):.3f} ({min(scores):.3f}) | {', '.join(map(str, steps))} | "
                f"{group[0]['state_bytes'] / 1024:.1f} KiB | {beyond} |"
            )
    return "\n".join(lines)


def draw(runs: list[dict], path: Path) -> None:
    """A row for each number of pairs: accuracy against steps, a line a seed; and final accuracy against state bytes, a mark a mixer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    colors = {
        "base": "#8a8a8a",
        "mean": "#b23a48",
        "submax": "#d08c1d",
        "energy": "#0b6e4f",
        "energy-low-rank": "#5aa9d6",
        "attention": "#111111",
    }
    counts = sorted({run["pairs"] for run in runs})
    figure, grid = plt.subplots(len(counts), 2, figsize=(10.4, 4.2 * len(counts)), dpi=150, layout="constrained", squeeze=False)

    def wrong(accuracy: float) -> float:
        """Errors, on whose logarithm 0.99 and 0.999 are as far apart as 0.9 and 0.99; none counts as one in 5,000."""
        return max(1 - accuracy, 2e-4)

    for (curves, states), pairs in zip(grid, counts):
        here = [run for run in runs if run["pairs"] == pairs]
        for mixer in MIXERS:
            group = [run for run in here if run["mixer"] == mixer]
            if not group:
                continue
            sparse, color = mixer.startswith("sparse"), colors[mixer.removeprefix("gated-").removeprefix("sparse-")]
            mark = "D" if sparse else "o"
            for run in group:
                steps, scores = zip([0, 0.0], *run["curve"])
                curves.plot(
                    steps,
                    [wrong(score) for score in scores],
                    color=color,
                    linestyle="--" if sparse else "-",
                    linewidth=1.2,
                    alpha=0.8,
                )
                curves.plot(steps[-1], wrong(scores[-1]), color=color, marker=mark, markersize=4)
            scores, size = [run["accuracy"] for run in group], group[0]["state_bytes"] / 1024
            size *= 1.03 if sparse else 0.97  # both keep the same state: side by side, not one on the other
            states.plot([size, size], [wrong(min(scores)), wrong(max(scores))], color=color, linewidth=1.2)
            states.plot(size, wrong(mean(scores)), color=color, marker=mark, markersize=7, linestyle="", label=mixer)
        of = f"{pairs} pairs in {here[0]['length']} tokens"
        curves.set(xlabel="training steps", ylabel="accuracy on fresh queries", title=f"{of}: a line a seed")
        states.set(
            xlabel="state after one sequence, KiB (float32, all layers)",
            ylabel="final accuracy",
            title="mean and range over seeds",
        )
        states.set_xscale("log", base=2)
        states.xaxis.set_major_formatter("{x:g}")
        ticks = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
        for axes in (curves, states):
            axes.set_yscale("log")
            axes.set_yticks([1 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
            axes.yaxis.set_minor_locator(NullLocator())
            axes.invert_yaxis()
            axes.grid(alpha=0.25)
    figure.legend(*grid[0, 1].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[32, 64], help="key-value pairs, each in 4 tokens a pair (default: 32 64)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default: 3)")
    parser.add_argument("--only", nargs="+", default=MIXERS, metavar="MIXER", help=f"some of {', '.join(MIXERS)}")
    parser.add_argument("--steps", type=int, default=1000, help="most steps of a run (default: 1000)")
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements (default: 50)")
    parser.add_argument(
        "--tokens", type=int, default=3072, help="tokens of a training step (default: 3072, 24 sequences of 32 pairs)"
    )
    parser.add_argument("--segments", type=int, default=4, help="memories that a training sequence is cut into (default: 4)")
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/memory_routing"), help=f"folder for {JSON} and {PICTURE}")
    options = parser.parse_args(argv)
    unknown = [name for name in options.only if name not in MIXERS]
    if unknown:
        parser.error(f"--only has {unknown[0]}, needs some of {', '.join(MIXERS)}")
    for name in ("steps", "seeds", "every", "tokens", "segments", "heads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, needs at least 1")
    torch.set_num_threads(1)  # small products: more threads would only wait for each other
    path, wanted = options.out / JSON, settings(options)
    todo = [
        (mixer, pairs, seed)
        for pairs in options.pairs
        for seed in range(options.seeds)
        for mixer in MIXERS
        if mixer in options.only
    ]
    try:
        for pairs in options.pairs:  # what cannot work is said now, not after an hour
            associative_recall(1, 4 * pairs, pairs, options.vocab_size, torch.Generator())
        for mixer in options.only:
            build(mixer, 4 * min(options.pairs), options)
        options.out.mkdir(parents=True, exist_ok=True)
        runs = load(path, wanted)
        done = {(run["mixer"], run["pairs"], run["seed"]) for run in runs}
        for key in todo:
            if key not in done:
                runs.append(learn(*key, options))
                save(path, wanted, runs)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    draw(runs, options.out / PICTURE)
    print(table(runs))
    print(f"written: {path}, {options.out / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
