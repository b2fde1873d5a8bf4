"""Shows what the temporal links do: one sDNC layer, with and without them, learning multi-query associative recall from scratch.

    python scripts/associative_recall.py --out benchmarks/associative_recall

Writes a JSON of every curve and a picture. One layer, no convolution, no positions: content addressing alone finds the row whose key is
the query's token, and only the forward link tells what was written after it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import memzoo
from memzoo.data.mqar import associative_recall


def accuracy(model, pairs: int, length: int, seed: int) -> float:
    """Share of fresh queries answered with the right value."""
    ids, labels = associative_recall(128, length, pairs, model.config.vocab_size, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        guess = model(ids, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] != -100
    return (guess == labels[:, 1:])[asked].double().mean().item()


def learn(links: bool, seed: int, options: argparse.Namespace) -> dict:
    """Train one layer; its accuracy on fresh sequences every `options.every` steps."""
    torch.manual_seed(seed)
    config = memzoo.preset("sdnc-link-tiny", temporal_links=links, vocab_size=options.vocab_size)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1000 + seed)
    curve, start = [], time.perf_counter()
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, step / 50)
        ids, labels = associative_recall(options.batch, options.length, options.pairs, options.vocab_size, generator)
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % options.every == 0:
            model.eval()
            curve.append([step, accuracy(model, options.pairs, options.length, seed=10**6 + seed)])
            model.train()
            print(f"links {'on ' if links else 'off'}  seed {seed}  step {step:4}  accuracy {curve[-1][1]:.3f}", flush=True)
    return {"links": links, "seed": seed, "curve": curve, "seconds": round(time.perf_counter() - start, 1)}


def draw(runs: list[dict], options: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    for links, color, name in ((True, "#0b6e4f", "with temporal links"), (False, "#b23a48", "without")):
        for i, run in enumerate(run for run in runs if run["links"] == links):
            axes.plot(*zip(*run["curve"]), color=color, label=name if i == 0 else None, alpha=0.9, linewidth=1.8)
    axes.set(
        xlabel="training steps", ylabel="accuracy on fresh sequences", ylim=(-0.02, 1.02),
        title=f"One sDNC layer, associative recall of {options.pairs} pairs in {options.length} tokens",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens a sequence, at least 4 a pair (default: 64)")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("results/associative_recall"), help="folder for the JSON and the picture")
    options = parser.parse_args(argv)
    try:
        runs = [learn(links, seed, options) for links in (True, False) for seed in range(options.seeds)]
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    (options.out / "curves.json").write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")
    draw(runs, options, options.out / "curves.png")
    for links in (True, False):
        last = [run["curve"][-1][1] for run in runs if run["links"] == links]
        print(f"links {'on ' if links else 'off'}: accuracy {min(last):.3f} to {max(last):.3f} after {options.steps} steps")
    print(f"written: {options.out / 'curves.json'}, {options.out / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
