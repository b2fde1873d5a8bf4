"""The linear Transformer: a MatrixMemory in every block of the shared stack (arXiv 2006.16236; delta writes 2406.06484, 2412.06464)."""

from ...layers.matrix_memory import MatrixMemory
from ..base import MemzooForCausalLM, MemzooModel
from .configuration_linear_transformer import LinearTransformerConfig


class LinearTransformerModel(MemzooModel):
    config: LinearTransformerConfig

    @staticmethod
    def make_mixer(config: LinearTransformerConfig, index: int) -> MatrixMemory:
        return MatrixMemory(
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            config.value_head_dim,
            bias=config.attention_bias,
            feature_map=config.feature_map,
            normalize=config.normalize,
            write_rule=config.write_rule,
            decay=config.decay,
            qk_norm=config.qk_norm,
            conv_width=config.conv_width,
            output_norm=config.output_norm,
            output_gate=config.output_gate,
            norm_eps=config.rms_norm_eps,
        )


class LinearTransformerForCausalLM(MemzooForCausalLM):
    config: LinearTransformerConfig
    model_class = LinearTransformerModel


__all__ = ["LinearTransformerConfig", "LinearTransformerForCausalLM", "LinearTransformerModel"]
