"""The objective that a configuration asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ddpm_engine.config import RunConfig
from ddpm_engine.data.shards.manifest import LatentSpace
from ddpm_engine.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.networks.text.encoder import EncodedText
from ddpm_engine.objectives.autoencoding import AutoencodingObjective
from ddpm_engine.objectives.base import Objective
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.distillation.moment_matching import MomentMatching
from ddpm_engine.objectives.distillation.teacher import Teacher
from ddpm_engine.objectives.distillation.trajectory import DISTILLATIONS
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.objectives.level_sampling import (
    ImportanceTimesteps,
    LevelSampler,
    LogNormalSigma,
    UniformShare,
    UniformTimesteps,
    WeightedTimesteps,
    logit_normal_probabilities,
)
from ddpm_engine.objectives.weighting import min_snr_weights, p2_weights, vlb_weights
from ddpm_engine.runtime import DTYPES
from ddpm_engine.training.lr_schedule import learning_rate


def build_objective(
    config: RunConfig,
    schedule: NoiseSchedule,
    device: torch.device | str = "cpu",
    spec: ConditioningSpec | None = None,
    teacher: Teacher | None = None,
    dtype: torch.dtype = torch.float32,
    null_text: EncodedText | None = None,
    latents: LatentSpace | None = None,
) -> Objective:
    """Build the objective of a run.

    Args:
        config: of the run, valid.
        schedule: the noise schedule that it describes.
        device: where the network runs.
        spec: the conditions that the network was built for; None: none.
        teacher: on the same device; needed if and only if the run distils one.
        dtype: of the objective's arithmetic.
        null_text: what stands for no text, of one row; None: zeros.
        latents: that the batches hold; None: they hold images.
    """
    prediction, clip = config.diffusion.prediction, config.clips_x0 and latents is None
    inputs = TrainingInputs(
        config.training.seed,
        spec or ConditioningSpec(),
        device,
        config.data.horizontal_flip,
        config.training.condition_dropout,
        config.training.augmentation_levels,
        config.data.vector,
        config.data.diffuse,
        null_text,
        latent_scale=None if latents is None else latents.scale,
        latent_shift=0.0 if latents is None else latents.shift,
    )
    if isinstance(config.model, AutoencoderKLConfig):
        weight = config.autoencoding.kl_weight
        return AutoencodingObjective(inputs, config.model.latent_shape, weight, dtype)
    if teacher is None:
        return DenoisingObjective(
            schedule,
            prediction,
            inputs,
            levels=_levels(config, device),
            weights=_weights(config, schedule),
            loss=config.objective.loss,
            loss_limit=config.objective.loss_limit,
            learned_variance=config.objective.learned_variance,
            offset_noise=config.objective.offset_noise,
            dtype=dtype,
            input_dtype=DTYPES.get(config.training.precision),
        )
    if config.distillation.method == "moments":
        return MomentMatching(
            schedule,
            prediction,
            inputs,
            teacher,
            config.distillation,
            partial(learning_rate, config),
            config.optimizer.betas,
            config.optimizer.clip_norm,
            clip=clip,
            dtype=dtype,
        )
    return DISTILLATIONS[config.distillation.method](
        schedule,
        prediction,
        inputs,
        teacher,
        config.distillation,
        config.training.steps,
        clip=clip,
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


def _levels(config: RunConfig, device: torch.device | str) -> LevelSampler:
    objective, timesteps = config.objective, config.diffusion.timesteps
    if not PARAMETERIZATIONS[config.diffusion.prediction].takes_timestep:
        return _CONTINUA[config.diffusion.schedule](config)
    if objective.timestep_sampling == "logit-normal":
        return WeightedTimesteps(
            logit_normal_probabilities(timesteps, objective.logit_mean, objective.logit_std), device
        )
    if objective.timestep_sampling == "importance":
        return ImportanceTimesteps(timesteps, device)
    return UniformTimesteps(timesteps)


def _edm_levels(config: RunConfig) -> LevelSampler:
    return LogNormalSigma(config.objective.p_mean, config.objective.p_std)


def _flow_levels(config: RunConfig) -> LevelSampler:
    objective, shift = config.objective, config.diffusion.shift
    if objective.timestep_sampling == "logit-normal":
        return LogNormalSigma(objective.logit_mean + math.log(shift), objective.logit_std)
    return UniformShare(shift)


_CONTINUA: dict[str, Callable[[RunConfig], LevelSampler]] = {
    "edm": _edm_levels,
    "flow": _flow_levels,
}
"""What is trained of the continuum of levels, by the schedule that samplers visit of it."""
