"""The objective that a configuration asks for."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.diffusion.super_resolution import NoiseConditioningAugmentation
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.distillation.moment_matching import MomentMatching
from ddpm_engine.objectives.distillation.trajectory import DISTILLATIONS, Teacher
from ddpm_engine.objectives.edm import EdmObjective
from ddpm_engine.objectives.inputs import Conditions
from ddpm_engine.objectives.level_sampling import (
    ImportanceTimesteps,
    UniformTimesteps,
    WeightedTimesteps,
    logit_normal_probabilities,
)
from ddpm_engine.objectives.objective import Objective
from ddpm_engine.objectives.weighting import min_snr_weights, p2_weights, vlb_weights
from ddpm_engine.training.lr_schedule import learning_rate

if TYPE_CHECKING:
    from ddpm_engine.config import RunConfig
    from ddpm_engine.objectives.config import ObjectiveConfig


def build_objective(
    config: RunConfig,
    schedule: NoiseSchedule,
    device: torch.device | str = "cpu",
    null_class: int | None = None,
    teacher: Teacher | None = None,
    dtype: torch.dtype = torch.float32,
) -> Objective:
    """The objective of a run.

    Args:
        config: of the run, valid.
        schedule: the noise schedule that it describes.
        device: where the network runs.
        null_class: the network's; None if it is unconditional.
        teacher: on the same device; needed if and only if the run distils one.
        dtype: of the objective's tables, and so of its arithmetic.
    """
    conditions = Conditions(
        config.training.seed,
        config.data.horizontal_flip,
        null_class,
        config.training.label_dropout,
        config.model.low_resolution,
        None if config.model.low_resolution is None else NoiseConditioningAugmentation(device),
        config.training.augmentation_levels,
    )
    if teacher is not None and config.distillation.method == "moments":
        return MomentMatching(
            schedule,
            config.diffusion.prediction,
            conditions,
            teacher,
            config.distillation,
            partial(learning_rate, config),
            config.optimizer.betas,
            config.optimizer.clip_norm,
            device,
            clip=config.sampling.clip_x0,
            dtype=dtype,
        )
    if teacher is not None:
        return DISTILLATIONS[config.distillation.method](
            schedule,
            config.diffusion.prediction,
            conditions,
            teacher,
            config.distillation,
            config.training.steps,
            device,
            clip=config.sampling.clip_x0,
            dtype=dtype,
        )
    if config.diffusion.prediction == "edm":
        return EdmObjective(
            schedule.sigma_data,
            conditions,
            device,
            p_mean=config.objective.p_mean,
            p_std=config.objective.p_std,
            dtype=dtype,
        )
    return DenoisingObjective(
        schedule,
        config.diffusion.prediction,
        conditions,
        device,
        weights=_weights(config, schedule),
        learned_variance=config.objective.learned_variance,
        sampling=_sampling(config.objective, schedule.timesteps),
        offset_noise=config.objective.offset_noise,
        dtype=dtype,
    )


def _weights(config: RunConfig, schedule: NoiseSchedule) -> Tensor | None:
    objective, prediction = config.objective, config.diffusion.prediction
    if objective.weighting == "min-snr":
        return min_snr_weights(schedule, prediction, objective.min_snr_gamma)
    if objective.weighting == "p2":
        return p2_weights(schedule, prediction, objective.p2_gamma, objective.p2_k)
    if objective.weighting == "vlb":
        return vlb_weights(schedule, prediction)
    return None


def _sampling(objective: ObjectiveConfig, timesteps: int) -> UniformTimesteps:
    if objective.timestep_sampling == "logit-normal":
        return WeightedTimesteps(
            logit_normal_probabilities(timesteps, objective.logit_mean, objective.logit_std)
        )
    if objective.timestep_sampling == "importance":
        return ImportanceTimesteps(timesteps)
    return UniformTimesteps(timesteps)
