"""Configuration of Titans; docs/fidelity.md says which part is the paper's and which is ours."""

from __future__ import annotations

from ..configuration import MemzooConfig

# Held here, not imported from the layers: a configuration must load without torch kernels.
VARIANTS = ("lmm", "mac", "mag", "mal")
GATES = ("product", "mix")
LOSSES = ("l2", "dot")


class TitansConfig(MemzooConfig):
    """A neural memory that learns at test time, alone or with attention. What the paper gives no value for is marked with *.

    Args (beside those of MemzooConfig):
        variant: "lmm" (the memory alone), "mac" (memory as context), "mag" (as gate) or "mal" (as layer).
        memory_layers: layers that have a neural memory; None for all. The others have attention alone.
        memory_depth: layers of a memory, 1 for a matrix; the paper recommends 2 or more.
        memory_expansion: hidden width of the memory's MLP over head_dim*; 4 in the follow-up papers.
        memory_residual: M(x) = x + MLP(x)*; None for yes with two layers or more.
        chunk_size: tokens whose inner gradients are taken at the same weights*; part of the model.
        inner_loss: "l2" (the paper's) or "dot".
        momentum, decay: the two terms of the update; off for ablations.
        lr_max: largest step size*.
        lr_start, momentum_start, decay_start: where the gates start*, lr_start as a share of lr_max; between 0 and 1. lr_start None for
            1 / chunk_size, with which a chunk of keys that are all alike takes one whole step.
        max_grad_norm: clamp of one token's inner gradient*; None for none, which diverges on long input.
        conv_width: taps of the convolutions after the memory's q, k, v projections* (4 in the follow-up papers); 0 for none.
        attention_conv_width: the same for attention's projections, without SiLU; None for conv_width.
        output_gate: SiLU gate on what the memory reads, before its output projection.
        num_persistent_tokens: learned vectors that stand before every sequence*; 0 for none.
        segment_length: tokens of a segment of MAC*.
        attention_residual: MAC writes and reads its memory with x + Attn(...) instead of Attn(...) alone.
        sliding_window: tokens that attention sees in MAG, MAL and in layers without a memory*, its own included.
        gate: how MAC and MAG bring attention and memory together: "product" or "mix".
        num_key_value_heads: heads of attention's keys and values; None for num_attention_heads.
        position_embedding: "rotary" or "none", of the attention*; None for rotary where there is attention.
        rope_parameters: transformers' rotary parameters (rope_type, rope_theta, ...).
    """

    model_type = "titans"

    variant: str = "mac"
    memory_layers: list[int] | None = None
    memory_depth: int = 2
    memory_expansion: int = 4
    memory_residual: bool | None = None
    chunk_size: int = 64
    inner_loss: str = "l2"
    momentum: bool = True
    decay: bool = True
    lr_max: float = 1.0
    lr_start: float | None = None
    momentum_start: float = 0.5
    decay_start: float = 0.001
    max_grad_norm: float | None = 1.0
    conv_width: int = 4
    attention_conv_width: int | None = None
    output_gate: bool = True
    num_persistent_tokens: int = 16
    segment_length: int = 256
    attention_residual: bool = False
    sliding_window: int = 512
    gate: str = "product"
    num_key_value_heads: int | None = None
    position_embedding: str | None = None
    rope_parameters: dict | None = None

    def derive(self) -> None:
        super().derive()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.memory_layers is None:
            self.memory_layers = list(range(self.num_hidden_layers))
        if self.attention_conv_width is None:
            self.attention_conv_width = self.conv_width
        if self.position_embedding is None:
            alone = self.variant == "lmm" and len(self.memory_layers) == self.num_hidden_layers
            self.position_embedding = "none" if alone else "rotary"
        if self.memory_residual is None:
            self.memory_residual = self.memory_depth > 1

    def check(self) -> None:
        super().check()
        self._require_one_of("variant", VARIANTS)
        self._require_one_of("gate", GATES)
        self._require_one_of("inner_loss", LOSSES)
        self._require_one_of("position_embedding", ("rotary", "none"))
        for name in ("memory_depth", "memory_expansion", "chunk_size", "segment_length"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(not self.attention_residual or self.variant == "mac", "attention_residual", "False but in MAC")
        self._require(self.sliding_window >= 2, "sliding_window", "at least 2")
        self._require(self.num_persistent_tokens >= 0, "num_persistent_tokens", "at least 0")
        for name in ("conv_width", "attention_conv_width"):
            self._require(0 <= getattr(self, name) <= 16, name, "0 to 16")
        self._require(self.lr_max > 0, "lr_max", "a number above 0")
        for name in ("lr_start", "momentum_start", "decay_start"):
            start = getattr(self, name)
            self._require((start is None and name == "lr_start") or 0 < start < 1, name, "a number between 0 and 1")
        self._require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "a number above 0, or None")
        layers = self.memory_layers
        self._require(
            sorted(set(layers)) == sorted(layers) and all(0 <= i < self.num_hidden_layers for i in layers),
            "memory_layers",
            f"different layers from 0 to {self.num_hidden_layers - 1}",
        )
        self._require(
            self.num_key_value_heads >= 1 and self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads {self.num_attention_heads}",
        )
