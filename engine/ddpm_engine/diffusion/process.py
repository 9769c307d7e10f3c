"""The closed forms of the Markov chain: noising an image, and the posterior of a step.

These are the formulas of Ho et al. 2020, section 2, for study, plots, tests and the variational
bound. Training noises images with `ddpm_kernels.q_sample`; sampling runs the posterior as a
coefficient table.
"""

from __future__ import annotations

from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule


def add_noise(schedule: NoiseSchedule, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return x_t ~ q(x_t | x_0) = N(sqrt(ᾱ_t) x_0, (1 − ᾱ_t) I), shaped as `x_0` (equation 4).

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
    """Return mean and variance of q(x_{t−1} | x_t, x_0) (equations 6 and 7).

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


def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """Return a schedule's values for each sample, shaped to broadcast against images."""
    return table.to(x.device)[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
