"""The training loss of a batch as a sum over its tokens, to be divided by the tokens of the whole step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100


def items(batch: dict[str, Any]) -> Tensor:
    """What a batch's loss counts: its predicted tokens, or the sum of their weights. A scalar in float64."""
    if "loss_weights" in batch:
        return batch["loss_weights"][:, 1:].double().sum()
    return (batch["labels"][:, 1:] != IGNORED).sum().double()


def batch_loss(model: nn.Module, batch: dict[str, Any], total: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """The batch's part of the mean loss over `total` items; then right and predicted answer tokens (0 without weights).

    Without `loss_weights [B, T]` the model's own loss is taken, told `total` as `num_items_in_batch`. With them, logits are computed
    only where some row of the batch has a weight, and each label's loss is multiplied by its weight.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("loss_weights", "labels")}
    zero = batch["labels"].new_zeros(())
    if "loss_weights" not in batch:
        loss = model(**inputs, labels=batch["labels"], num_items_in_batch=total, use_cache=False).loss
        return loss, zero, zero
    weights, labels = batch["loss_weights"][:, 1:], batch["labels"][:, 1:]
    keep = (weights > 0).any(0).nonzero().squeeze(1)
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    weights, labels = weights[:, keep], labels[:, keep]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORED)
    answers = weights == 1
    with torch.no_grad():
        right = ((logits.argmax(-1) == labels) & answers).sum()
    return (losses * weights.flatten()).sum() / total, right, answers.sum()
