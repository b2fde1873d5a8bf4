"""The sDNC: an ExternalMemory in every block of the shared stack (arXiv 2603.19272)."""

from ...layers.external_memory import ExternalMemory, ReadFromMemory
from ..base import MemzooForCausalLM, MemzooModel
from .configuration_sdnc import SDNCConfig


class SDNCModel(MemzooModel):
    config: SDNCConfig

    @staticmethod
    def make_mixer(config: SDNCConfig, index: int) -> ExternalMemory:
        return ExternalMemory(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            window=config.sliding_window,
            learned_key_strength=config.learned_key_strength,
            cosine_addressing=config.cosine_addressing,
            free_gates=config.free_gates,
            temporal_links=config.temporal_links,
            read_steps=config.read_steps,
        )

    @staticmethod
    def make_reader(config: SDNCConfig, index: int) -> ReadFromMemory | None:
        if not config.add_cross_attention:
            return None
        return ReadFromMemory(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
        )


class SDNCForCausalLM(MemzooForCausalLM):
    config: SDNCConfig
    model_class = SDNCModel


__all__ = ["SDNCConfig", "SDNCForCausalLM", "SDNCModel"]
