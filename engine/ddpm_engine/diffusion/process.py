"""The Markov chain itself: one forward step, its closed form, and the posterior.

These are the formulas of Ho et al. 2020, section 2, for study, plots and tests. Training draws the
closed form with `ddpm_kernels.q_sample`; sampling runs the posterior as a coefficient table.
"""

from __future__ import annotations

from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule


def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """Entries of a schedule's table for each sample, shaped to broadcast against images."""
    return table.to(x.device)[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def forward_step(schedule: NoiseSchedule, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_{t−1}) = N(sqrt(1 − β_t) x_{t−1}, β_t I), shaped as `x` (equation 2).

    Args:
        schedule: the noise schedule.
        x: x_{t−1}, `[B, ...]`.
        t: int64 `[B]` in [0, T); at t = 0, `x` is the clean image.
        noise: standard normal, shaped as `x`.
    """
    return _at(schedule.alphas.sqrt(), t, x) * x + _at(schedule.betas.sqrt(), t, x) * noise


def forward(schedule: NoiseSchedule, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0) = N(sqrt(ᾱ_t) x_0, (1 − ᾱ_t) I), shaped as `x_0` (equation 4).

    Args:
        schedule: the noise schedule.
        x_0: the clean image, `[B, ...]`.
        t: int64 `[B]` in [0, T).
        noise: standard normal, shaped as `x_0`.
    """
    signal = _at(schedule.sqrt_alpha_bar, t, x_0)
    return signal * x_0 + _at(schedule.sqrt_one_minus_alpha_bar, t, x_0) * noise


def posterior(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t−1} | x_t, x_0) (equations 6 and 7).

    Args:
        schedule: the noise schedule.
        x_0: the clean image, `[B, ...]`.
        x_t: the noisy image, shaped as `x_0`.
        t: int64 `[B]` in [0, T).

    Returns:
        The mean, shaped as `x_0`, and the variance, broadcastable to it.
    """
    mean = (
        _at(schedule.posterior_mean_x0, t, x_0) * x_0
        + _at(schedule.posterior_mean_xt, t, x_0) * x_t
    )
    return mean, _at(schedule.posterior_variance, t, x_0)
