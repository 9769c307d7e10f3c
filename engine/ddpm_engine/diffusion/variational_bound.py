"""The variational bound on the negative log-likelihood, term by term, in bits per dimension.

    E[−log p(x_0)] ≤ L_0 + L_1 + … + L_{T−1} + L_T        (Ho et al. 2020, equation 5)

with this engine's timesteps t = 0 … T − 1, which are the paper's t − 1:

| term                 | what it is                                            | function         |
|----------------------|-------------------------------------------------------|------------------|
| L_T                  | KL(q(x_t at t = T − 1 ∣ x_0) ‖ N(0, I))               | `prior_term`     |
| L_t, t = T − 1 … 1   | KL(q(x_{t−1} ∣ x_t, x_0) ‖ p(x_{t−1} ∣ x_t))          | `denoising_term` |
| L_0                  | −log p(x_0 ∣ x_t at t = 0): bytes under the last step | `decoder_term`   |

where x_0 is the clean image and x_t the noisy one at timestep t. The functions return nats for each
pixel and channel, in the precision of their arguments. `bits_per_dim` makes the noise, evaluates
the network and averages. It serves every parameterization, whatever noise levels the network was
trained at: the bound is that of the schedule's chain, with the network's estimates of x_0.

Conventions are those of the paper's code and of improved-diffusion's: the variance of the last
step, which would be zero, is that of the step before it, with `fixed_small` and `fixed_large`
alike; x_0 is clipped before the mean is taken. Two conventions differ, so that the result is a
bound for any network: the normal distribution function is exact (theirs errs by up to 3e-4), and a
bin's mass has no floor (theirs is at least 10⁻¹²).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.parameterization import parameterization
from ddpm_engine.diffusion.process import add_noise, posterior
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_kernels import Stream, gaussian_noise

Model = Callable[..., Tensor]
"""`model(x, timesteps, conditioning)` → output, `[B, C, H, W]`."""


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """Return KL(N(mean, e^log_variance) ‖ N(other_mean, e^other_log_variance)), in nats.

    Elementwise, ½ (log σ₂² − log σ₁² − 1 + (σ₁² + (μ₁ − μ₂)²) / σ₂²); arguments broadcast.
    """
    return 0.5 * (
        other_log_variance
        - log_variance
        - 1
        + (log_variance - other_log_variance).exp()
        + (mean - other_mean).square() * (-other_log_variance).exp()
    )


def prior_term(schedule: NoiseSchedule, x_0: Tensor) -> Tensor:
    """Return L_T = KL(q(x ∣ x_0) ‖ N(0, I)) at t = T − 1, in nats per element, shaped as `x_0`.

    It measures what is left of the image where sampling assumes pure noise; zero with zero terminal
    SNR.

    Args:
        schedule: the noise schedule.
        x_0: clean images in [-1, 1], any shape.
    """
    alpha_bar = schedule.alpha_bar[-1].to(x_0.device)
    zero = torch.zeros((), dtype=torch.float64, device=x_0.device)
    return gaussian_kl(alpha_bar.sqrt() * x_0, (1 - alpha_bar).log(), zero, zero).to(x_0.dtype)


def denoising_term(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: Tensor, mean: Tensor, log_variance: Tensor
) -> Tensor:
    """Return L_t = KL(q(x_{t−1} ∣ x_t, x_0) ‖ N(mean, e^log_variance)), t ≥ 1, nats per element.

    Args:
        schedule: the noise schedule.
        x_0: clean images `[B, ...]`.
        x_t: noisy images, shaped as `x_0`.
        t: int64 `[B]` in [1, T).
        mean: of the reverse step, shaped as `x_0`.
        log_variance: of the reverse step, broadcastable to `x_0`.

    Returns:
        Shaped as `x_0`.
    """
    true_mean, true_variance = posterior(schedule, x_0, x_t, t)
    return gaussian_kl(true_mean, true_variance.log(), mean, log_variance)


def decoder_term(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return L_0 = −log of the mass of N(mean, e^log_variance) on x_0's bin, nats per element.

    Bins are 2/255 wide, those of the 256 values of a byte; the outermost reach to infinity
    (Ho et al. 2020, equation 13). Exact in the tails too, however far out the bin lies.

    Args:
        x_0: clean images `[B, ...]`, each value one of −1, −253/255, … 1.
        mean: of the last step, shaped as `x_0`.
        log_variance: of the last step, broadcastable to `x_0`.

    Returns:
        Shaped as `x_0`.
    """
    inverse_deviation = (-0.5 * log_variance).exp()
    upper = (x_0 + 1 / 255 - mean) * inverse_deviation
    lower = (x_0 - 1 / 255 - mean) * inverse_deviation
    upper = torch.where(x_0 > 0.999, math.inf, upper)
    lower = torch.where(x_0 < -0.999, -math.inf, lower)
    # In the left tail a difference of distribution functions keeps its digits: Φ(−z) = 1 − Φ(z).
    mirrored = lower + upper > 0
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return -log_upper - (-torch.expm1(log_lower - log_upper)).log()


def reverse_log_variance(
    schedule: NoiseSchedule, variance: Variance, t: int, fraction: Tensor | None = None
) -> Tensor:
    """Return log σ_t² of the reverse step, float64.

    Args:
        schedule: the noise schedule.
        variance: `fixed_small`: β̃_t; `fixed_large`: β_t; `learned_range`: between them in the
            logarithm, by `fraction` (Nichol & Dhariwal 2021, equation 15). At t = 0 both fixed ones
            are β̃ of t = 1, as in the paper's code.
        t: in [0, T).
        fraction: of a learned variance, 0 for β̃ and 1 for β; any shape.

    Returns:
        0-dim, or shaped as `fraction`.
    """
    low, high = schedule.posterior_log_variance_clipped[t], schedule.betas[t].log()
    if variance == "learned_range":
        assert fraction is not None, "a learned variance needs the network's other half"
        return fraction.double() * high + (1 - fraction.double()) * low
    return high if variance == "fixed_large" and t > 0 else low


@torch.no_grad()
def bits_per_dim(
    model: Model,
    schedule: NoiseSchedule,
    images: Tensor,
    sample_ids: Tensor,
    *,
    seed: int = 0,
    prediction: str = "eps",
    variance: Variance = "fixed_small",
    conditioning: Any = None,
    clip: bool = True,
) -> Tensor:
    """Compute all terms of the bound for a batch of images, by T network evaluations.

    Each term is estimated from one sample of x_t, a function of the seed, the image's id and t
    alone. Memory is that of a few float64 batches, whatever T.

    Args:
        model: the network, on the device of the images, in eval mode.
        schedule: the noise schedule that it was trained on.
        images: uint8 `[B, C, H, W]`.
        sample_ids: int64 `[B]`.
        seed: of the noise.
        prediction: what the network predicts.
        variance: of the reverse steps; `learned_range` takes it from the second half of 2C outputs.
        conditioning: third argument of the network: its conditions, or None.
        clip: the estimate of x_0 to [-1, 1].

    Returns:
        float64 `[B, T + 1]`, in bits per dimension: column t is L_t, of the decoder at t = 0, and
        column T is the prior's. The sum over columns bounds −log₂ p(image) / (C H W).

    Raises:
        ValueError: images that are not bytes, or a network whose outputs do not fit the variance.
        UserError: an unknown prediction, or one that needs a signal, on a schedule with zero
            terminal SNR.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; only of uint8 is the likelihood defined")
    channels = images.shape[1]
    x_0 = (2 * images.double() - 255) / 255
    row = parameterization(prediction, schedule)
    signal, sigma = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
    row.check(signal)
    scale = row.state_scale(signal, sigma)
    noise_input = row.noise_level(signal, sigma, torch.arange(schedule.timesteps))
    if noise_input.is_floating_point():
        noise_input = noise_input.to(torch.float32)
    noise_input = noise_input.to(images.device)
    terms = x_0.new_empty(len(images), schedule.timesteps + 1)
    terms[:, -1] = _mean_bits(prior_term(schedule, x_0))
    for t in range(schedule.timesteps):
        timesteps = torch.full_like(sample_ids, t, device=images.device)
        shape = (channels, images.shape[2], images.shape[3])
        noise = gaussian_noise(seed, sample_ids, shape, t, Stream.LIKELIHOOD_NOISE)
        x_t = add_noise(schedule, x_0, timesteps, noise.to(x_0))
        z = scale[t] * x_t
        level = noise_input[t].expand(len(images))
        output = model(z.float(), level, conditioning).double()
        expected = 2 * channels if variance == "learned_range" else channels
        if output.shape[1] < expected:
            raise ValueError(
                f"the network's output has {output.shape[1]} channels; for images of {channels} "
                f"and the variance {variance} it must have {expected}"
            )
        estimate = row.to_x0(output[:, :channels], z, signal[t], sigma[t])
        if clip:
            estimate = estimate.clamp(-1, 1)
        mean, _ = posterior(schedule, estimate, x_t, timesteps)
        fraction = (output[:, channels:] + 1) / 2 if variance == "learned_range" else None
        log_variance = reverse_log_variance(schedule, variance, t, fraction)
        if t == 0:
            term = decoder_term(x_0, mean, log_variance)
        else:
            term = denoising_term(schedule, x_0, x_t, timesteps, mean, log_variance)
        terms[:, t] = _mean_bits(term)
    return terms


def _mean_bits(nats: Tensor) -> Tensor:
    """Mean of each sample, in bits: `[B]`."""
    return nats.flatten(1).mean(1) / math.log(2)
