"""Operators: tensors in, tensors out, on torch and Triton alone. See each function's docstring for shapes, options and source."""

from .attention import attention, linked_attention
from .causal_conv1d import causal_conv1d
from .delta_rule import delta_rule
from .gated_scan import gated_scan
from .gru import gru
from .linear_attention import linear_attention
from .lstm import lstm
from .memory_caching import MemoryCachingState, memory_caching
from .neural_memory import NeuralMemoryState, neural_memory
from .neural_memory_caching import neural_memory_caching
from .vector_caching import vector_caching

__all__ = [
    "MemoryCachingState",
    "NeuralMemoryState",
    "attention",
    "causal_conv1d",
    "delta_rule",
    "gated_scan",
    "gru",
    "linear_attention",
    "linked_attention",
    "lstm",
    "memory_caching",
    "neural_memory",
    "neural_memory_caching",
    "vector_caching",
]
