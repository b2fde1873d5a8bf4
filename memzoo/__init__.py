"""memzoo: memory architectures for sequence models as Triton kernels and Hugging Face models.

`import memzoo` makes transformers' Auto classes know every architecture here, whichever of the two is imported first, and costs next to
nothing: neither transformers nor a modelling file is loaded before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _register

if TYPE_CHECKING:
    from .caching import enable_memory_caching
    from .models.presets import preset, presets

__version__ = "0.1.0"
__all__ = ["__version__", "enable_memory_caching", "preset", "presets"]

# Public names and the modules that hold them, imported at first use.
_LAZY = {"enable_memory_caching": ".caching", "preset": ".models.presets", "presets": ".models.presets"}
_SUBMODULES = ("convert", "data", "evaluation", "kernels", "layers", "models", "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_SUBMODULES])


_register.install()
