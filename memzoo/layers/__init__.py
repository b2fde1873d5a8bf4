"""nn.Modules of the memories: projections, convolutions, gates, one operator call and a state; one file per memory."""

from __future__ import annotations

import importlib
from typing import Any

# Where each lives. Loaded when first asked for: some need transformers, and a neural memory alone should not.
_HOMES = {
    "CacheOptions": "caching",
    "ExternalMemory": "external_memory",
    "LayerState": "state",
    "MatrixMemory": "matrix_memory",
    "MemoryAsContext": "memory_as_context",
    "MemoryAsGate": "memory_gate",
    "MemoryGate": "memory_gate",
    "NeuralMemory": "neural_memory",
    "PersistentAttention": "persistent_attention",
    "ReadFromMemory": "external_memory",
    "Router": "caching",
    "ShortConvolution": "convolution",
    "TokenLayout": "layout",
    "VectorMemory": "vector_memory",
    "watch": "neural_memory",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
