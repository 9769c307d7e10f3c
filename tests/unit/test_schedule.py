"""The noise schedule: closed forms in float64, and invalid values."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError

SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "cosine": NoiseSchedule.cosine,
    "sigmoid": NoiseSchedule.sigmoid,
}
TABLES = (
    "betas", "alphas", "alpha_bar", "alpha_bar_previous", "sqrt_alpha_bar",
    "sqrt_one_minus_alpha_bar", "snr", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_x0", "posterior_mean_xt",
)  # fmt: skip


def close(actual: Tensor, expected: object) -> None:
    np.testing.assert_allclose(actual.numpy(), np.asarray(expected), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [1, 50, 1000])
def test_every_table_is_finite_float64(name: str, timesteps: int) -> None:
    schedule = SCHEDULES[name](timesteps)
    assert schedule.timesteps == timesteps
    for table in TABLES:
        values = getattr(schedule, table)
        assert values.shape == (timesteps,), table
        assert values.dtype == torch.float64, table
        assert bool(values.isfinite().all()), table
    assert bool((schedule.alpha_bar.diff() < 0).all())


def test_linear_is_the_paper() -> None:
    schedule = NoiseSchedule.linear()
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    close(schedule.betas, betas)
    assert schedule.sqrt_alpha_bar[-1].item() == pytest.approx(0.00635, abs=1e-5)
    exact = math.prod((1 - Fraction(beta) for beta in betas[:300]), start=Fraction(1))
    assert schedule.alpha_bar[299].item() == pytest.approx(float(exact), rel=1e-12)


def test_cosine_formula() -> None:
    schedule = NoiseSchedule.cosine(1000)

    def curve(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = np.array([curve(t + 1) / curve(0) for t in range(1000)])
    np.testing.assert_allclose(schedule.alpha_bar[:-1].numpy(), alpha_bar[:-1], rtol=1e-9)
    assert schedule.betas[-1].item() == 0.999  # the curve ends at zero; β may not reach one
    assert schedule.betas[:-1].max() < 0.999


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.5)])
def test_sigmoid_formula(start: float, end: float, tau: float) -> None:
    schedule = NoiseSchedule.sigmoid(200, start, end, tau)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x / tau))

    def curve(u: float) -> float:
        value = sigmoid(end) - sigmoid(u * (end - start) + start)
        return value / (sigmoid(end) - sigmoid(start))

    alpha_bar = [curve((t + 1) / 200) for t in range(199)]
    np.testing.assert_allclose(schedule.alpha_bar[:-1].numpy(), alpha_bar, rtol=1e-9)
    assert schedule.betas[-1].item() == 0.999


def test_log_variance_at_zero_is_that_of_one() -> None:
    schedule = NoiseSchedule.linear()
    log_variance = schedule.posterior_log_variance_clipped
    assert log_variance[0] == log_variance[1]
    close(log_variance[1:], schedule.posterior_variance[1:].log())
    assert log_variance[0].item() == pytest.approx(-9.817, abs=1e-3)
    assert schedule.posterior_variance[0] == 0  # which clipping does not write to


# --- Zero terminal SNR


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [2, 1000])
def test_zero_terminal_snr(name: str, timesteps: int) -> None:
    """The properties that Lin et al. ask for, and every table still finite."""
    before = SCHEDULES[name](timesteps)
    after = before.rescaled_to_zero_terminal_snr()
    assert after.betas[-1] == 1
    assert after.alpha_bar[-1] == 0
    assert after.snr[-1] == 0
    close(after.betas[0], before.betas[0])
    root, last = before.sqrt_alpha_bar, before.sqrt_alpha_bar[-1]
    expected = (root - last) * root[0] / (root[0] - last)
    np.testing.assert_allclose(after.sqrt_alpha_bar.numpy(), expected.numpy(), rtol=1e-9)
    for table in TABLES:
        assert bool(getattr(after, table).isfinite().all()), table
    assert bool((after.alpha_bar.diff() < 0).all())
    # From pure noise the posterior is that of the next timestep given the image.
    close(after.posterior_mean_xt[-1], 0)
    close(after.posterior_mean_x0[-1], after.sqrt_alpha_bar[-2])
    close(after.posterior_variance[-1], 1 - after.alpha_bar[-2])
    close(after.rescaled_to_zero_terminal_snr().betas, after.betas)


def test_one_timestep_cannot_be_rescaled() -> None:
    with pytest.raises(UserError, match="`timesteps` is 1; a schedule needs at least 2"):
        NoiseSchedule.linear(1).rescaled_to_zero_terminal_snr()


# --- Invalid values


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [0])
def test_no_timesteps(name: str, timesteps: int) -> None:
    with pytest.raises(UserError, match=f"`timesteps` is {timesteps}; .* at least 1"):
        SCHEDULES[name](timesteps)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 0.0, 0.2], r"timestep 1 is 0\.0; it must lie in \(0, 1\)"),
        ([0.1, 1.0, 0.2], r"timestep 1 is 1\.0; it must lie in \(0, 1\)$"),
        ([0.1, 0.2, 1.5], r"timestep 2 is 1\.5; it must lie in \(0, 1\), or be 1$"),
        ([-0.5, 2.0], r"timestep 0 is -0\.5"),
        ([0.1, math.nan], r"timestep 1 is nan"),
        ([], r"torch\.float64 of shape \(0,\)"),
        ([[0.1]], r"shape \(1, 1\)"),
    ],
)
def test_impossible_betas(betas: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NoiseSchedule(torch.tensor(betas, dtype=torch.float64))
    with pytest.raises(UserError, match=r"torch\.float32.*float64"):
        NoiseSchedule(torch.tensor([0.1, 0.2]))


def test_linear_out_of_range_names_the_value() -> None:
    with pytest.raises(UserError, match=r"timestep 9 is 1\.1"):
        NoiseSchedule.linear(10, 0.1, 1.1)
