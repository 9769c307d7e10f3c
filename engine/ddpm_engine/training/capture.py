"""Whether the steps of a run are captured as one CUDA graph."""

from __future__ import annotations

import logging

import torch

from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.graphs import Capture, Work, as_captured, captured
from ddpm_engine.objectives.base import Objective
from ddpm_engine.rules import not_capturable
from ddpm_engine.training.strategies.strategy import Strategy

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 3
"""Until libraries and compilers have chosen their algorithms."""


def choose_capture(
    config: RunConfig,
    objective: Objective,
    strategy: Strategy,
    device: torch.device,
) -> Capture | None:
    """Choose what records the steps of a run; None: nothing does, and they run as they are.

    Args:
        config: the run.
        objective: its objective.
        strategy: holds the network.
        device: where steps run.

    Raises:
        UserError: `training.capture` is on where steps cannot be captured.
    """
    wanted = config.training.capture
    if wanted == "off":
        return None
    obstacle = _obstacle(config, objective, strategy, device)
    if obstacle is None:
        logger.info("a training step is one CUDA graph")
        return captured
    if wanted == "on":
        raise UserError(
            f"`training.capture` is on, but {obstacle}; use auto or off", "training.capture"
        )
    if device.type == "cuda":
        logger.info("training steps are not captured as a CUDA graph: %s", obstacle)
    return None


def _obstacle(
    config: RunConfig,
    objective: Objective,
    strategy: Strategy,
    device: torch.device,
) -> str | None:
    """Why the steps of a run cannot be captured; None: they can."""
    if device.type != "cuda":
        return f"this process runs on {device.type}, which has no CUDA graphs"
    if not strategy.capturable:
        return f"{strategy.name} does more in a step than start work on the GPU"
    if (reason := not_capturable(config)) is not None:
        return reason
    if objective.learns_on_host:
        return "the objective learns from every step before the next"
    return None


def warm_up(work: Work, device: torch.device) -> None:
    """Run work that changes nothing as often as it takes until it can be captured."""
    with as_captured(device):
        for _ in range(_WARM_UP_STEPS):
            work()
