"""Factors of image and noise in the state at each timestep that a sampler visits."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError


def noise_levels(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors a and s from the first timestep visited to the clean image.

    Args:
        schedule: the noise schedule.
        timesteps: int64 `[S]`; or float64 `[S]`, between timesteps of the schedule.

    Returns:
        (a, s), float64 `[S + 1]` each, a² + s² = 1, the last (1, 0).
    """
    if timesteps.is_floating_point():
        sigma = schedule.log_sigma_at(timesteps).exp()
        a = (1 + sigma.square()).rsqrt()
        s = torch.where(sigma.isinf(), 1, sigma * a)
    else:
        a = schedule.sqrt_alpha_bar[timesteps]
        s = schedule.sqrt_one_minus_alpha_bar[timesteps]
    return torch.cat([a, a.new_ones(1)]), torch.cat([s, s.new_zeros(1)])


def half_log_snr(a: Tensor, s: Tensor) -> Tensor:
    """Return λ = log(a / s), the time of exponential integrators: −∞ at pure noise, +∞ at the end.

    Elementwise: float64 `[S]` of float64 `[S]`. Lu et al. 2022, section 2.
    """
    return (a / s).log()


def usable_history(half_log_snr: Tensor, row: int) -> int:
    """Count the estimates up to and including `row` that an exponential integrator can use.

    `half_log_snr` is float64 `[S]`, of the states that the estimates are made from. An estimate
    made from pure noise, λ = −∞, is infinitely far away and counts only while it is the only one.
    """
    return max(1, int(half_log_snr[: row + 1].isfinite().sum()))


def check_guided_steps(guidance: Guidance, alpha_bar: Tensor) -> None:
    """Refuse an interval of guidance in which there is no step.

    Args:
        guidance: of a sampler.
        alpha_bar: ᾱ of the state before each of its steps, float64 `[S]`.

    Raises:
        UserError: the interval lies between the steps, or beyond them.
    """
    if guidance.scale == 1 or any(guidance.guides(alpha_bar)):
        return
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    low, high = guidance.interval
    raise UserError(
        f"`guidance.interval` is {low:g} to {high:g}, where none of the steps is: they begin at "
        f"noise levels of {sigma.max():.3g} down to {sigma.min():.3g}; widen it, or leave out "
        "guidance",
        "guidance.interval",
    )
