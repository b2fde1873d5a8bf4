"""memzoo: memory architectures for sequence models as Triton kernels and Hugging Face models."""

__version__ = "0.1.0"
