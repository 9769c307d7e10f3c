"""Weights of each timestep's squared error: float64 tables `[T]`.

With x_0 = p z + q F (`ddpm_engine.diffusion.parameterization`), an error of the output is an error
of x_0,

    (x̂_0 − x_0)² = q² (F − target)²,     q² = 1 / SNR for ε,   1 for x_0,   1 / (SNR + 1) for v

so that a weighting is defined once, on the error of x_0, and multiplied by q² for any prediction.
L_simple (Ho et al. 2020, equation 14) has no table: it weighs the output's own error alike at all
timesteps, and so is a different objective for each prediction. `in_space_of` makes it the simple
loss of another prediction.
"""

from __future__ import annotations

from torch import Tensor

from ddpm_engine.diffusion.parameterization import Parameterization, parameterization
from ddpm_engine.diffusion.schedule import NoiseSchedule


def x0_from_error(schedule: NoiseSchedule, prediction: str) -> Tensor:
    """Return q, the factor from an error of the output to one of x_0; float64 `[T]`."""
    a, s = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
    return parameterization(prediction, schedule).x0_coefficients(a, s)[1]


def in_space_of(
    space: Parameterization,
    row: Parameterization,
    a: Tensor,
    s: Tensor,
    limit: float | None = None,
) -> Tensor:
    """Return the weights that make an output's squared error that of another prediction.

    q² / q′², where q is of what the network predicts and q′ of the space in which the error is
    taken: 1 / τ² for an estimate of x_0 under the loss of the velocity ε − x_0, as in "Back to
    Basics: Let Denoising Generative Models Denoise" (Li & He 2025, section 3), whose limit on
    1 / q′² is 400. With the limit γ, the space of ε is min-SNR.

    Args:
        space: the prediction whose error counts.
        row: what the network predicts.
        a: float64 `[N]`, factor of the image in x_t, where a² + s² = 1.
        s: float64 `[N]`, factor of the noise in x_t.
        limit: largest weight of the error of x_0, 1 / q′²; None: none.

    Returns:
        float64 `[N]`.
    """
    of_x0 = space.x0_coefficients(a, s)[1].square().reciprocal()
    if limit is not None:
        of_x0 = of_x0.clamp(max=limit)
    return of_x0 * row.x0_coefficients(a, s)[1].square()


def min_snr_weights(schedule: NoiseSchedule, prediction: str, gamma: float = 5.0) -> Tensor:
    """Return min(SNR, γ) on the error of x_0 (Hang et al. 2023, section 3.4); float64 `[T]`.

    That is min(SNR, γ) / SNR for ε and min(SNR, γ) / (SNR + 1) for v: L_simple of ε, with the
    weight on x_0 capped at γ.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts.
        gamma: γ > 0.
    """
    return schedule.snr.clamp(max=gamma) * x0_from_error(schedule, prediction).square()


def p2_weights(
    schedule: NoiseSchedule, prediction: str, gamma: float = 1.0, k: float = 1.0
) -> Tensor:
    """Return 1 / (k + SNR)^γ on the error of ε (Choi et al. 2022, equation 8); float64 `[T]`.

    That is SNR / (k + SNR)^γ on the error of x_0: timesteps of little noise, where only
    imperceptible detail is missing, weigh less.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts.
        gamma: γ ≥ 0; 0 is L_simple of ε, whatever is predicted.
        k: > 0.
    """
    snr = schedule.snr
    return snr / (k + snr).pow(gamma) * x0_from_error(schedule, prediction).square()


def vlb_weights(schedule: NoiseSchedule, prediction: str) -> Tensor:
    """Return T m_t² / (2 σ_t²) on the error of x_0, the variational bound; float64 `[T]`.

    m_t is the factor of x_0 in the mean of q(x_{t−1} ∣ x_t, x_0), and σ_t² = β̃_t the variance of
    the reverse step (`fixed_small`). For t ≥ 1 the weighted error is T L_t up to a constant, in
    nats per dimension (Ho et al. 2020, equation 8), so that its mean over uniform timesteps is the
    whole sum. L_0 is treated like the others, as the log-density of the Gaussian at x_0 rather than
    the log of its mass on a bin, with the variance of t = 1 because β̃ is zero at t = 0.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts.
    """
    variance = schedule.posterior_log_variance_clipped.exp()
    of_x0 = schedule.timesteps * schedule.posterior_mean_x0.square() / (2 * variance)
    return of_x0 * x0_from_error(schedule, prediction).square()
