"""AdamW's parameter groups and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from .settings import Settings


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms, biases, gates' biases and other vectors keep their size."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = any(p.is_cuda for p in trained)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=fused or None,
    )


def learning_rate(settings: Settings, step: int) -> float:
    """The rate of step `step` (from 1): linear warm-up, then a cosine down to its final part at the last step."""
    if step <= settings.warmup:
        return settings.learning_rate * step / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
