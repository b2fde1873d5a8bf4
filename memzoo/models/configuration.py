"""What every configuration of the zoo has: the sizes of the block stack, and saving so that a folder loads without memzoo imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .registry import architecture

SHIM = "modeling_memzoo.py"


class MemzooConfig(PreTrainedConfig):
    """Sizes shared by all architectures. Every field is validated when the configuration is built, and an error names the field.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: hidden width of the gated MLP; None for 8/3 of the width, rounded up to a multiple of 64.
        num_hidden_layers: blocks.
        num_attention_heads: memory heads of a block.
        head_dim: width of a head's keys; None for hidden_size / num_attention_heads.
        hidden_act: the MLP's activation.
        max_position_embeddings: the length the model is meant for (no architecture here fails beyond it).
        initializer_range: standard deviation of the initial weights.
        rms_norm_eps: added to the mean square in every RMSNorm.
        attention_bias, mlp_bias: biases on the memory's and the MLP's projections.
        tie_word_embeddings: the head shares the embedding's weights.
    """

    model_type = "memzoo"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32_000
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_types()
        self.derive()
        self.check()
        # Tools that pass trust_remote_code find the classes through this, and the shim that save_pretrained writes.
        kwargs["auto_map"] = {name: f"{Path(SHIM).stem}.{cls}" for name, cls in architecture(self.model_type).classes.items()}
        super().__post_init__(**kwargs)

    def derive(self) -> None:
        """Fill the fields that were left None from the others."""
        self._require(self.hidden_size >= 1, "hidden_size", "at least 1")
        self._require(self.num_attention_heads >= 1, "num_attention_heads", "at least 1")
        if self.intermediate_size is None:
            self.intermediate_size = 64 * -(-8 * self.hidden_size // (3 * 64))
        if self.head_dim is None:
            self._require(
                self.hidden_size % self.num_attention_heads == 0,
                "num_attention_heads",
                f"a divisor of hidden_size {self.hidden_size}, or head_dim given",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Refuse what cannot work, naming the field."""
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require_head_dim("head_dim")

    def _check_types(self) -> None:
        """Wrong types of numbers and switches first, so that no comparison fails with an error that names no field."""
        for name, field in type(self).__dataclass_fields__.items():
            kinds = {"int": int, "int | None": (int, type(None)), "bool": bool, "bool | None": (bool, type(None)), "str": str}
            kinds |= {"float": (int, float), "float | None": (int, float, type(None))}
            kind = kinds.get(str(field.type))
            value = getattr(self, name)
            if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and "bool" not in str(field.type))):
                raise TypeError(f"{type(self).__name__}: {name} is {value!r}, needs {field.type}")

    def _require(self, holds: bool, field: str, needs: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {field} is {getattr(self, field)!r}, needs {needs}")

    def _require_one_of(self, field: str, choices: tuple[str, ...]) -> None:
        self._require(getattr(self, field) in choices, field, f"one of {', '.join(choices)}")

    def _require_head_dim(self, field: str) -> None:
        size = getattr(self, field)
        self._require(16 <= size <= 256 and size % 8 == 0, field, "a multiple of 8 from 16 to 256 (what the kernels have)")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: a saved folder holds a shim that imports memzoo instead of copies of its files."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save, and write the shim beside it: a few lines that import memzoo, for tools that pass `trust_remote_code=True`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SHIM).write_text(shim(self.model_type))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def shim(model_type: str) -> str:
    """The text of the file that lets a saved folder load with `trust_remote_code=True` where memzoo is installed, not imported."""
    entry = architecture(model_type)
    config, *models = entry.classes.values()
    return (
        '"""Lets this folder load with trust_remote_code=True; needs `pip install memzoo`."""\n\n'
        f"from {entry.config_module} import {config}\n"
        f"from {entry.modeling_module} import {', '.join(models)}\n\n"
        f"__all__ = {[config, *models]!r}\n"
    )
