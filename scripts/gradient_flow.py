"""Measures how far back the gradient of one token's loss reaches through each memory, beside a plain tanh RNN and softmax attention.

    python scripts/gradient_flow.py sdnc-link-tiny linear-transformer-delta-tiny --out results
    python scripts/gradient_flow.py runs/sdnc/final runs/delta/final --length 1k --out results

The loss is the last token's alone; measured is the norm of its gradient with respect to the hidden state that enters the first block, at
every earlier token (dL/dh_t, the analysis of Kerg et al. 2020). A name of a preset is measured at initialisation, a checkpoint after
training and at initialisation. Writes gradient_flow.json and gradient_flow.png; scripts/report.py draws the JSON into its page.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import memzoo
from memzoo.data.text import load_tokenizer, prose
from memzoo.models.base import MemzooForCausalLM, MemzooModel

JSON, PICTURE = "gradient_flow.json", "gradient_flow.png"


class TanhRNN(nn.RNN):
    """The plain recurrent net as a mixer, h_t = tanh(U x_t + V h_{t-1}), with torch's own starting point; for dense rows only."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, hidden_size, batch_first=True)

    def forward(self, x: Tensor, layout, state=None) -> Tensor:
        return super().forward(x)[0]

    def init_weights(self, init) -> None:
        for parameter in self.parameters():
            init.uniform_(parameter, -(self.hidden_size**-0.5), self.hidden_size**-0.5)


class TanhRNNModel(MemzooModel):
    @staticmethod
    def make_mixer(config, index: int) -> TanhRNN:
        return TanhRNN(config.hidden_size)


class TanhRNNForCausalLM(MemzooForCausalLM):
    model_class = TanhRNNModel


def anchors(like) -> dict[str, nn.Module]:
    """The two ends of the scale, in the block stack and the size of `like`: both memories see the input through the same norms."""
    sizes = {key: getattr(like, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")}
    plain = memzoo.preset("sdnc-tiny", position_embedding="none", initializer_range=like.initializer_range, **sizes)
    return {"plain tanh RNN": TanhRNNForCausalLM(plain), "softmax attention": AutoModelForCausalLM.from_config(plain)}


def gradient_norms(model: nn.Module, ids: Tensor) -> Tensor:
    """Norms of dL/dh_t by lag, [T], for the loss of the last token's prediction, in float64; the mean over sequences.

    Args:
        model: a causal language model.
        ids: [B, T + 1]; T tokens are read, and the last one read predicts the one after it.
    """
    model = model.double().eval().requires_grad_(False)
    hidden = model.get_input_embeddings()(ids[:, :-1]).requires_grad_()
    logits = model(inputs_embeds=hidden, use_cache=False, logits_to_keep=1).logits[:, -1]
    nn.functional.cross_entropy(logits, ids[:, -1], reduction="sum").backward()
    return hidden.grad.norm(dim=-1).flip(1).mean(0)


def by_lag(norms: Tensor) -> tuple[list[int], list[float]]:
    """(lags, norms relative to lag 0): the mean over 2 ** (k / 2) to 2 ** ((k + 1) / 2) tokens, named by the middle one."""
    edges = sorted({1, *(round(2 ** (k / 2)) for k in range(64) if 2 ** (k / 2) < len(norms)), len(norms)})
    relative = norms / norms[0]
    lags, means = [0], [1.0]
    for a, b in zip(edges, edges[1:]):
        lags.append((a + b - 1) // 2)
        means.append(relative[a:b].mean().item())
    return lags, means


def tokens(tokenizer, vocab_size: int, count: int, length: int, seed: int) -> tuple[Tensor, str]:
    """([count, length + 1] token ids, what they are): stretches of held-out prose, or random ones if the tokenizer is not the model's."""
    generator = torch.Generator().manual_seed(seed)
    if tokenizer is None or len(tokenizer) > vocab_size:
        return torch.randint(3, vocab_size, (count, length + 1), generator=generator), "random tokens"
    stream = torch.tensor(tokenizer(prose("test"), add_special_tokens=False, verbose=False).input_ids)
    if len(stream) <= length + 1:
        raise ValueError(f"--length {length} is more than the held-out prose has ({len(stream)} tokens)")
    starts = torch.randint(0, len(stream) - length - 1, (count,), generator=generator)
    return torch.stack([stream[a : a + length + 1] for a in starts.tolist()]), "held-out prose"


def load(spec: str) -> tuple[str, object, str | None]:
    """(name, configuration, folder of the weights if it is a checkpoint); ValueError for what is neither that nor a preset."""
    if spec in memzoo.presets():
        return spec, memzoo.preset(spec), None
    folder = Path(spec)
    if not (folder / "config.json").is_file():
        close = difflib.get_close_matches(spec, memzoo.presets(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ", which memzoo.presets() lists"
        raise ValueError(f"{spec} is neither a checkpoint (a folder with a config.json) nor a preset{hint}")
    name = folder.resolve().parent.name if folder.resolve().name == "final" else folder.resolve().name
    return name, AutoConfig.from_pretrained(folder), str(folder)


def measure(specs: list[str], length: int, count: int, seed: int) -> dict:
    """What gradient_flow.json holds: one curve for every model and time, and the anchors' at initialisation."""
    curves: list[dict] = []
    measured: set[str] = set()

    def add(name: str, when: str, model: nn.Module, ids: Tensor, anchor: bool = False) -> None:
        begun = time.perf_counter()
        lags, norms = by_lag(gradient_norms(model, ids))
        curves.append({"name": name, "when": when, "anchor": anchor, "lags": lags, "norms": [float(f"{x:.6g}") for x in norms]})
        print(f"{name:<36} {when:<14} lag {lags[-1]}: {norms[-1]:.2e} of lag 0's  {time.perf_counter() - begun:.1f} s", flush=True)

    loaded = [load(spec) for spec in specs]
    names = [name for name, *_ in loaded]
    for (name, config, folder), spec in zip(loaded, specs):
        if names.count(name) > 1:
            name = spec
        tokenizer = load_tokenizer(folder if folder and any(Path(folder).glob("tokenizer*")) else None)
        ids, what = tokens(tokenizer, config.vocab_size, count, length, seed)
        measured.add(what)
        if not curves:
            torch.manual_seed(seed)
            for anchor, model in anchors(config).items():
                add(anchor, "initialisation", model, ids, anchor=True)
        torch.manual_seed(seed)
        add(name, "initialisation", AutoModelForCausalLM.from_config(config), ids)
        if folder:
            add(name, "trained", AutoModelForCausalLM.from_pretrained(folder), ids)
    what = f"mean over {count} sequences of {' or '.join(sorted(measured))}, float64, seed {seed}"
    return {"format": 1, "length": length, "measured": what, "versions": {"torch": torch.__version__}, "curves": curves}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="preset names and checkpoint folders")
    parser.add_argument("--length", default="512", help="tokens a sequence, such as 512 or 1k [512]")
    parser.add_argument("--sequences", type=int, default=8, help="sequences to average over [8]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), help=f"folder for {JSON} and {PICTURE} [results]")
    options = parser.parse_args(argv)
    from transformers.utils import logging

    from memzoo.evaluation import parse_length

    logging.disable_progress_bar()
    try:
        length = parse_length(options.length)
        if length < 4 or options.sequences < 1:
            raise ValueError("--length needs at least 4 tokens, --sequences at least 1")
        flow = measure(options.models, length, options.sequences, options.seed)
    except (ValueError, OSError) as error:
        print(f"gradient_flow: {error}", file=sys.stderr)
        return 1
    from memzoo.report.plots import gradient_flow

    options.out.mkdir(parents=True, exist_ok=True)
    rows = ",\n  ".join(json.dumps(curve) for curve in flow.pop("curves"))
    (options.out / JSON).write_text(json.dumps(flow, indent=1)[:-2] + f',\n "curves": [\n  {rows}\n ]\n}}\n')
    flow = json.loads((options.out / JSON).read_text())
    when = "trained" if any(curve["when"] == "trained" for curve in flow["curves"]) else "initialisation"
    gradient_flow(flow, [], when).figure.savefig(options.out / PICTURE, dpi=200)
    print(f"written: {options.out / JSON}, {options.out / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
