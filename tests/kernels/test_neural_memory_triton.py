"""neural_memory, the Triton form at depth 2 and the gates that both depths share: against the chunked form and the definition."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example

from memzoo.kernels import neural_memory
from memzoo.kernels.neural_memory import NeuralMemoryState

CHUNK = 16
PARTS = ("weights", "momentum", "start")


def example(batch=2, length=37, heads=2, dim=16, hidden=32, value_dim=None, dtype=torch.float32, count=None, state=False, calm=1.0):
    """Tensor arguments by name; a state's tensors are called weights0 to start1, the weights of a call without one w0 and w1."""
    value_dim = dim if value_dim is None else value_dim
    shapes = ((heads, dim, hidden), (heads, hidden, value_dim))
    tensors = {
        "q": F.normalize(torch.randn(batch, length, heads, dim), dim=-1).to(dtype),
        "k": F.normalize(torch.randn(batch, length, heads, dim), dim=-1).to(dtype),
        "v": torch.randn(batch, length, heads, value_dim, dtype=dtype),
        "lr": calm * torch.rand(batch, length, heads),
        "momentum": torch.rand(batch, length, heads),
        "decay": 0.3 * torch.rand(batch, length, heads),
    }
    for i, shape in enumerate(shapes):
        if not state:
            tensors[f"w{i}"] = torch.randn(shape) / shape[1] ** 0.5
        for part in PARTS if state else ():
            tensors[f"{part}{i}"] = torch.randn(batch if count is None else count, *shape) / shape[1] ** 0.5
    return tensors


def run(q, k, v, lr, momentum, decay, position=None, implementation=None, **options):
    """neural_memory on the arguments of `example`."""
    held = {name: options.pop(name) for name in list(options) if name[:-1] in ("w", *PARTS)}
    depth = len(held) if position is None else len(held) // 3
    if position is None:
        weights, state = tuple(held[f"w{i}"] for i in range(depth)), None
    else:
        state = NeuralMemoryState(*(tuple(held[f"{part}{i}"] for i in range(depth)) for part in PARTS), position)
        weights = tuple(w[0] for w in state.weights)
    y, state = neural_memory(
        q, k, v, lr, momentum, decay, weights, chunk_size=CHUNK, initial_state=state, implementation=implementation, **options
    )  # fmt: skip
    return (y,) if state is None else (y, *state[:3])


def compare(args, options, bound=None, gradient_bound=None):
    assert_grads_close(run, args, options, "triton", "chunked", bound, gradient_bound)
