"""Operators: tensors in, tensors out, on torch and Triton alone. See each function's docstring for shapes, options and source."""

from .attention import attention, linked_attention
from .causal_conv1d import causal_conv1d
from .delta_rule import delta_rule
from .gated_scan import gated_scan
from .gru import gru
from .linear_attention import linear_attention
from .lstm import lstm
from .neural_memory import NeuralMemoryState, neural_memory

__all__ = [
    "NeuralMemoryState",
    "attention",
    "causal_conv1d",
    "delta_rule",
    "gated_scan",
    "gru",
    "linear_attention",
    "linked_attention",
    "lstm",
    "neural_memory",
]
