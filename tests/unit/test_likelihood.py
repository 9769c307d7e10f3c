"""The variational bound: each term against its closed form, and improved-diffusion's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.flow_schedule import FlowSchedule
from ddpm_engine.diffusion.parameterization import Prediction, parameterization
from ddpm_engine.diffusion.process import add_noise
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.diffusion.variational_bound import (
    bits_per_dim,
    decoder_term,
    denoising_term,
    gaussian_kl,
    prior_term,
)
from ddpm_engine.networks.conditioning import Conditioning

SCHEDULE = NoiseSchedule.linear(10, 0.01, 0.3)
PAPER = NoiseSchedule.linear(1000)
DEVIATION = 0.3
"""Of the pixels of the one-dimensional data set, whose mean is zero."""
WIDTH = 2 / 255
LEVELS = torch.arange(256, dtype=torch.float64) * WIDTH - 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- The terms


def test_kl_between_gaussians() -> None:
    mean, other_mean = normal(50), normal(50, seed=1)
    log_variance, other_log_variance = 3 * normal(50, seed=2), 3 * normal(50, seed=3)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
        torch.distributions.Normal(other_mean, (0.5 * other_log_variance).exp()),
    )
    actual = gaussian_kl(mean, log_variance, other_mean, other_log_variance)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert gaussian_kl(mean, log_variance, mean, log_variance).abs().max() < 1e-15


def test_prior_term() -> None:
    x_0 = normal(3, 2, 4, 4).clamp(-1, 1)
    left = math.prod(1 - beta for beta in torch.linspace(1e-4, 0.02, 1000).double().tolist())
    # KL(N(√ᾱ x_0, 1 − ᾱ) ‖ N(0, 1))
    expected = 0.5 * (left * x_0**2 + (1 - left) - 1 - math.log(1 - left))
    torch.testing.assert_close(prior_term(PAPER, x_0), expected, rtol=1e-6, atol=0)
    assert prior_term(PAPER.rescaled_to_zero_terminal_snr(), x_0).abs().max() == 0


@pytest.mark.parametrize("t", [1, 999])
def test_denoising_term_vanishes_at_the_posterior_alone(t: int) -> None:
    x_0, noise = normal(2, 1, 3, 3).clamp(-1, 1), normal(2, 1, 3, 3, seed=1)
    at = torch.tensor([t, t])
    x_t = add_noise(PAPER, x_0, at, noise)
    ab, before = PAPER.alpha_bar[t], PAPER.alpha_bar[t - 1]
    beta = 1 - ab / before
    mean = (before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - ab)
    variance = (1 - before) / (1 - ab) * beta
    exact = denoising_term(PAPER, x_0, x_t, at, mean, variance.log())
    assert exact.abs().max() < 1e-12
    moved = denoising_term(PAPER, x_0, x_t, at, mean + 0.01, variance.log())
    torch.testing.assert_close(
        moved, (0.5 * 0.01**2 / variance).expand_as(moved), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("mean", "deviation"), [(-1.0, 1e-4), (0.001, 7e-3), (0.77, 0.3), (1.5, 10.0)]
)
def test_decoder_is_a_distribution_of_bytes(mean: float, deviation: float) -> None:
    log_variance = torch.tensor(2 * math.log(deviation), dtype=torch.float64)
    log_mass = -decoder_term(LEVELS, torch.full_like(LEVELS, mean), log_variance)
    assert abs(log_mass.exp().sum() - 1) < 1e-12
    edges = (LEVELS[:-1] + LEVELS[1:]) / 2
    cdf = stats.norm.cdf(edges.numpy(), mean, deviation)
    expected = torch.from_numpy(cdf).diff()
    torch.testing.assert_close(log_mass[1:-1].exp(), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder_keeps_its_digits_in_the_tails(dtype: torch.dtype) -> None:
    """A thousand deviations away the mass is e^(−500 000), and its logarithm is still right."""
    deviation = 1e-3
    x_0 = LEVELS[[0, 100, 255]].to(dtype)
    mean = x_0 + torch.tensor([1, -1, -1], dtype=dtype)  # of the first, its bin reaches to −∞
    log_variance = torch.tensor(2 * math.log(deviation), dtype=dtype)
    z = (1 - 1 / 255) / deviation
    expected = -stats.norm.logsf(z)
    actual = decoder_term(x_0, mean, log_variance)
    rtol = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(actual, torch.tensor([expected] * 3, dtype=dtype), rtol=rtol, atol=0)


# --- improved-diffusion's conventions


def their_term(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: int, x_0_hat: Tensor, log_variance: Tensor
) -> Tensor:
    """`_vb_terms_bpd` of improved-diffusion, transcribed: bits per dimension, `[B]`."""
    ab, before = schedule.alpha_bar[t], schedule.alpha_bar_previous[t]
    c_x_0 = schedule.betas[t] * before.sqrt() / (1 - ab)
    c_x_t = (1 - before) * schedule.alphas[t].sqrt() / (1 - ab)
    true_mean, mean = c_x_0 * x_0 + c_x_t * x_t, c_x_0 * x_0_hat + c_x_t * x_t
    if t > 0:
        low = schedule.posterior_variance[t].log()
        nats = 0.5 * (
            -1.0 + log_variance - low + (low - log_variance).exp()
            + (true_mean - mean) ** 2 * (-log_variance).exp()
        )  # fmt: skip
    else:

        def cdf(z: Tensor) -> Tensor:
            return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

        inverse = (-0.5 * log_variance).exp()
        plus, minus = cdf(inverse * (x_0 - mean + 1 / 255)), cdf(inverse * (x_0 - mean - 1 / 255))
        nats = -torch.where(
            x_0 < -0.999,
            plus.clamp(min=1e-12).log(),
            torch.where(
                x_0 > 0.999,
                (1 - minus).clamp(min=1e-12).log(),
                (plus - minus).clamp(min=1e-12).log(),
            ),
        )
    return nats.mean((1, 2, 3)) / math.log(2)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_terms_are_improved_diffusions(variance: Variance, clip: bool) -> None:
    schedule = NoiseSchedule.linear(40, 1e-3, 0.2)
    images = torch.randint(
        0, 256, (3, 2, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images[0, 0, 0, :2] = torch.tensor([0, 255])
    x_0 = (images.double() / 127.5) - 1
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.labels is labels
        t = int(timesteps[0])
        a, s = schedule.sqrt_alpha_bar[t].float(), schedule.sqrt_one_minus_alpha_bar[t].float()
        output = (x_t - a * x_0.float()) / s + 0.1 * (5 * x_t).sin()
        if variance == "learned_range":
            output = torch.cat([output, (3 * x_t).cos()], 1)
        seen.append((x_t.double(), output.double()))
        return output

    labels = torch.tensor([4, 5, 6])
    terms = bits_per_dim(
        network, schedule, images, torch.arange(3), variance=variance, clip=clip,
        conditioning=Conditioning(labels),
    )  # fmt: skip
    assert terms.shape == (3, 41)
    for t, (x_t, output) in enumerate(seen):
        a, s = schedule.sqrt_alpha_bar[t], schedule.sqrt_one_minus_alpha_bar[t]
        estimate = (x_t - s * output[:, :2]) / a
        if clip:
            estimate = estimate.clamp(-1, 1)
        low, high = schedule.posterior_log_variance_clipped[t], schedule.betas[t].log()
        log_variance = {
            "fixed_small": low,
            "fixed_large": high if t else low,
            "learned_range": (output[:, 2:] + 1) / 2 * high + (1 - output[:, 2:]) / 2 * low
            if variance == "learned_range"
            else low,
        }[variance]
        theirs = their_term(schedule, x_0, x_t, t, estimate, log_variance)
        # At t = 0 their normal distribution function is approximate.
        torch.testing.assert_close(terms[:, t], theirs, rtol=1e-5 if t else 2e-3, atol=1e-6)


# --- Invariances


def gaussian_pixels(count: int) -> Tensor:
    """Images of independent pixels of N(0, 0.3²) in bytes."""
    pixels = DEVIATION * normal(count, 1, 32, 32, seed=1)
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def best(prediction: Prediction = "x0", schedule: NoiseSchedule = SCHEDULE) -> Any:
    """The best denoiser of those images, E[x_0 | x_t], which is linear."""
    row = parameterization(prediction, schedule)
    levels = row.noise_level(
        schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar, torch.arange(schedule.timesteps)
    )

    def network(z: Tensor, noise_level: Tensor, conditioning: object) -> Tensor:
        t = int((levels - noise_level[0]).abs().argmin())
        a, s = schedule.sqrt_alpha_bar[t], schedule.sqrt_one_minus_alpha_bar[t]
        z = z.double()
        x_0 = a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2) * z / row.state_scale(a, s)
        return row.from_x0(x_0, z, a, s)

    return network


FLOW = FlowSchedule.build(10)


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [
        ("eps", SCHEDULE), ("v", SCHEDULE), ("edm", SCHEDULE), ("flow", SCHEDULE), ("v", FLOW),
        ("flow", FLOW),
    ],
)  # fmt: skip
def test_bound_is_the_same_for_every_prediction_type(
    prediction: Prediction, schedule: NoiseSchedule
) -> None:
    images = gaussian_pixels(2)
    ids = torch.arange(2)
    expected = bits_per_dim(best("x0", schedule), schedule, images, ids, prediction="x0")
    network = best(prediction, schedule)
    actual = bits_per_dim(network, schedule, images, ids, prediction=prediction)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert bool(expected.isfinite().all())


def test_bound_depends_on_seed_and_id_and_not_on_the_batch() -> None:
    images = gaussian_pixels(4)
    ids = torch.tensor([3, 2**40, 7, 9])
    together = bits_per_dim(best(), SCHEDULE, images, ids, seed=5, prediction="x0")
    alone = torch.cat([
        bits_per_dim(best(), SCHEDULE, images[i : i + 1], ids[i : i + 1], seed=5, prediction="x0")
        for i in range(4)
    ])  # fmt: skip
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=0)
    other = bits_per_dim(best(), SCHEDULE, images, ids, seed=6, prediction="x0")
    assert not bool((other[:, :-1] == together[:, :-1]).any())
    assert torch.equal(other[:, -1], together[:, -1])  # the prior's needs no noise


def test_invalid_inputs_are_refused() -> None:
    images = gaussian_pixels(1)
    with pytest.raises(ValueError, match="float32"):
        bits_per_dim(best(), SCHEDULE, images.float(), torch.arange(1))
    with pytest.raises(ValueError, match="it must have 2"):
        bits_per_dim(best(), SCHEDULE, images, torch.arange(1), variance="learned_range")
