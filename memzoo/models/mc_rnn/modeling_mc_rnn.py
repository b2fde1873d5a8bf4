"""Recurrent models with a cache of memories: a matrix, an MLP or a vector a head in every block of the shared stack (arXiv 2602.24281)."""

import logging
from typing import Any

from torch import nn

from ...layers.caching import CacheOptions
from ...layers.matrix_memory import MatrixMemory
from ...layers.neural_memory import NeuralMemory
from ...layers.vector_memory import VectorMemory
from ..base import MemzooForCausalLM, MemzooModel
from .configuration_mc_rnn import DEEP, VECTORS, MemoryCachingConfig

WRITE_RULES = {"linear": "additive", "swla": "window", "delta": "delta", "gated_delta": "gated_delta"}


def cache_options(config: MemoryCachingConfig) -> CacheOptions | None:
    if config.aggregation == "none":
        return None
    return CacheOptions(
        "log" if config.segmentation == "log" else config.segment_length,
        config.aggregation,
        config.top_k,
        config.restart,
        config.routing,
        config.max_cached_segments,
        config.offload_cached,
    )


class MemoryCachingModel(MemzooModel):
    config: MemoryCachingConfig

    @staticmethod
    def make_mixer(config: MemoryCachingConfig, index: int) -> nn.Module:
        sizes = (config.hidden_size, config.num_attention_heads, config.head_dim)
        shared = {
            "conv_width": config.conv_width,
            "bias": config.attention_bias,
            "norm_eps": config.rms_norm_eps,
            "caching": cache_options(config),
            "routing_dim": config.routing_dim,
        }
        if config.memory in VECTORS:
            return VectorMemory(*sizes, cell=config.memory, **shared)
        if config.memory in DEEP:
            titans = config.memory == "titans"
            return NeuralMemory(
                *sizes,
                depth=config.memory_depth,
                expansion=config.memory_expansion,
                residual=config.memory_residual,
                chunk_size=config.chunk_size,
                momentum=titans,
                decay=titans,
                lr_max=config.lr_max,
                lr_start=config.lr_start,
                momentum_start=config.momentum_start,
                decay_start=config.decay_start,
                max_grad_norm=config.max_grad_norm,
                loss="l2" if titans else "dot",
                output_gate=config.output_gate,
                **shared,
            )
        return MatrixMemory(
            *sizes,
            config.head_dim,
            feature_map="identity",
            normalize=False,
            write_rule=WRITE_RULES[config.memory],
            decay=config.memory in ("swla", "gated_delta"),
            qk_norm=True,
            output_norm=True,
            output_gate=config.output_gate,
            **shared,
        )


class MemoryCachingForCausalLM(MemzooForCausalLM):
    config: MemoryCachingConfig
    model_class = MemoryCachingModel

    def __init__(self, config: MemoryCachingConfig):
        # transformers takes `top_k`, memories that a token reads, for tokens to sample from, and warns that greedy search ignores it.
        logger = logging.getLogger("transformers.generation.configuration_utils")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            super().__init__(config)
        finally:
            logger.setLevel(level)
        self.generation_config.top_k = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate; with logarithmic segments, which keep no state, every new token reads the whole text again."""
        if self.config.segmentation == "log":
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)


__all__ = ["MemoryCachingConfig", "MemoryCachingForCausalLM", "MemoryCachingModel"]
