"""Configuration of the linear Transformer; the defaults are the paper's (Katharopoulos et al. 2020)."""

from __future__ import annotations

from ..configuration import MemzooConfig

# Held here, not imported from the layer: a configuration must load without torch kernels.
FEATURE_MAPS = ("elu", "relu", "identity")
WRITE_RULES = ("additive", "delta", "gated_delta")


class LinearTransformerConfig(MemzooConfig):
    """A matrix memory a head, read by queries in time and space that do not depend on the length.

    Args (beside those of MemzooConfig):
        value_head_dim: width of a head's values; None for head_dim.
        feature_map: "elu" (elu + 1), "relu" or "identity".
        normalize: divide a read by the summed keys; None for what the write rule allows (additive yes, delta no).
        write_rule: "additive", "delta" (S += beta k (v - S^T k)^T) or "gated_delta" (a decay first).
        decay: data-dependent decay a head and token; None for what the write rule means (gated_delta yes, else no).
        qk_norm: l2-normalise queries and keys; None for yes with delta writes, which need it to stay bounded.
        conv_width: taps of a causal convolution with SiLU after the q, k, v projections; 0 for none.
        output_norm: RMSNorm of each head's read.
        output_gate: multiply the read by SiLU of a projection of the input.
    """

    model_type = "linear_transformer"

    value_head_dim: int | None = None
    feature_map: str = "elu"
    normalize: bool | None = None
    write_rule: str = "additive"
    decay: bool | None = None
    qk_norm: bool | None = None
    conv_width: int = 0
    output_norm: bool = False
    output_gate: bool = False

    def derive(self) -> None:
        super().derive()
        additive = self.write_rule == "additive"
        if self.value_head_dim is None:
            self.value_head_dim = self.head_dim
        if self.normalize is None:
            self.normalize = additive
        if self.decay is None:
            self.decay = self.write_rule == "gated_delta"
        if self.qk_norm is None:
            self.qk_norm = not additive

    def check(self) -> None:
        super().check()
        self._require_one_of("feature_map", FEATURE_MAPS)
        self._require_one_of("write_rule", WRITE_RULES)
        self._require(
            self.write_rule == "additive" or not self.normalize, "normalize", "False with delta writes, which keep no sum of keys"
        )
        self._require(
            not self.normalize or self.feature_map != "identity",
            "feature_map",
            "elu or relu with normalize, whose divisor must not change sign",
        )
        self._require(self.decay or self.write_rule != "gated_delta", "decay", "True with write_rule gated_delta")
        self._require(not self.decay or self.write_rule != "delta", "decay", "False with write_rule delta (gated_delta has it)")
        self._require(0 <= self.conv_width <= 16, "conv_width", "0 to 16")
        self._require_head_dim("value_head_dim")
