"""AdamW as the paper trains with it: warm-up, cosine decay, clipping (Tables 8 and 9)."""

from __future__ import annotations

import math

import torch
from torch import nn

from genie_model.config import OptimizerConfig


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay acts on matrices of linear and embedding layers; gains, biases and positions are left alone."""
    matrices = {m.weight for m in module.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Linear from 0 to max_lr over the warm-up, then a cosine down to min_lr at the last step."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.min_lr + 0.5 * (config.max_lr - config.min_lr) * (1 + math.cos(math.pi * progress))
