"""Sampling: every sampler is a coefficient table, and one loop runs them all."""

from ddpm_engine.samplers.ddpm import ddpm_table
from ddpm_engine.samplers.loop import SAMPLERS, SamplingStep, sample, sampling_steps
from ddpm_engine.samplers.registry import Sampler, build_table
from ddpm_engine.samplers.spacing import spaced_timesteps
from ddpm_engine.samplers.table import CoefficientTable

__all__ = [
    "SAMPLERS",
    "CoefficientTable",
    "Sampler",
    "SamplingStep",
    "build_table",
    "ddpm_table",
    "sample",
    "sampling_steps",
    "spaced_timesteps",
]
