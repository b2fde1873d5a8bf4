"""What a model remembers between calls, as transformers' Cache expects it: one LayerState a layer and a count of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..layers.state import LayerState


class MemoryLayer(CacheLayerMixin):
    """One layer's LayerState behind the methods that `generate` calls."""

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state = LayerState()
        self.seen = 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a MemoryLayer holds no keys and values to update; layers write to its LayerState")

    def get_seq_length(self, *args: Any) -> int:
        """Tokens seen, pads included, as attention masks count them."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = LayerState()
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.apply(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.apply(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state.apply(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self.state.apply(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to do: an offloaded state moves back where it is used."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a recurrent memory cannot be rolled back; generate without assisted or prompt-lookup decoding")


class MemoryCache(Cache):
    """The cache of every memzoo model: `num_hidden_layers` MemoryLayers, and how many real tokens each sequence has.

    Args:
        config: the model's configuration, or anything with `num_hidden_layers`.
    """

    def __init__(self, config: Any):
        super().__init__(layers=[MemoryLayer() for _ in range(config.num_hidden_layers)])
        self.tokens: Tensor | None = None  # real tokens of each sequence, [B]; None while all have `seen`

    def advance(self, length: int, real: Tensor | None) -> None:
        """Count `length` more tokens a sequence, of which `real` [B] are no pads (None: all)."""
        if real is not None or self.tokens is not None:
            had = self.get_seq_length() if self.tokens is None else self.tokens
            self.tokens = had + (length if real is None else real)
        for layer in self.layers:
            layer.seen += length
            layer.is_initialized = True

    def state_bytes(self) -> int:
        """Bytes held, of the whole batch and all layers."""
        return sum(layer.state.bytes() for layer in self.layers)

    def reset(self) -> None:
        super().reset()
        self.tokens = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change_tokens(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_tokens(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_tokens(lambda t: t[indices.to(t.device)])

    def _change_tokens(self, change) -> None:
        if isinstance(self.tokens, torch.Tensor):
            self.tokens = change(self.tokens)
