"""Small configurations of every architecture, with gates that start large so that a leak would show."""

import torch

from memzoo import preset
from memzoo.models.registry import architecture

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 61,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}

_TITANS = {"chunk_size": 4, "segment_length": 6, "sliding_window": 5, "memory_expansion": 2, "attention_conv_width": 0}

CONFIGS = {
    "sdnc": ("sdnc-tiny", {}),
    "sdnc-window": ("sdnc-tiny", {"sliding_window": 5, "num_key_value_heads": 1}),
    "sdnc-link": ("sdnc-link-tiny", {}),
    "sdnc-link-window": ("sdnc-link-tiny", {"sliding_window": 4}),
    "sdnc-extended": (
        "sdnc-link-tiny",
        {
            "num_key_value_heads": 1,
            "position_embedding": "rotary",
            "learned_key_strength": True,
            "cosine_addressing": True,
            "free_gates": True,
            "read_steps": 2,
        },
    ),
    "linear-transformer": ("linear-transformer-tiny", {}),
    "linear-transformer-decay": (
        "linear-transformer-tiny",
        {"decay": True, "normalize": False, "feature_map": "identity", "conv_width": 3, "output_norm": True},
    ),
    "linear-transformer-normalized-decay": (
        "linear-transformer-tiny",
        {"decay": True, "feature_map": "relu", "value_head_dim": 24},
    ),
    "linear-transformer-delta": ("linear-transformer-delta-tiny", {}),
    "linear-transformer-gated-delta": ("linear-transformer-gated-delta-tiny", {}),
    "titans-lmm": ("titans-lmm-tiny", {**_TITANS, "conv_width": 3}),
    "titans-mac": ("titans-mac-tiny", {**_TITANS, "num_persistent_tokens": 2}),
    "titans-mac-mix": (
        "titans-mac-tiny",
        {**_TITANS, "gate": "mix", "memory_layers": [0], "attention_conv_width": 2, "attention_residual": True},
    ),
    "titans-mag": ("titans-mag-tiny", {**_TITANS, "num_key_value_heads": 1}),
    "titans-mal": ("titans-mal-tiny", {**_TITANS, "memory_depth": 1, "num_persistent_tokens": 0, "attention_conv_width": 3}),
}
_CACHED = {"segment_length": 5, "chunk_size": 4, "memory_expansion": 2}
CONFIGS |= {
    "mc-linear": ("mc-linear-gated-tiny", {**_CACHED}),
    "mc-linear-residual": ("mc-linear-residual-tiny", {**_CACHED, "restart": False, "conv_width": 0}),
    "mc-linear-average": ("mc-linear-gated-tiny", {**_CACHED, "aggregation": "average", "segment_length": 3}),
    "mc-swla-sparse": ("mc-swla-sparse-tiny", {**_CACHED, "top_k": 1, "routing": "submax", "segment_length": 4}),
    "mc-linear-low-rank": ("mc-linear-energy-tiny", {**_CACHED, "routing_dim": 16, "head_dim": 24, "restart": False}),
    "mc-delta-capped": ("mc-delta-energy-tiny", {**_CACHED, "max_cached_segments": 2, "segment_length": 3}),
    "mc-gated-delta-sparse": ("mc-linear-sparse-tiny", {**_CACHED, "memory": "gated_delta", "top_k": 2, "routing": "energy"}),
    "mc-dla": ("mc-dla-gated-tiny", {**_CACHED, "restart": False, "segment_length": 6}),
    "mc-titans-soup": ("mc-titans-soup-tiny", {**_CACHED, "conv_width": 0}),
    "mc-titans-sparse": ("mc-titans-sparse-tiny", {**_CACHED, "top_k": 1, "routing": "energy", "offload_cached": True}),
    "mc-titans-residual": ("mc-titans-gated-tiny", {**_CACHED, "aggregation": "residual", "memory_depth": 1}),
    "mc-titans-average": ("mc-titans-gated-tiny", {**_CACHED, "aggregation": "average"}),
    "mc-lstm": ("mc-lstm-gated-tiny", {**_CACHED, "routing": "energy"}),
    "mc-gru-sparse": ("mc-gru-gated-tiny", {**_CACHED, "aggregation": "sparse", "top_k": 1, "restart": False}),
    "mc-gated-linear": ("mc-gated-linear-gated-tiny", {**_CACHED, "conv_width": 0}),
    "mc-base": ("mc-linear-gated-tiny", {**_CACHED, "aggregation": "none"}),
}
NAMES = list(CONFIGS)


def config(name, **overrides):
    base, changes = CONFIGS[name]
    return preset(base, **{**_SMALL, **changes, **overrides})


def model(name, dtype=torch.float32, scale=6.0, **overrides):
    """A causal language model with weights `scale` times the usual: gates far from their starting points, outputs of order one."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config(name, **overrides)).to(dtype).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return built


def for_triton(name):
    """What a configuration needs to run on the kernels: they take chunks of 16 tokens and more."""
    return {"chunk_size": 16} if hasattr(config(name), "chunk_size") else {}


def for_long_input(name):
    """What keeps a configuration with a cache quick at 65,536 tokens: 16 segments, not thousands."""
    return {"segment_length": 4096, "chunk_size": 64} if config(name).model_type == "mc_rnn" else {}


def covered_model_types():
    return {config(name).model_type for name in NAMES}


def architecture_of(name):
    return architecture(config(name).model_type)
