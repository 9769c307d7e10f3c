"""The Markov chain: its closed form from its steps, and its posterior from Bayes' rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_engine.diffusion.process import add_noise, posterior
from ddpm_engine.diffusion.schedule import NoiseSchedule

SCHEDULES = {
    "linear": NoiseSchedule.linear(1000),
    "cosine": NoiseSchedule.cosine(100),
    "short": NoiseSchedule.linear(10, 0.05, 0.6),
}


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_compose_to_the_closed_form(name: str) -> None:
    """x_t = sqrt(1 − β_t) x_{t−1} + sqrt(β_t) z (equation 2), composed as Gaussians are."""
    schedule = SCHEDULES[name]
    one, zero = number(1.0), number(0.0)
    signal, variance = 1.0, 0.0
    for step in range(schedule.timesteps):
        t = torch.tensor([step])
        beta = schedule.betas[step].item()
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        assert add_noise(schedule, one, t, zero).item() == pytest.approx(signal, rel=1e-11)
        assert add_noise(schedule, zero, t, one).item() ** 2 == pytest.approx(variance, rel=1e-11)
        both = add_noise(schedule, one, t, one).item()
        assert both == pytest.approx(signal + math.sqrt(variance), rel=1e-11)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes_rule(name: str) -> None:
    """q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0), multiplied out on a grid."""
    schedule = SCHEDULES[name]
    steps = sorted({1, 2, schedule.timesteps // 2, schedule.timesteps - 1})
    for step in steps:
        x_0, x_t = 0.7, -0.4
        before, beta = schedule.alpha_bar[step - 1].item(), schedule.betas[step].item()
        prior_mean, prior_variance = math.sqrt(before) * x_0, 1 - before
        likelihood_mean = x_t / math.sqrt(1 - beta)
        likelihood_deviation = math.sqrt(beta / (1 - beta))
        # Where both densities are: the product is within the narrower one.
        narrower = min(likelihood_deviation, math.sqrt(prior_variance))
        span = abs(likelihood_mean - prior_mean) + 12 * narrower
        middle = prior_mean if narrower**2 == prior_variance else likelihood_mean
        grid = np.linspace(middle - span, middle + span, 200_001)
        log_density = -((grid - prior_mean) ** 2) / (2 * prior_variance)
        log_density += -((x_t - math.sqrt(1 - beta) * grid) ** 2) / (2 * beta)
        density = np.exp(log_density - log_density.max())
        density /= density.sum()
        mean = float((density * grid).sum())
        variance = float((density * (grid - mean) ** 2).sum())
        ours, our_variance = posterior(schedule, number(x_0), number(x_t), torch.tensor([step]))
        assert ours.item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert our_variance.item() == pytest.approx(variance, rel=1e-8)


def test_posterior_at_zero_is_the_image() -> None:
    schedule = SCHEDULES["linear"]
    mean, variance = posterior(schedule, number(0.3), number(5.0), torch.tensor([0]))
    assert mean.item() == pytest.approx(0.3, rel=1e-12)
    assert variance.item() == 0


@pytest.mark.parametrize("shape", [(3,), (3, 2, 5, 4)])
def test_each_image_has_its_own_timestep(shape: tuple[int, ...]) -> None:
    schedule = SCHEDULES["linear"]
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, *shape, generator=generator)
    t = torch.tensor([0, 500, 999])
    mean, variance = posterior(schedule, x, noise, t)
    assert torch.broadcast_shapes(variance.shape, shape) == shape
    variance = variance.expand(shape)
    noised = add_noise(schedule, x, t, noise)
    assert noised.dtype == torch.float32
    for b in range(3):
        alone = add_noise(schedule, x[b : b + 1], t[b : b + 1], noise[b : b + 1])
        assert torch.equal(noised[b : b + 1], alone)
        one_mean, one_variance = posterior(schedule, x[b : b + 1], noise[b : b + 1], t[b : b + 1])
        assert torch.equal(mean[b : b + 1], one_mean)
        assert torch.equal(variance[b : b + 1], one_variance.expand(1, *shape[1:]))
