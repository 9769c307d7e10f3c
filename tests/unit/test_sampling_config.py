"""Sampling and zero terminal SNR in a configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from ddpm_engine.config import RunConfig, from_dict, to_dict
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.rules import problems
from ddpm_engine.samplers.config import SamplerName, SamplingConfig
from ddpm_engine.samplers.registry import SAMPLERS

ZERO_SNR = DiffusionConfig(prediction="v", zero_terminal_snr=True)


def test_samplers_are_those_of_the_registry() -> None:
    assert get_args(SamplerName) == tuple(SAMPLERS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_survives_the_disk(sampler: SamplerName) -> None:
    config = replace(RunConfig(), sampling=SamplingConfig(sampler, 20, "leading", eta=0.5))
    assert problems(config) == []
    assert from_dict(to_dict(config), "here") == config


def test_configurations_from_before_these_entries() -> None:
    values = to_dict(RunConfig())
    del values["sampling"]["eta"], values["diffusion"]["zero_terminal_snr"]
    assert from_dict(values, "old") == RunConfig()


def test_zero_terminal_snr() -> None:
    assert ZERO_SNR.build_schedule().alpha_bar[-1] == 0
    assert replace(ZERO_SNR, zero_terminal_snr=False).build_schedule().alpha_bar[-1] > 0
    assert problems(RunConfig(diffusion=ZERO_SNR)) == []


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (RunConfig(sampling=SamplingConfig(eta=1.5)), "`sampling.eta` is 1.5"),
        (RunConfig(sampling=SamplingConfig(eta=float("nan"))), "`sampling.eta` is nan"),
        (
            RunConfig(sampling=SamplingConfig(variance="learned_range")),
            "without `objective.learned_variance` (and `model.out_channels` 6)",
        ),
        (
            RunConfig(diffusion=DiffusionConfig(zero_terminal_snr=True)),
            "`diffusion.prediction` is eps, but this schedule ends in pure noise",
        ),
        (RunConfig(diffusion=replace(ZERO_SNR, timesteps=1)), "`diffusion.timesteps` is 1"),
        (
            RunConfig(diffusion=ZERO_SNR, sampling=SamplingConfig("heun")),
            "let `sampling.sampler` be ddim",
        ),
    ],
)
def test_problems(config: RunConfig, part: str) -> None:
    assert any(part in str(problem) for problem in problems(config))
