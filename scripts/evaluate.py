"""Scores models on needles in a haystack by length and depth: one table, one JSON file and one heat map.

python scripts/evaluate.py runs/linear runs/titans --suite niah --lengths 512,1k,2k,4k --depths 0,0.25,0.5,0.75,1 --samples 20 --out results
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def reader(kind, several: bool = True):
    """`kind` for argparse, on one text or on parts with commas between them, with the message of its ValueError kept."""

    def read(text: str):
        try:
            return [kind(part.strip()) for part in text.split(",")] if several else kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"depth {text!r} is not a share from 0 to 1")
    return value


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from memzoo.evaluation import DEPTHS, LENGTHS, SUITES, parse_length

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folder or hub name of a causal language model with its tokenizer"
    )
    parser.add_argument(
        "--suite", default="niah", choices=sorted(SUITES), help="which needle tasks (default: niah, RULER's niah_single_2)"
    )
    parser.add_argument("--lengths", type=reader(parse_length), default=list(LENGTHS), help="tokens, such as 512,1k,64k")
    parser.add_argument("--depths", type=reader(share), default=list(DEPTHS), help="shares of the haystack before the needle")
    parser.add_argument("--samples", type=positive, default=10, help="documents for every length and depth (default: 10)")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for results.json and heatmap.png (default: results)"
    )
    parser.add_argument("--tokenizer", help="folder or name; the model's own by default")
    parser.add_argument(
        "--training-length",
        type=reader(parse_length, several=False),
        help="marked in the heat map; the config's training_length by default",
    )
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; a GPU where there is one by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that a model's folder brings with it")
    easier = parser.add_argument_group("difficulty", "easier than RULER, for tiny models; scores are not comparable")
    easier.add_argument("--value-digits", type=int, default=7)
    easier.add_argument("--key-words", type=int, default=2, choices=(1, 2))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("TQDM_DELAY", "3600")  # lm-eval's own bars stay away; read when tqdm is imported
    args = parse(arguments)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from memzoo.evaluation import SUITES, evaluate_niah, heat_map, quiet, save_results

    console = Console(stderr=True)
    quiet()
    results = []
    tasks = SUITES[args.suite]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            total = bar.add_task("loading", total=len(args.models) * len(tasks) * len(set(args.lengths)))
            for model in args.models:
                for task in tasks:
                    name = Path(model).name

                    def report(length: int, row: dict | None, label: str = f"{name} {task}") -> None:
                        bar.update(total, advance=int(row is not None), description=f"{label} at {length:,} tokens")

                    results.append(
                        evaluate_niah(
                            model,
                            args.lengths,
                            args.depths,
                            args.samples,
                            task=task,
                            tokenizer=args.tokenizer,
                            batch_size=args.batch_size,
                            dtype=args.dtype,
                            device=args.device,
                            seed=args.seed,
                            training_length=args.training_length,
                            trust_remote_code=args.trust_remote_code,
                            progress=report,
                            value_digits=args.value_digits,
                            key_words=args.key_words,
                        )
                    )
                    save_results(results, args.out / "results.json")  # what is done is kept, whatever comes after
    except (ValueError, OSError) as error:
        console.print(f"evaluate: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    heat_map(results, args.out / "heatmap.png")
    Console().print(table(results))
    console.print(f"{args.out / 'results.json'}, {args.out / 'heatmap.png'}", highlight=False)
    return 0


def table(results: list[dict]):
    """One line a model and task, one column a length."""
    from rich.table import Table

    lengths = sorted({row["length"] for result in results for row in result["lengths"]})
    grid = Table(title="accuracy by length (tokens)")
    grid.add_column("model", overflow="fold")
    grid.add_column("task", overflow="fold")
    grid.add_column("parameters", justify="right", no_wrap=True)
    for length in lengths:
        grid.add_column(f"{length:,}", justify="right")
    grid.add_column("all", justify="right")
    grid.add_column("seconds", justify="right")
    for result in results:
        by_length = {row["length"]: row["accuracy"] for row in result["lengths"]}
        cells = [f"{by_length[n]:.2f}" if n in by_length else "-" for n in lengths]
        grid.add_row(
            result["name"],
            result["task"],
            f"{result['parameters']:,}",
            *cells,
            f"{result['accuracy']:.2f}",
            f"{result['seconds']:.1f}",
        )
    return grid


if __name__ == "__main__":
    sys.exit(main())
