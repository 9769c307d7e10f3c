"""Sampling: every sampler is a coefficient table, and one loop runs them all."""

from ddpm_engine.samplers.ddpm import ddpm_table
from ddpm_engine.samplers.guidance import Guidance
from ddpm_engine.samplers.inpainting import Inpainting
from ddpm_engine.samplers.loop import (
    Chain,
    SamplingStep,
    initial_noise,
    interpolated_noise,
    sample,
    sampling_steps,
)
from ddpm_engine.samplers.registry import SAMPLERS, build_table
from ddpm_engine.samplers.spacing import spaced_timesteps
from ddpm_engine.samplers.table import CoefficientTable

__all__ = [
    "SAMPLERS",
    "Chain",
    "CoefficientTable",
    "Guidance",
    "Inpainting",
    "SamplingStep",
    "build_table",
    "ddpm_table",
    "initial_noise",
    "interpolated_noise",
    "sample",
    "sampling_steps",
    "spaced_timesteps",
]
