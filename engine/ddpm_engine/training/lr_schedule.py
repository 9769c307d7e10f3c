"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from ddpm_engine.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then `optimizer.decay`.

    Distillation anneals it, too.

    Args:
        config: of the run.
        step: optimizer steps done before.
    """
    optimizer, steps = config.optimizer, config.training.steps
    warm = min(1.0, (step + 1) / max(optimizer.warmup_steps, 1))
    annealing = config.distillation.annealing(step, steps)
    return optimizer.learning_rate * warm * decayed(config, step) * annealing


def decayed(config: RunConfig, step: int) -> float:
    """Return what remains of the learning rate at a step, above 0, at most 1.

    The inverse square root is that of EDM2 (Karras et al. 2024, arXiv:2312.02696), with
    `optimizer.decay_from` as its reference.
    """
    optimizer = config.optimizer
    start = optimizer.decay_from
    if optimizer.decay == "none" or step < start:
        return 1.0
    if optimizer.decay == "inverse-sqrt":
        return math.sqrt(start / step)
    part = (step - start) / (config.training.steps - start)
    return 1 - part if optimizer.decay == "linear" else (1 + math.cos(math.pi * part)) / 2
