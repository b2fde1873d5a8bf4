"""Every setting of a training run: one dataclass, read from a YAML file and from flags, where a flag wins over the file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import BadInput, close_names, refusing


def _field(default: Any, text: str, *, group: str, choices: tuple | None = None, free: bool = False, **more: Any) -> Any:
    """A field with its help. `free` settings may differ when a run is resumed: they do not change its losses."""
    return dataclasses.field(default=default, metadata=_meta(text, group, choices, free, **more))


def _meta(text: str, group: str, choices: tuple | None = None, free: bool = False, **more: Any) -> dict[str, Any]:
    return {"help": text, "group": group, "choices": choices, "free": free, **more}


@dataclasses.dataclass
class Settings:
    """The settings of one run. Field order is the order of `--help`."""

    model: str = _field(
        "", "a preset's name, a config file or folder (new weights), or a checkpoint folder (its weights)", group="model"
    )
    set: dict = dataclasses.field(
        default_factory=dict, metadata=_meta("values of the model's config to change, as key=value ...", "model")
    )
    tokenizer: str = _field("", "tokenizer folder or hub name; the small one shipped with memzoo if empty", group="model")

    dataset: str = _field(
        "",
        "a hub name, a local text, JSON Lines or Parquet file, folder or glob, `prose` (the prose shipped), or `needles` "
        "(needle-in-a-haystack documents, generated as they are read)",
        group="data",
    )
    dataset_config: str = _field("", "configuration of a hub dataset", group="data")
    split: str = _field("train", "split of a hub dataset", group="data")
    text_column: str = _field("text", "the column that holds the text", group="data")
    eval_dataset: str = _field("", "evaluation data, as --dataset; a part of --dataset is held out if empty", group="data")
    eval_fraction: float = _field(0.01, "part of the data held out for evaluation, 0 for none", group="data")
    length: int = _field(512, "tokens of a training sequence", group="data")
    packing: str = _field(
        "concat",
        "concat: documents run on into each other; apart: they share a row but do not see each other (cu_seqlens)",
        group="data",
        choices=("concat", "apart"),
    )
    needles: dict = dataclasses.field(
        default_factory=dict,
        metadata=_meta("options of the needle generator, as key=value ... (see memzoo.data.needle_documents)", "data"),
    )
    text_loss: float = _field(
        0.0, "needles only: weight of the loss on the haystack's tokens, where an answer's tokens have 1", group="data"
    )
    workers: int = _field(0, "processes that prepare data beside the training process", group="data", free=True)

    steps: int = _field(1000, "optimizer steps", group="optimisation")
    batch_size: int = _field(8, "sequences a process takes in one forward", group="optimisation")
    gradient_accumulation: int = _field(1, "forwards a process makes in one optimizer step", group="optimisation")
    learning_rate: float = _field(1e-3, "peak learning rate of AdamW", group="optimisation")
    final_learning_rate: float = _field(0.1, "where the cosine ends, as a part of the peak", group="optimisation")
    warmup: int = _field(100, "steps of linear warm-up", group="optimisation")
    weight_decay: float = _field(0.1, "AdamW's decay of matrices (norms, biases and vectors have none)", group="optimisation")
    beta1: float = _field(0.9, "AdamW's first moment", group="optimisation")
    beta2: float = _field(0.95, "AdamW's second moment", group="optimisation")
    clip: float = _field(1.0, "largest norm of the gradient, 0 for no clipping", group="optimisation")
    seed: int = _field(0, "seed of weights, order of examples and needles", group="optimisation")

    precision: str = _field("auto", "auto: bf16 on a GPU that has it, else fp32", group="machine", choices=("auto", "fp32", "bf16"))
    gradient_checkpointing: bool = _field(False, "recompute activations in the backward to save memory", group="machine")
    compile: bool = _field(False, "torch.compile the model", group="machine")

    output: str = _field("", "folder of the run: settings, log.jsonl, checkpoints/, final/", group="output", free=True)
    resume: str = _field(
        "",
        "go on from the run's last checkpoint, or from the given step's; starts anew where there is none",
        group="output",
        free=True,
        optional="latest",
    )
    overwrite: bool = _field(False, "throw away the run that is in the output folder", group="output", free=True)
    save_every: int = _field(500, "steps between checkpoints, 0 for none", group="output", free=True)
    keep: int = _field(2, "checkpoints to keep, the newest ones", group="output", free=True)
    stop_after: int = _field(0, "save and stop after this step, to go on later; 0 for never", group="output", free=True)
    log_every: int = _field(10, "steps between lines of the log", group="output", free=True)
    eval_every: int = _field(250, "steps between evaluations (there is one at the end too), 0 for none", group="output", free=True)
    eval_examples: int = _field(256, "sequences of an evaluation at most", group="output", free=True)
    tracker: str = _field(
        "auto",
        "tracker that Accelerate knows (tensorboard, wandb, ...); auto: TensorBoard if installed",
        group="output",
        free=True,
    )

    def identity(self) -> dict[str, Any]:
        """The settings that decide the losses: a resumed run must agree on them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["free"]}

    def check(self) -> Settings:
        """Refuse values that no run can have; returns self."""
        for name in ("model", "dataset", "output"):
            if not getattr(self, name):
                raise BadInput(f"--{name} is missing: {_FIELDS[name].metadata['help']}")
        for name in ("length", "steps", "batch_size", "gradient_accumulation", "keep", "log_every", "eval_examples"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} is {getattr(self, name)}, needs at least 1")
        for name in ("workers", "warmup", "weight_decay", "clip", "save_every", "eval_every", "stop_after", "text_loss", "seed"):
            if getattr(self, name) < 0:
                raise BadInput(f"--{name} is {getattr(self, name)}, needs at least 0")
        for name in ("beta1", "beta2", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"--{name} is {getattr(self, name)}, needs to be at least 0 and less than 1")
        if not self.learning_rate > 0:
            raise BadInput(f"--learning_rate is {self.learning_rate}, needs to be more than 0")
        if self.length < 2:
            raise BadInput("--length is 1, needs at least 2: one token to read and one to predict")
        if self.resume and self.overwrite:
            raise BadInput("--resume and --overwrite exclude each other")
        return self


_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def _value(name: str, value: Any, where: str) -> Any:
    """`value` as the field's type, or one line that says what is wrong."""
    field = _FIELDS[name]
    kind = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict}[field.type]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with refusing(f"{where}: {name} is {value!r}, needs a number", ValueError):
            value = float(value)  # YAML reads 3e-3 as a string
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if kind is dict and value is None:
        value = {}
    if kind is str and value is None:
        value = ""
    if "optional" in field.metadata and isinstance(value, bool):
        value = field.metadata["optional"] if value else ""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadInput(f"{where}: {name} is {value!r}, needs {kind.__name__}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise BadInput(f"{where}: {name} is {value!r}, needs one of {', '.join(choices)}")
    return value


def _pairs(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`["hidden_size=128", ...]` as a dictionary of YAML values."""
    out = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise BadInput(f"--{flag} {pair}: needs key=value")
        value = yaml.safe_load(text)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        out[key] = value
    return out


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"--config {path}: there is no such file")
    with refusing(f"--config {path}", yaml.YAMLError, UnicodeDecodeError):
        values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise BadInput(f"--config {path}: needs a mapping of settings, has a {type(values).__name__}")
    for name in values:
        if name not in _FIELDS:
            raise BadInput(f"--config {path}: there is no setting {name!r}{close_names(str(name), _FIELDS)}")
    return {name: _value(name, value, f"--config {path}") for name, value in values.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Train a causal language model of memzoo (or any that transformers knows), under `accelerate launch` or alone.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below; flags win over it")
    groups: dict[str, Any] = {}
    for field in _FIELDS.values():
        meta = field.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        default = {} if field.type == "dict" else field.default
        shown = "" if default in ("", {}) else f" [{default}]"
        options: dict[str, Any] = {"default": None, "help": (meta["help"] + shown).replace("%", "%%")}
        if field.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif field.type == "dict":
            options |= {"nargs": "+", "metavar": "KEY=VALUE", "action": "extend"}
        elif meta["choices"]:
            options["choices"] = meta["choices"]
        else:
            options |= {"type": {"int": int, "float": float, "str": str}[field.type], "metavar": field.type.upper()}
        if "optional" in meta:
            options |= {"nargs": "?", "const": meta["optional"], "metavar": "STEP"}
        group.add_argument(f"--{field.name}", **options)
    return parser


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Read flags and the file that --config names; raises BadInput in one line for anything that does not fit."""
    import sys

    argv = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(argv):  # --batch-size is --batch_size
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            argv[i] = "--" + flag[2:].replace("-", "_") + equals + value
            if argv[i].startswith("--no_"):
                argv[i] = "--no-" + argv[i][5:]
    parsed, unknown = _parser().parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise BadInput(f"there is no setting {flag}{close_names(flag.lstrip('-'), _FIELDS)}")
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    path = given.pop("config", None)
    values = _read_yaml(Path(path)) if path else {}
    for name, value in given.items():
        if _FIELDS[name].type == "dict":
            values[name] = {**values.get(name, {}), **_pairs(name, value)}
        else:
            values[name] = _value(name, value, f"--{name}")
    return Settings(**values).check()


def write_settings(settings: Settings, path: Path) -> None:
    """Keep the settings beside the run, as YAML that --config reads back."""
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ("resume", "overwrite")}
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))


def read_settings(path: Path) -> Settings:
    """The settings of the run in whose folder `path` lies."""
    return Settings(**_read_yaml(path))
