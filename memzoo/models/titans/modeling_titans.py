"""Titans: a NeuralMemory in every block of the shared stack, alone or composed with attention (arXiv 2501.00663)."""

from torch import nn

from ...layers.memory_as_context import MemoryAsContext
from ...layers.memory_gate import MemoryAsGate, MemoryGate
from ...layers.neural_memory import NeuralMemory
from ...layers.persistent_attention import PersistentAttention
from ..base import MemzooForCausalLM, MemzooModel
from .configuration_titans import TitansConfig


def _memory(config: TitansConfig) -> NeuralMemory:
    return NeuralMemory(
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
        depth=config.memory_depth,
        expansion=config.memory_expansion,
        residual=config.memory_residual,
        chunk_size=config.chunk_size,
        conv_width=config.conv_width,
        momentum=config.momentum,
        decay=config.decay,
        lr_max=config.lr_max,
        lr_start=config.lr_start,
        momentum_start=config.momentum_start,
        decay_start=config.decay_start,
        max_grad_norm=config.max_grad_norm,
        loss=config.inner_loss,
        persistent=0 if config.variant == "mac" else config.num_persistent_tokens,  # MAC's stand in its attention alone (Eq. 22)
        output_gate=config.output_gate,
        bias=config.attention_bias,
        norm_eps=config.rms_norm_eps,
    )


def _attention(config: TitansConfig, segment: int | None = None) -> PersistentAttention:
    return PersistentAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        persistent=config.num_persistent_tokens,
        window=config.sliding_window if segment is None else None,
        segment=segment,
        conv_width=config.attention_conv_width,
        bias=config.attention_bias,
    )


class TitansModel(MemzooModel):
    config: TitansConfig

    @staticmethod
    def make_mixer(config: TitansConfig, index: int) -> nn.Module:
        if index not in config.memory_layers:
            return _attention(config)
        if config.variant in ("lmm", "mal"):
            return _memory(config)
        gate = MemoryGate(config.hidden_size, config.gate, config.rms_norm_eps)
        if config.variant == "mag":
            return MemoryAsGate(_memory(config), _attention(config), gate)
        attention = _attention(config, config.segment_length)
        return MemoryAsContext(_memory(config), attention, gate, config.segment_length, config.attention_residual)

    @staticmethod
    def make_reader(config: TitansConfig, index: int) -> PersistentAttention | None:
        """MAL: attention over what the memory gave, with a residual connection of its own."""
        return _attention(config) if config.variant == "mal" and index in config.memory_layers else None


class TitansForCausalLM(MemzooForCausalLM):
    config: TitansConfig
    model_class = TitansModel


__all__ = ["TitansConfig", "TitansForCausalLM", "TitansModel"]
