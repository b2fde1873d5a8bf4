"""Watches the neural memories of a Titans model read a text: each token's surprise, the gates, and how large the memory grows.

    python scripts/inspect_memory.py runs/titans-lmm/final --text letter.txt --out results/letter
    python scripts/inspect_memory.py titans-mac-tiny --tokens 64

A model is a checkpoint's folder, or the name of a preset, which is read at its initialisation. Without --text it reads held-out prose.
Surprise is the inner loss of a token before its own write: how badly the memory knew the value of its key. Prints the tokens that most
surprise the layer drawn, and writes inspect_memory.json (every layer and head) and inspect_memory.png.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import memzoo
from memzoo.data.text import load_tokenizer, prose
from memzoo.evaluation.common import load_model, parse_length, quiet, versions
from memzoo.layers.neural_memory import watch

JSON, PICTURE = "inspect_memory.json", "inspect_memory.png"
GATES = {"lr": "step size", "momentum": "momentum kept", "decay": "weights lost"}
UNDER_THE_AXIS = 80  # more tokens than this are numbered, not written out


def load(spec: str, seed: int) -> tuple[nn.Module, str | None]:
    """(model in evaluation mode, the folder its tokenizer may be in); ValueError for what is neither a checkpoint nor a preset."""
    if spec in memzoo.presets():
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(memzoo.preset(spec)).eval(), None
    folder = Path(spec)
    if not folder.exists():
        close = difflib.get_close_matches(spec, memzoo.presets(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ", which memzoo.presets() lists"
        raise ValueError(f"{spec} is neither a checkpoint (a folder with a config.json) nor a preset{hint}")
    return load_model(folder), spec if any(folder.glob("tokenizer*")) else None


def read_text(path: Path | None) -> str:
    """The file's text, or held-out prose; ValueError if there is none to read."""
    if path is None:
        return prose("test")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"--text {path}: the file is empty")
    return text


def encode(tokenizer, text: str, most: int, vocab_size: int) -> Tensor:
    """The first `most` tokens of the text, [1, T]; ValueError if the model does not know one of them."""
    text = text[: 64 * most]  # so much of a long book is enough
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[:, :most]
    if ids.shape[1] == 0:
        raise ValueError("the tokenizer makes no token of the text")
    if ids.max() >= vocab_size:
        raise ValueError(f"the tokenizer gives token {int(ids.max())}, the model knows {vocab_size}: pass its own with --tokenizer")
    return ids


@torch.no_grad()
def inspect(model: nn.Module, ids: Tensor) -> list[dict]:
    """What every neural memory did over `ids` [1, T], in the order of the layers.

    Each has its `name`; `surprise`, `lr`, `momentum` and `decay` by token and head, [T, H]; and `weight_norm` and `momentum_norm` by
    stretch and head, [P, H], after the `tokens` read, [P].

    Raises:
        ValueError: the model has no neural memory.
    """
    with watch(model) as memories:
        model(ids.to(next(model.parameters()).device), use_cache=False)
    return [{"name": name} | {key: value[0].cpu() for key, value in memory.observed.items()} for name, memory in memories.items()]


def most_surprising(pieces: list[str], surprise: Tensor, count: int) -> list[dict]:
    """The `count` tokens of largest surprise [T], largest first, each with what stands around it."""
    rows = []
    for place in surprise.argsort(descending=True)[:count].tolist():
        before, after = "".join(pieces[max(0, place - 6) : place]), "".join(pieces[place + 1 : place + 4])
        rows.append({"place": place, "token": pieces[place], "surprise": surprise[place].item(), "before": before, "after": after})
    return rows


def shown(piece: str) -> str:
    """A token as a label: white space and what cannot be drawn made visible."""
    return "".join({"\n": "⏎", "\t": "⇥"}.get(c, c if c.isprintable() else "·") for c in piece).strip() or "␣"


def table(rows: list[dict]) -> str:
    """Rows of `most_surprising` as text, the token in brackets."""
    lines = ["  place  surprise  token in its place"]
    for row in rows:
        before, after = (row[side].replace("\n", " ") for side in ("before", "after"))
        lines.append(f"{row['place']:7}  {row['surprise']:8.3g}  {before}[{shown(row['token'])}]{after}")
    return "\n".join(lines)


def draw(layers: list[dict], index: int, pieces: list[str], rows: list[dict], title: str, path: Path) -> None:
    """Surprise of every layer, then one layer's surprise, gates and norms over the same tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    from memzoo.report.style import DASHES, HEAT, MARKERS, SERIES, plot_style

    layer, count = layers[index], len(pieces)
    written = count <= UNDER_THE_AXIS
    place = range(count)
    with plot_style():
        heights = [0.5 + 0.16 * len(layers), 1.6, 1.6, 1.6]
        width = max(8.0, 2.5 + 0.15 * count) if written else 11.0
        figure, axes = plt.subplots(
            4, 1, figsize=(width, sum(heights) + 2.2), sharex=True, layout="constrained", height_ratios=heights
        )
        heat = torch.stack([one["surprise"].mean(-1) for one in layers])
        heat = heat / heat.amax(1, keepdim=True).clamp(min=1e-30)
        colours = LinearSegmentedColormap.from_list("surprise", HEAT)
        axes[0].imshow(heat, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        names = [short(one["name"]) for one in layers]
        step = -(-len(layers) // 12)
        axes[0].set_yticks(range(0, len(layers), step), names[::step])
        axes[0].set_title(f"{title}\nSurprise in every layer, as a share of the layer's largest")
        for head in layer["surprise"].T:
            axes[1].plot(place, head, color=SERIES[0], linewidth=0.8, alpha=0.3)
        axes[1].plot(place, layer["surprise"].mean(-1), color=SERIES[0], linewidth=1.5)
        axes[1].plot([row["place"] for row in rows], [row["surprise"] for row in rows], "o", color=SERIES[1], markersize=3.5)
        largest = "\n".join(f"{row['place']:5} {shown(row['token'])}" for row in rows[:12])
        axes[1].text(1.01, 1.0, largest, transform=axes[1].transAxes, va="top", fontsize=7.5, family="DejaVu Sans Mono")
        axes[1].set_title(f"{names[index]}: surprise, mean of the heads (each faint)")
        for series, (name, label) in enumerate(GATES.items()):
            style = {"color": SERIES[series], "linestyle": DASHES[series], "linewidth": 1.2}
            axes[2].plot(place, layer[name].mean(-1), label=label, **style)
        axes[2].set_title(f"{names[index]}: gates, mean of the heads")
        for series, (name, label) in enumerate((("weight_norm", "weights"), ("momentum_norm", "momentum"))):
            ends, norms = layer["tokens"] - 1, layer[name].mean(-1)
            axes[3].plot(ends, norms, color=SERIES[series], marker=MARKERS[series], markersize=4, label=label)
        axes[3].set_title(f"{names[index]}: norms of the state, mean of the heads")
        for ax in axes[1:]:
            ax.set_ylim(bottom=0)
            ax.grid(axis="y")
        for ax in axes[2:]:
            ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes[3].set_xlim(-0.5, count - 0.5)
        if written:
            axes[3].set_xticks(place, [shown(piece) for piece in pieces], rotation=90, fontsize=8)
        else:
            axes[3].set_xlabel("token")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def short(name: str) -> str:
    """ "layer 3" for "model.layers.3.mixer.memory"."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if numbers else name or "memory"


def rounded(values: Tensor) -> list:
    return json.loads(json.dumps(values.tolist()), parse_float=lambda x: float(f"{float(x):.6g}"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder, or a preset's name")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file; without it, held-out prose")
    parser.add_argument("--tokenizer", help="folder or hub name; by default the model's own, or the one that ships with memzoo")
    parser.add_argument("--tokens", default="256", help="tokens to read, such as 512 or 2k [256]")
    parser.add_argument("--layer", type=int, default=-1, help="which of the memories is drawn; -1 is the last one [-1]")
    parser.add_argument("--top", type=int, default=12, help="tokens in the table of the most surprising [12]")
    parser.add_argument("--seed", type=int, default=0, help="of a preset's weights [0]")
    parser.add_argument("--out", type=Path, default=Path("results"), help=f"folder for {JSON} and {PICTURE} [results]")
    options = parser.parse_args(argv)
    quiet()
    try:
        most = parse_length(options.tokens)
        if options.top < 1:
            raise ValueError("--top needs at least 1")
        text = read_text(options.text)
        model, beside = load(options.model, options.seed)
        tokenizer = load_tokenizer(options.tokenizer or beside)
        ids = encode(tokenizer, text, most, model.config.vocab_size)
        layers = inspect(model, ids)
        if not -len(layers) <= options.layer < len(layers):
            raise ValueError(f"--layer {options.layer}: the model has {len(layers)} neural memories, 0 to {len(layers) - 1}")
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"inspect_memory: {error}", file=sys.stderr)
        return 1
    pieces = [tokenizer.decode([token]) for token in ids[0].tolist()]
    index = options.layer % len(layers)
    for layer in layers:
        layer["most_surprising"] = most_surprising(pieces, layer["surprise"].mean(-1), options.top)
    source = str(options.text) if options.text else "held-out prose"
    what = {"format": 1, "model": options.model, "text": source, "drawn": layers[index]["name"], "versions": versions()}
    what["ids"], what["tokens"] = ids[0].tolist(), pieces
    plain = [{name: rounded(value) if isinstance(value, Tensor) else value for name, value in layer.items()} for layer in layers]
    (options.out / JSON).write_text(json.dumps({**what, "layers": plain}, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = layers[index]["most_surprising"]
    draw(layers, index, pieces, rows, f"{options.model} reads {len(pieces)} tokens of {source}", options.out / PICTURE)
    print(f"{options.model}, {short(layers[index]['name'])}: most surprising of {len(pieces)} tokens of {source}")
    print(table(rows))
    print(f"written: {options.out / JSON}, {options.out / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
