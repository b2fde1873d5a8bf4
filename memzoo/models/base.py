"""The block stack that every architecture shares: embedding, blocks, head, loss, padding, packing, cache and generation, once.

An architecture brings a mixer (`make_mixer`); everything else is here. A block is x + mixer(norm(x)), then x + mlp(norm(x)).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple, logging

from ..kernels.common.packing import token_positions
from ..layers.flops import projection_flops
from ..layers.layout import TokenLayout, indices_of_real_tokens
from ..layers.state import LayerState
from .cache import MemoryCache
from .configuration import MemzooConfig

logger = logging.get_logger(__name__)


class MemzooBlock(GradientCheckpointingLayer):
    """One memory and one gated MLP, each behind an RMSNorm and a residual connection; between them, where an architecture has one, a
    reader: of what an encoder wrote, or of what the memory made of the tokens."""

    def __init__(self, config: MemzooConfig, mixer: nn.Module, reader: nn.Module | None = None):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = mixer
        self.reader_norm = None if reader is None else nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.reader = reader
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden_states: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        hidden_states = hidden_states + self.mixer(self.mixer_norm(hidden_states), layout, state)
        if self.reader is not None:
            hidden_states = hidden_states + self.reader(self.reader_norm(hidden_states), layout, state)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))

    def memories(self) -> list[nn.Module]:
        """The parts that keep something of the tokens between calls."""
        return [part for part in (self.mixer, self.reader) if hasattr(part, "state_bytes")]


class MemzooPreTrainedModel(PreTrainedModel):
    """Weights, saving and loading of every architecture."""

    config: MemzooConfig  # transformers reads this annotation, so this file must not postpone annotations
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemzooBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True  # no rollback, so `generate` refuses assisted decoding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: a saved folder holds a shim that imports memzoo instead of copies of its files."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.RMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        # Each module starts its own parameters: transformers marks a child's as done before it comes to the parent.
        if hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
            module.init_weights(init)

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Bytes that one sequence of `length` tokens keeps between calls, in all layers; `dtype` defaults to the weights' type."""
        if length < 0:
            raise ValueError(f"{type(self).__name__}.state_bytes: length is {length}, needs at least 0")
        itemsize = (dtype or self.dtype).itemsize
        return sum(part.state_bytes(length, itemsize) for block in self.base_model.layers for part in block.memories())

    def flops_per_token(self, length: int) -> float:
        """FLOPs of one token of a forward pass, averaged over the tokens of one sequence of `length`; a multiply-add is 2.

        Counted: every product of a token's vectors with weights (projections, convolutions, MLP, head) and with what is remembered
        (states, rows), as the memory's definition makes them token by token. A write of a product into a state, S += k v^T, is a
        multiply-add an element. Attention counts the rows that a token really sees: half the length on average, or its window.
        Left out: look-ups of embeddings, whatever is element-wise (norms, gates, decays, activations, softmax, rotary embedding, biases),
        and reads of an encoder's states. The chunked forms and kernels, which trade operations for parallelism, do more.

        Raises:
            ValueError: a length below 1.
        """
        if length < 1:
            raise ValueError(f"{type(self).__name__}.flops_per_token: length is {length}, needs at least 1")
        layers = self.base_model.layers
        blocks = sum(part.flops_per_token(length) for block in layers for part in block.memories())
        blocks += sum(projection_flops(block.mlp) for block in layers)
        head = getattr(self, "lm_head", None)
        return float(blocks + (0 if head is None else projection_flops(head)))


class MemzooModel(MemzooPreTrainedModel):
    """The block stack without a head. Subclasses say which mixer a layer has."""

    def __init__(self, config: MemzooConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            MemzooBlock(config, self.make_mixer(config, index), self.make_reader(config, index))
            for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        rotary = getattr(config, "position_embedding", "none") == "rotary"
        self.rotary_emb = LlamaRotaryEmbedding(config) if rotary else None
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def make_mixer(config: Any, index: int) -> nn.Module:
        """The memory of layer `index`: called as mixer(hidden_states, layout, state), with the methods `state_bytes(length, itemsize)`
        and `flops_per_token(length)`."""
        raise TypeError("MemzooModel is the base of the architectures; build one of them, such as SDNCModel")

    @staticmethod
    def make_reader(config: Any, index: int) -> nn.Module | None:
        """What stands between the memory and the MLP of layer `index`, called as the mixer is; None where there is no such thing. One
        that keeps something between calls has the mixer's methods."""
        return None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token; zeros at pads.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, hidden_size].
            attention_mask: [B, T], or [B, past + T] with a cache; 0 at pads, which may stand anywhere.
            position_ids: [B, T]; worked out from the mask or the cache if None. Without a mask, in a batch of 1, positions that start
                again at 0 mean packed sequences.
            past_key_values: a MemoryCache, grown in place.
            cu_seqlens: boundaries [N + 1] of sequences packed into a batch of 1; also taken as `cu_seq_lens_q`, the name that
                transformers' packing collators give.
            encoder_hidden_states: what a read-from memory holds, [B, S, hidden_size], with encoder_attention_mask [B, S]; only for
                configurations with `add_cross_attention`, and only needed by the first call of a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__}: give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if batch == 0 or length == 0:
            raise ValueError(
                f"{type(self).__name__}: input has shape {[batch, length]}, needs at least one sequence and at least one token"
            )
        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        if past_key_values is not None and not isinstance(past_key_values, MemoryCache):
            raise TypeError(
                f"{type(self).__name__}: past_key_values is a {type(past_key_values).__name__}, needs a memzoo.models.cache.MemoryCache"
            )
        packed = cu_seqlens is not None or (
            position_ids is not None and batch == 1 and attention_mask is None and past_key_values is None and length > 1
        )
        if packed and cu_seqlens is None:
            cu_seqlens = _boundaries(position_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and self.gradient_checkpointing and use_cache:
            logger.warning_once("use_cache is off while gradients are checkpointed")
            use_cache = False
        if cu_seqlens is not None:
            if past_key_values is not None:
                raise ValueError(
                    f"{type(self).__name__}: packed sequences (cu_seqlens) cannot extend a cache; run them without one"
                )
            if batch != 1:
                raise ValueError(f"{type(self).__name__}: cu_seqlens needs a batch of 1, got {batch}")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = MemoryCache(self.config)
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)

        hidden_states, layout, places, real = self._lay_out(
            inputs_embeds, attention_mask, position_ids, past_key_values, cu_seqlens
        )
        if encoder_hidden_states is not None:
            if not getattr(self.config, "add_cross_attention", False):
                raise ValueError(f"{type(self).__name__}: encoder_hidden_states need a configuration with add_cross_attention=True")
            layout = replace(layout, encoded=(encoder_hidden_states, encoder_attention_mask))
        collected = []
        for index, block in enumerate(self.layers):
            if output_hidden_states:
                collected.append(_scatter(hidden_states, places, batch, length))
            state = None if past_key_values is None else past_key_values.layers[index].state
            hidden_states = block(hidden_states, layout, state)
        if past_key_values is not None:
            past_key_values.advance(length, real)
        hidden_states = _scatter(self.norm(hidden_states), places, batch, length)
        if output_hidden_states:
            collected.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(collected) if output_hidden_states else None,
        )

    def _lay_out(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: MemoryCache | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, TokenLayout, Tensor | None, Tensor | None]:
        """(states to run, their layout, flat places of the real tokens if pads were removed, real tokens of each row if so)."""
        batch, length = embeds.shape[:2]
        device = embeds.device
        places = real = None
        if mask is not None:
            past = 0 if cache is None else cache.get_seq_length()
            if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
                raise ValueError(
                    f"{type(self).__name__}: attention_mask has shape {list(mask.shape)}, needs [B, past + T] = {[batch, past + length]}"
                )
            if cu_seqlens is not None:
                mask = None  # packed rows hold no pads; collators give a mask of ones with them
        if cu_seqlens is not None:
            if position_ids is None:
                position_ids = token_positions(cu_seqlens, length)[None]
        elif mask is not None and not bool((mask[:, -length:] != 0).all()):
            places, cu_seqlens = indices_of_real_tokens(mask[:, -length:])
            real = cu_seqlens[1:] - cu_seqlens[:-1]
        if position_ids is None:
            position_ids = torch.arange(length, device=device).expand(batch, length)
            if places is not None:
                position_ids = (mask[:, -length:] != 0).long().cumsum(1) - 1
            if cache is not None:
                had = cache.get_seq_length() if cache.tokens is None else cache.tokens[:, None]
                position_ids = position_ids + had
        position_ids = position_ids.expand(batch, length)
        if places is not None:
            if places.numel() == 0:
                raise ValueError(
                    f"{type(self).__name__}: attention_mask leaves no token at all in this call; drop the call instead"
                )
            embeds = embeds.flatten(0, 1)[places][None]
            position_ids = position_ids.flatten()[places][None]
        rotary = None if self.rotary_emb is None else self.rotary_emb(embeds, position_ids=position_ids)
        return embeds, TokenLayout(position_ids, cu_seqlens, rotary), places, real


class MemzooForCausalLM(MemzooPreTrainedModel, GenerationMixin):
    """A block stack with a language-model head; subclasses name the stack in `model_class`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model_class: type[MemzooModel]

    def __init__(self, config: MemzooConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> None:
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"{type(self).__name__}: cache_implementation is {generation_config.cache_implementation!r}; "
                "memories bring their own cache, leave it unset"
            )
        model_kwargs["past_key_values"] = MemoryCache(self.config)
        return None

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size] (of the last `logits_to_keep` tokens, or those it indexes), and with labels [B, T] the loss.

        Labels are the inputs themselves, shifted here; -100 is ignored, and so is the first token of each packed sequence. The other
        arguments are those of the stack without a head.
        """
        if cu_seqlens is None:
            cu_seqlens = kwargs.pop("cu_seq_lens_q", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=kwargs.pop("output_hidden_states", None),
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                labels = labels.masked_fill(token_positions(cu_seqlens, labels.shape[1])[None] == 0, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


def _boundaries(position_ids: Tensor) -> Tensor | None:
    """cu_seqlens of the sequences that positions [1, T] describe by starting again at 0; None if there is only one."""
    starts = (position_ids[0] == 0).nonzero().squeeze(1)
    if starts.numel() < 2 or starts[0] != 0:
        return None
    return torch.cat((starts, starts.new_full((1,), position_ids.shape[1])))


def _scatter(hidden_states: Tensor, places: Tensor | None, batch: int, length: int) -> Tensor:
    """Packed states back to [B, T, d] with zeros at pads; dense states as they are."""
    if places is None:
        return hidden_states
    out = hidden_states.new_zeros(batch * length, hidden_states.shape[2])
    return out.index_copy(0, places, hidden_states[0]).view(batch, length, -1)
