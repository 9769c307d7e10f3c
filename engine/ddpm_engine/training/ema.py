"""Moving averages of the weights, which samples are generated from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_engine.checkpoints.power_ema import gamma_from_sigma_rel, part_of, power_decay
from ddpm_engine.config import TrainingConfig

Decay = Callable[[int], float]
"""Decay of the next update, in [0, 1], as a function of the number of updates done before."""


def warmed_up(decay: float) -> Decay:
    """Exponential decay with a warm-up, min(decay, (1 + n) / (10 + n)) after n updates.

    Without it the random initialisation would linger in the average.
    """
    return lambda updates: min(decay, (1 + updates) / (10 + updates))


def decays(training: TrainingConfig) -> dict[str, Decay]:
    """Decay of every average that a run keeps, by part of a checkpoint (`ema`, `ema-0.1`, ...)."""
    profiles = {
        part_of(sigma_rel): power_decay(gamma_from_sigma_rel(sigma_rel))
        for sigma_rel in training.ema_sigma_rel
    }
    return {"ema": warmed_up(training.ema_decay), **profiles}


@torch.no_grad()
def move_towards(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """Update averages in place, without waiting for the device: a ← a + w·(v − a).

    Args:
        averages: tensors of any shapes and float dtypes.
        values: tensors of the same shapes and dtypes.
        weight: w in [0, 1], 0-dim, on their device.
    """
    # A lerp of lists takes its weight from the host, or launches a kernel for each tensor.
    steps = torch._foreach_sub(values, averages)
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(averages, steps)
