"""Factors of image and noise in the state at each timestep that a sampler visits."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule


def log_sigma(schedule: NoiseSchedule) -> Tensor:
    """Return log σ_t with σ = sqrt(1 − ᾱ) / sqrt(ᾱ): float64 `[T]`, rising; +∞ where ᾱ is zero."""
    return -0.5 * schedule.snr.log()


def noise_levels(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors a and s from the first timestep visited to the clean image.

    Args:
        schedule: the noise schedule.
        timesteps: int64 `[S]`; or float64 `[S]`, between whose neighbours log σ is interpolated.

    Returns:
        (a, s), float64 `[S + 1]` each, a² + s² = 1, the last (1, 0).
    """
    if timesteps.is_floating_point():
        known = log_sigma(schedule)
        sigma = interpolated(timesteps, torch.arange(len(known)).double(), known).exp()
        a = (1 + sigma.square()).rsqrt()
        s = sigma * a
    else:
        a = schedule.sqrt_alpha_bar[timesteps]
        s = schedule.sqrt_one_minus_alpha_bar[timesteps]
    return torch.cat([a, a.new_ones(1)]), torch.cat([s, s.new_zeros(1)])


def interpolated(x: Tensor, known_x: Tensor, known_y: Tensor) -> Tensor:
    """Interpolate y linearly at each x, `[N]`; `known_x` is increasing and x lies within it.

    Args:
        x: float64 `[N]`.
        known_x: float64 `[K]`.
        known_y: float64 `[K]`.
    """
    if len(known_x) == 1:
        return known_y.expand(len(x))
    right = torch.searchsorted(known_x, x).clamp(1, len(known_x) - 1)
    left = right - 1
    weight = (x - known_x[left]) / (known_x[right] - known_x[left])
    return known_y[left].lerp(known_y[right], weight.clamp(0, 1))


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
