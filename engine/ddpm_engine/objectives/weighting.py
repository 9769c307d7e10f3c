"""How much the squared error of each timestep weighs: a float64 table `[T]`.

The network's output is compared with ε, x_0 or v, and an error of the one is an error of the
others: with x̂_0 = p x_t + q · output (`ddpm_engine.diffusion.parameterization`),

    (x̂_0 − x_0)² = q² (output − target)²,     q² = 1 / SNR for ε,   1 for x_0,   1 / (SNR + 1) for v

so that a weighting is given once, for the error of x_0, and its table for any prediction is that
times q². L_simple (Ho et al. 2020, equation 14) has no table: it weighs the output's own error
alike at all timesteps, which makes it another objective for each prediction.
"""

from __future__ import annotations

from torch import Tensor

from ddpm_engine.diffusion.parameterization import Prediction, x0_coefficients
from ddpm_engine.diffusion.schedule import NoiseSchedule


def x0_from_error(schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """q: the error of x_0 for one of the output, at each timestep; float64 `[T]`.

    Raises:
        UserError: `"edm"`, which has a weighting of its own.
    """
    a, s = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
    return x0_coefficients(prediction, a, s)[1]


def min_snr_weights(schedule: NoiseSchedule, prediction: Prediction, gamma: float = 5.0) -> Tensor:
    """min(SNR, γ) on the error of x_0 (Hang et al. 2023, section 3.4); float64 `[T]`.

    That is min(SNR, γ) / SNR for ε and min(SNR, γ) / (SNR + 1) for v: as L_simple of ε, but no
    timestep pulls at x_0 more strongly than γ.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts.
        gamma: γ > 0.
    """
    return schedule.snr.clamp(max=gamma) * x0_from_error(schedule, prediction).square()


def p2_weights(
    schedule: NoiseSchedule, prediction: Prediction, gamma: float = 1.0, k: float = 1.0
) -> Tensor:
    """1 / (k + SNR)^γ on the error of ε (Choi et al. 2022, equation 8); float64 `[T]`.

    That is SNR / (k + SNR)^γ for x_0: timesteps of little noise, which show details that no eye
    sees, weigh less.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts.
        gamma: γ ≥ 0; 0 is L_simple of ε, whatever is predicted.
        k: > 0.
    """
    snr = schedule.snr
    return snr / (k + snr).pow(gamma) * x0_from_error(schedule, prediction).square()


def vlb_weights(schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """T m_t² / (2 σ_t²) on the error of x_0: the variational bound; float64 `[T]`.

    m_t is the factor of x_0 in the mean of q(x_{t−1} ∣ x_t, x_0), and σ_t² = β̃_t the variance of
    the reverse step (`fixed_small`). For t ≥ 1 the weighted error is T L_t but for a constant, in
    nats a dimension (Ho et al. 2020, equation 8), so that its mean over uniform timesteps is the
    whole sum. L_0 is treated alike, as the logarithm of the Gaussian's density at x_0 rather than
    of its mass on a bin, with the variance of t = 1, as β̃ is zero at t = 0.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts.
    """
    variance = schedule.posterior_log_variance_clipped.exp()
    of_x0 = schedule.timesteps * schedule.posterior_mean_x0.square() / (2 * variance)
    return of_x0 * x0_from_error(schedule, prediction).square()
