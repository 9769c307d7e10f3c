"""The learning rate as a function of the step."""

from __future__ import annotations

from ddpm_engine.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant; annealed in distillation.

    Args:
        config: of the run.
        step: optimizer steps done before.
    """
    warm = min(1.0, (step + 1) / max(config.optimizer.warmup_steps, 1))
    annealing = config.distillation.annealing(step, config.training.steps)
    return config.optimizer.learning_rate * warm * annealing
