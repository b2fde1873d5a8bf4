"""Every architecture of the zoo: its model type, and where its classes live. One entry here is all that registers one."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Names of one architecture; `prefix` starts its class names (SDNC: SDNCConfig, SDNCModel, SDNCForCausalLM)."""

    model_type: str
    prefix: str

    @property
    def config_module(self) -> str:
        return f"memzoo.models.{self.model_type}.configuration_{self.model_type}"

    @property
    def modeling_module(self) -> str:
        return f"memzoo.models.{self.model_type}.modeling_{self.model_type}"

    @property
    def classes(self) -> dict[str, str]:
        """Auto class to the name of the class that serves it."""
        return {
            "AutoConfig": f"{self.prefix}Config",
            "AutoModel": f"{self.prefix}Model",
            "AutoModelForCausalLM": f"{self.prefix}ForCausalLM",
        }

    def load_config_class(self) -> Any:
        return getattr(importlib.import_module(self.config_module), self.classes["AutoConfig"])


ARCHITECTURES = (
    Architecture("sdnc", "SDNC"),
    Architecture("linear_transformer", "LinearTransformer"),
    Architecture("titans", "Titans"),
    Architecture("mc_rnn", "MemoryCaching"),
)


def architecture(model_type: str) -> Architecture:
    """The architecture of a model type; KeyError if the zoo has none."""
    for entry in ARCHITECTURES:
        if entry.model_type == model_type:
            return entry
    raise KeyError(f"no architecture {model_type!r}; the zoo has {', '.join(a.model_type for a in ARCHITECTURES)}")
