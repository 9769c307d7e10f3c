"""The objective that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ddpm_engine.low_resolution import Augmentation
from ddpm_engine.objectives.conditions import Conditions
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.objective import Objective
from ddpm_engine.schedule import NoiseSchedule

if TYPE_CHECKING:
    from ddpm_engine.config import RunConfig


def build_objective(
    config: RunConfig,
    schedule: NoiseSchedule,
    device: torch.device | str = "cpu",
    null_class: int | None = None,
) -> Objective:
    """The objective of a run.

    Args:
        config: of the run, valid.
        schedule: the noise schedule that it describes.
        device: where the network runs.
        null_class: the network's; None if it is unconditional.
    """
    conditions = Conditions(
        config.training.seed,
        config.data.horizontal_flip,
        null_class,
        config.training.label_dropout,
        config.model.low_resolution,
        None if config.model.low_resolution is None else Augmentation(device),
        config.training.augmentation_levels,
    )
    return DenoisingObjective(schedule, config.diffusion.prediction, conditions, device)
