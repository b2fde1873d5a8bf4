"""Configuration of the sDNC; docs/fidelity.md says which part is the paper's and which is ours."""

from __future__ import annotations

from ..configuration import MemzooConfig


class SDNCConfig(MemzooConfig):
    """A causal Transformer seen as a stateless DNC; every extension is a switch that is off by default, and then it is one exactly.

    Args (beside those of MemzooConfig):
        num_key_value_heads: heads of the external memory; None for num_attention_heads.
        position_embedding: "rotary" or "none".
        rope_parameters: transformers' rotary parameters (rope_type, rope_theta, ...).
        sliding_window: rows that a read can see, its own included; None for all.
        learned_key_strength: key strength beta = 1 + softplus(w x + b) a head and token (DNC).
        cosine_addressing: content addressing by cosine similarity (DNC).
        free_gates: retention of old rows as a cumulative log-bias (after the DNC's free gates).
        temporal_links: backward, content and forward reads mixed by read modes (DNC).
        read_steps: reads a layer; beyond 1 each result of reading the keys is the next read key (modern Hopfield iteration).
        add_cross_attention: every block also reads a memory that an encoder wrote (`encoder_hidden_states`).
    """

    model_type = "sdnc"

    num_key_value_heads: int | None = None
    position_embedding: str = "rotary"
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    learned_key_strength: bool = False
    cosine_addressing: bool = False
    free_gates: bool = False
    temporal_links: bool = False
    read_steps: int = 1
    add_cross_attention: bool = False

    def derive(self) -> None:
        super().derive()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def check(self) -> None:
        super().check()
        self._require(
            self.num_key_value_heads >= 1 and self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads {self.num_attention_heads}",
        )
        self._require_one_of("position_embedding", ("rotary", "none"))
        self._require(self.sliding_window is None or self.sliding_window >= 1, "sliding_window", "at least 1, or None")
        self._require(self.read_steps >= 1, "read_steps", "at least 1")
