"""What every way of scoring shares: loading models and tokenizers, what is written down about them, lengths as people write them."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..data.text import load_tokenizer

__all__ = [
    "check_place",
    "described",
    "device_name",
    "fingerprint",
    "load_model",
    "parse_length",
    "quiet",
    "read_tokenizer",
    "tokenizer_fingerprint",
    "training_tokens",
    "versions",
]


def parse_length(text: str) -> int:
    """ "512", "4k" (4,096) or "1m" (1,048,576) as a number of tokens; ValueError for anything else or less than 1."""
    scale = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text if scale == 1 else text[:-1]
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise ValueError(f"length {text!r} is not a number of tokens such as 512 or 4k")
    return int(digits) * scale


def load_model(path: str | Path, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False):
    """A causal language model in evaluation mode from a folder or a hub name.

    Raises:
        ValueError: nothing there, or not a model, in one line.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import memzoo  # noqa: F401  (after this the Auto classes know every memzoo model)

    name = check_place(path)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown, needs auto, float32, bfloat16 or float16")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"no model could be loaded from {name}: {lines[0]}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def check_place(path: str | Path) -> str:
    """The path or hub name as text; ValueError if it names a folder that is not there or holds no model."""
    name, folder = str(path), Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{name} is not a model: it has no config.json")
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"there is no model at {name}: no such folder")
    return name


def read_tokenizer(tokenizer, trust_remote_code: bool):
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        return load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    return tokenizer


def described(config) -> dict | None:
    """A configuration as JSON holds it, without the path it was loaded from: `path` says that."""
    if config is None:
        return None
    fields = json.loads(config.to_json_string(use_diff=False))
    fields.pop("_name_or_path", None)
    return fields


def device_name(network) -> str:
    import torch

    if network is not None and network.device.type == "cuda":
        return torch.cuda.get_device_name(network.device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("memzoo", "torch", "triton", "transformers", "tokenizers", "datasets", "lm-eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def quiet() -> None:
    """Turn off what lm-eval, transformers and datasets say while they work, errors aside, for command lines with a bar of their own."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fingerprint(model, path: str | Path | None = None) -> str:
    """What tells a model's weights and configuration from any other's, as 16 digits.

    Of a folder's files; of the name and the commit for a model on the hub; of what is in memory for one without a path.

    Raises:
        ValueError: the hub has no such model, or cannot be asked.
    """
    digest = hashlib.sha256()
    folder = Path(path) if path else None
    if folder and folder.is_dir():
        for file in sorted(file for kind in ("config.json", "*.safetensors", "*.bin") for file in folder.glob(kind)):
            digest.update(file.name.encode())
            with file.open("rb") as data:
                while block := data.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()[:16]
    if path:
        from huggingface_hub import HfApi, try_to_load_from_cache

        try:
            commit = HfApi().model_info(str(path)).sha
        except Exception as error:  # offline, or no such model; one that was loaded before can still be run
            held = try_to_load_from_cache(str(path), "config.json")
            if not isinstance(held, str):
                raise ValueError(f"no model could be loaded from {path}: {(str(error).splitlines() or [''])[0]}") from error
            commit = Path(held).parent.name
        return hashlib.sha256(f"{path}@{commit}".encode()).hexdigest()[:16]
    config = described(getattr(model, "config", None))
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    if hasattr(model, "state_dict"):
        import torch

        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        digest.update(type(model).__qualname__.encode())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer) -> str:
    """What tells a fast tokenizer from any other, as 16 digits."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def training_tokens(path: str | Path | None) -> int | None:
    """Tokens that a checkpoint was trained on, as the log of its run beside it says; None if there is none."""
    for folder in (Path(path), Path(path).parent) if path else ():
        try:
            lines = (folder / "log.jsonl").read_text().splitlines()
            known = [row["tokens"] for row in map(json.loads, lines) if "tokens" in row]
            if known:
                return int(known[-1])
        except (OSError, ValueError):
            pass
        try:
            seen = json.loads((folder / "trainer_state.json").read_text()).get("num_input_tokens_seen")
            if seen:
                return int(seen)
        except (OSError, ValueError):
            pass
    return None
