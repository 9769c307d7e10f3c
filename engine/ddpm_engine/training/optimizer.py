"""The optimizer of a run."""

from __future__ import annotations

import torch
from torch import nn

from ddpm_engine.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make a fused AdamW over all weights; its learning rate is set again at every step."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
