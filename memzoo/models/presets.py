"""Ready configurations by name, family-size: the papers' depths and widths, and small ones that train on a CPU."""

from __future__ import annotations

import difflib
from typing import Any

from .registry import architecture

# Depth, width and heads of 170m to 1.3b: the follow-up papers' (ATLAS, Memory Caching). The MLP's width is ours, chosen so that the
# number of parameters is near the name. Tiny ones have the shipped tokenizer's vocabulary.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "15m": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1152,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    },
    "170m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 16, "intermediate_size": 3072},
    "340m": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "tie_word_embeddings": True,
    },
    "760m": {"hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8, "intermediate_size": 8192},
}

# Titans in small: lengths that a few hundred tokens have several of. With attention beside the memory the MLP gives up its part.
_SHORT = {"chunk_size": 16, "segment_length": 32, "sliding_window": 32, "num_persistent_tokens": 4}
_BESIDE_ATTENTION = {
    "tiny": _SHORT,
    "15m": {"intermediate_size": 512},
    "170m": {"intermediate_size": 1152},
    "340m": {"intermediate_size": 1152},
    "760m": {"intermediate_size": 2048},
    "1.3b": {"intermediate_size": 5120},
}
_DELTA = {"feature_map": "identity", "conv_width": 4, "output_norm": True}

# Memory caching: the paper's pairs of memory and aggregation, and ours. Segments of 256 are the paper's.
_CACHED = {
    **{f"linear-{way}": {"aggregation": way} for way in ("residual", "gated", "sparse")},
    **{f"swla-{way}": {"memory": "swla", "aggregation": way} for way in ("gated", "sparse")},
    **{f"dla-{way}": {"memory": "dla", "aggregation": way} for way in ("gated", "soup", "sparse")},
    **{f"titans-{way}": {"memory": "titans", "aggregation": way} for way in ("gated", "soup", "sparse")},
    "titans-log": {"memory": "titans", "segmentation": "log"},  # the paper's Log-Linear++
    **{f"{cell.replace('_', '-')}-gated": {"memory": cell} for cell in ("lstm", "gru", "gated_linear")},
    "linear-energy": {"routing": "energy"},
    "delta-energy": {"memory": "delta", "routing": "energy"},
}
_SHORT_SEGMENTS = {"segment_length": 32, "chunk_size": 16}


def _smaller(fields: dict[str, Any]) -> dict[str, Any]:
    """What keeps single sizes near their names: an LSTM's or a GRU's gates are more than four projections."""
    return {"760m": {"intermediate_size": 3584}} if fields.get("memory") in ("lstm", "gru") else {}


# Family: model type, what it adds to every size, and what it changes in single sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "sdnc": ("sdnc", {}, {}),
    "sdnc-link": (
        "sdnc",
        {"temporal_links": True, "position_embedding": "none"},
        {"tiny": {"num_hidden_layers": 1}},
    ),
    "linear-transformer": ("linear_transformer", {}, {}),
    "linear-transformer-delta": ("linear_transformer", {**_DELTA, "write_rule": "delta"}, {}),
    "linear-transformer-gated-delta": ("linear_transformer", {**_DELTA, "write_rule": "gated_delta", "output_gate": True}, {}),
    "titans-lmm": ("titans", {"variant": "lmm"}, {"tiny": _SHORT}),
    **{f"titans-{variant}": ("titans", {"variant": variant}, _BESIDE_ATTENTION) for variant in ("mac", "mag", "mal")},
    **{f"mc-{name}": ("mc_rnn", fields, {"tiny": _SHORT_SEGMENTS, **_smaller(fields)}) for name, fields in _CACHED.items()},
}


def presets() -> list[str]:
    """Names of all ready configurations."""
    return [f"{family}-{size}" for family in FAMILIES for size in SIZES]


def preset(name: str, **overrides: Any) -> Any:
    """The configuration of this name, with any field replaced: `preset("sdnc-340m", sliding_window=512)`.

    Raises:
        ValueError: no such name (the close ones are listed), or an override that is no field of the configuration.
    """
    known = presets()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
        raise ValueError(
            f"no preset {name!r}; " + (f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}")
        )
    family, size = name.rsplit("-", 1)
    model_type, common, changes = FAMILIES[family]
    config_class = architecture(model_type).load_config_class()
    for field in overrides:
        if field not in config_class.__dataclass_fields__:
            close = difflib.get_close_matches(field, config_class.__dataclass_fields__, n=3)
            raise ValueError(
                f"{config_class.__name__} has no field {field!r}" + (f"; did you mean {', '.join(close)}?" if close else "")
            )
    return config_class(**{**SIZES[size], **common, **changes.get(size, {}), **overrides})
