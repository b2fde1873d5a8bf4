"""From `--model`, `--set` and `--tokenizer` to a model that fits its tokenizer, or one line that says why not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import memzoo

from .errors import BadInput, close_names, refusing
from .settings import Settings

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_tokenizer(settings: Settings) -> Any:
    """The tokenizer named, or the one in the model's folder, or the small one shipped."""
    from memzoo.data import load_tokenizer

    beside = Path(settings.model) / "tokenizer_config.json"
    with refusing(f"--tokenizer {settings.tokenizer}"):
        return load_tokenizer(settings.tokenizer or (settings.model if beside.is_file() else None))


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def build_config(settings: Settings, tokenizer: Any) -> tuple[Any, str | None]:
    """The model's config with `--set` applied, and the folder of its weights (None: new weights).

    A preset takes its vocabulary from the tokenizer; a config or checkpoint keeps its own, which must be large enough.
    """
    name, changes = settings.model, dict(settings.set)
    path = Path(name)
    weights = None
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if name in memzoo.presets():
        with refusing(f"--model {name}"):
            defaults = memzoo.preset(name)
            _check_names(defaults, changes)
            config = memzoo.preset(name, **{"vocab_size": len(tokenizer), **special, **changes})
    else:
        if path.is_dir() and not (path / "config.json").is_file():
            raise BadInput(f"--model {name}: the folder has no config.json")
        if not path.exists() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise BadInput(f"--model {name}: no preset, file or folder has this name{close_names(name, memzoo.presets())}")
        with refusing(f"--model {name}"):
            config = AutoConfig.from_pretrained(name)
            _check_names(config, changes)
            config = type(config).from_dict({**config.to_dict(), **changes})
        if not path.is_file() and (not path.is_dir() or has_weights(path)):
            weights = name
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise BadInput(
            f"--tokenizer {settings.tokenizer or '(shipped)'}: has {len(tokenizer)} tokens, "
            f"the model's vocabulary has {config.get_text_config().vocab_size}"
        )
    return config, weights


def _check_names(config: Any, changes: dict[str, Any]) -> None:
    names = {field.name for field in dataclasses.fields(config)} | set(config.to_dict())
    for key in changes:
        if key not in names:
            raise BadInput(f"--set {key}: {config.model_type} has no such setting{close_names(key, names)}")


def build_model(settings: Settings, tokenizer: Any) -> PreTrainedModel:
    """The model in float32, with new weights drawn from the seed or the checkpoint's own."""
    config, weights = build_config(settings, tokenizer)
    transformers.set_seed(settings.seed)
    with refusing(f"--model {settings.model}"):
        if weights is None:
            model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModelForCausalLM.from_pretrained(weights, config=config, dtype="float32")
    model = model.float()
    model.config.training_length = settings.length  # evaluation marks it
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise BadInput(f"--gradient_checkpointing: {config.model_type} does not support it")
        # transformers 5.17 has the older name only
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    return model
