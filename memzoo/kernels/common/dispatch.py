"""Choice of an operator's implementation: an argument, else the environment variable MEMZOO_KERNELS, else what fits the device."""

from __future__ import annotations

import os

import torch
from torch import Tensor

IMPLEMENTATIONS = ("triton", "chunked", "reference")


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, where kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def resolve_implementation(op: str, implementation: str | None, tensor: Tensor) -> str:
    """Name the implementation to run for `tensor`; what was asked for and cannot run is an error, never replaced by another.

    Raises:
        ValueError: an unknown name, or "triton" for a tensor that no Triton kernel can take.
    """
    asked = implementation if implementation is not None else os.environ.get("MEMZOO_KERNELS") or None
    if asked is None:
        return "triton" if tensor.device.type == "cuda" else "chunked"
    if asked not in IMPLEMENTATIONS:
        origin = "implementation" if implementation is not None else "MEMZOO_KERNELS"
        raise ValueError(f"{op}: {origin} is {asked!r}, needs one of {', '.join(IMPLEMENTATIONS)}")
    if asked == "triton":
        if tensor.device.type not in ("cuda", "meta") and not interpreting():
            raise ValueError(
                f"{op}: implementation 'triton' cannot take a tensor on {tensor.device}; use 'chunked' or 'reference', "
                "or set TRITON_INTERPRET=1 before Python starts"
            )
        if tensor.dtype == torch.float64:
            raise ValueError(f"{op}: implementation 'triton' has no float64 kernels; use 'chunked' or 'reference'")
    return asked
