"""Launch parameters without autotuning: one small table a kernel, and what is needed to compile each of its entries without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Triton cannot see the machine's size in these places, so they are stated once: bytes of shared memory one block may take.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
DEFAULT_CAPABILITY = 90


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched: tile sizes (constexpr arguments of the kernel), warps and pipeline stages."""

    num_warps: int
    num_stages: int
    blocks: Mapping[str, int] = field(default_factory=dict)

    def options(self) -> dict[str, int]:
        """Keyword arguments for `kernel[grid](...)`."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


class LaunchTable:
    """Launches by (largest head dimension, lowest compute capability such as 80 for sm_80) that each entry serves."""

    def __init__(self, entries: Mapping[tuple[int, int], Launch]):
        self.entries = dict(entries)

    def lookup(self, head_dim: int, capability: int) -> Launch:
        """The entry with the smallest head dimension that holds `head_dim`, for the highest capability not above `capability`."""
        fitting = [key for key in self.entries if key[0] >= head_dim and key[1] <= capability]
        if not fitting:
            raise ValueError(
                f"no launch for head dimension {head_dim} on capability {capability}; the table has {list(self.entries)}"
            )
        smallest = min(key[0] for key in fitting)
        return self.entries[max(key for key in fitting if key[0] == smallest)]


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability_of(device: torch.device) -> int:
    """The compute capability of a device as one number (90 for sm_90); anything that is no CUDA device counts as sm_90."""
    if device.type != "cuda":
        return DEFAULT_CAPABILITY
    return _capability(device.index if device.index is not None else torch.cuda.current_device())


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class CompileSpec:
    """One launch-table entry as the compiler needs it, so that it can be compiled for any target on a machine without a GPU.

    `signature` maps run-time arguments to Triton types ("*bf16", "i32", "fp32"); `constants` maps constexpr arguments to values
    (tile sizes included, and None for absent pointers); `divisible` names the integers that are multiples of 16 in practice; `spill_limit`
    is what the entry is known to spill, in bytes a thread, where a kernel could not be made to fit the registers.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()
    spill_limit: int = 0
