"""Operators: tensors in, tensors out, on torch and Triton alone. See each function's docstring for shapes, options and source."""

from .causal_conv1d import causal_conv1d

__all__ = ["causal_conv1d"]
