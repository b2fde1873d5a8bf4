"""Turns checkpoints of other libraries into the zoo's: a Llama's weights make an sDNC with the same logits."""

from __future__ import annotations

import os
from typing import Any

# A Llama's parameter names to the sDNC's; the rest are the same.
_NAMES = {
    "self_attn.": "mixer.",
    "input_layernorm.": "mixer_norm.",
    "post_attention_layernorm.": "mlp_norm.",
}


def from_llama(model_or_path: Any) -> Any:
    """An SDNCForCausalLM with a Llama's weights: the same logits, since an sDNC without extensions is a causal Transformer.

    Args:
        model_or_path: a transformers LlamaForCausalLM, or the path or hub name of one.

    Returns:
        SDNCForCausalLM in the Llama's type and on its device, in evaluation mode.

    Raises:
        TypeError: not a Llama.
        ValueError: a Llama that an sDNC cannot be (attention dropout is ignored; a head size no kernel has is refused).
    """
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    from .models.sdnc.modeling_sdnc import SDNCConfig, SDNCForCausalLM

    llama = model_or_path
    if isinstance(llama, (str, os.PathLike)):
        llama = AutoModelForCausalLM.from_pretrained(model_or_path, dtype="auto")
    if not isinstance(llama, LlamaForCausalLM):
        raise TypeError(f"from_llama: got a {type(llama).__name__}, needs a LlamaForCausalLM or a path to one")
    source = llama.config
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias", "mlp_bias",
        "tie_word_embeddings", "rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    config = SDNCConfig(**{name: getattr(source, name) for name in fields}, position_embedding="rotary")
    model = SDNCForCausalLM(config).to(dtype=llama.dtype, device=llama.device)
    weights = {_rename(name): value for name, value in llama.state_dict().items()}
    model.load_state_dict(weights)
    model.generation_config = llama.generation_config
    return model.eval()


def _rename(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name
