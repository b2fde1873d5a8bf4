"""Argument checks of the public operators: every error is one line that names the operator, the argument, what it has and what it needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 256, 8
MAX_TOKENS = 2**31 - 1  # token indices are int32 inside kernels; addresses are int64


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    """Raise ValueError unless `tensor` has exactly `shape`; `layout` is how the docstring names its axes, such as "[B, T, H, Dk]"."""
    check_tensor(op, name, tensor)
    if tensor.dim() != len(shape) or any(have != need for have, need in zip(tensor.shape, shape)):
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, needs {layout} = {list(shape)}")


def check_dim(op: str, name: str, tensor: Tensor, dim: int, layout: str) -> None:
    check_tensor(op, name, tensor)
    if tensor.dim() != dim:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, needs {dim} dimensions {layout}")


def check_tokens(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError for an empty batch or time axis, or more tokens than an int32 index can count."""
    batch, length = tensor.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}: B and T must both be at least 1")
    if batch * length > MAX_TOKENS:
        raise ValueError(f"{op}: {name} holds {batch * length} tokens, at most {MAX_TOKENS} fit one call; split the batch")


def check_head_dim(op: str, name: str, size: int) -> None:
    """Raise ValueError unless the head dimension is one that every implementation has: a multiple of 8 from 16 to 256."""
    if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM or size % HEAD_DIM_STEP:
        raise ValueError(
            f"{op}: {name} has head dimension {size}, needs a multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        )


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every given tensor is floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, needs one of float32, bfloat16, float16, float64")


def check_same(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise unless every given tensor has the dtype and the device of `first`."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, {first_name} has {first.dtype}; they must be the same")
        check_device(op, first_name, first, **{name: tensor})


def check_device(op: str, first_name: str, first: Tensor, /, **others: Tensor | None) -> None:
    """Raise unless every given tensor is on the device of `first`."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first_name} is on {first.device}; they must be the same")


def check_cu_seqlens(op: str, cu_seqlens: Tensor | None, batch: int, length: int) -> None:
    """Raise unless `cu_seqlens` is a one-dimensional integer tensor that fits packed input of batch 1.

    The values (starting at 0, never falling, ending at `length`) are checked where reading them costs nothing: on the CPU.
    """
    if cu_seqlens is None:
        return
    check_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}, needs [N + 1] of int32 or int64"
        )
    if batch != 1:
        raise ValueError(f"{op}: cu_seqlens needs packed input of batch 1, got batch {batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or sorted(ends) != ends:
            raise ValueError(f"{op}: cu_seqlens must start at 0, never fall and end at T = {length}, got {ends[:8]}")


def sequence_count(cu_seqlens: Tensor | None, batch: int) -> int:
    """The number of sequences, which is the leading size of every state: N when packed, else the batch."""
    return batch if cu_seqlens is None else cu_seqlens.numel() - 1
