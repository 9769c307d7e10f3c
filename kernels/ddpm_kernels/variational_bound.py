"""The term of the variational bound that trains a learned variance, and its derivative.

A network of 2C output channels predicts, in the second half r ∈ [-1, 1], where the log-variance of
the reverse step lies between two numbers of its timestep:

    log σ² = f · log_variance_max + (1 − f) · log_variance_min,        f = (r + 1) / 2
    ℓ = KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t))
      = ½ (log σ² − log_variance_min − 1 + exp(log_variance_min − log σ²) + (k e)² / σ²),      t > 0
    ℓ = −log of the mass of N(x_0 + k e, σ²) on x_0's bin of width 2/255,                      t = 0

in nats, where e = prediction − target and k e is the difference of the means: whatever is
predicted, the mean is linear in it. The gradient of ℓ goes to r alone; e counts as a constant.

The decoder term, that of t = 0, is the approximation of Nichol & Dhariwal's code, with
Φ(z) ≈ σ(2 sqrt(2/π) (z + 0.044715 z³)), the tanh approximation, and a bin's mass of at least 10⁻¹².
It is a training signal. The likelihood that the engine reports takes the exact Φ instead. A latent
has bins of the same width, in place of its density, and no outermost ones.

Source: Ho et al. 2020, equations 5 and 13; Nichol & Dhariwal 2021, equations 15 and 16.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from ddpm_kernels.philox import minus_two_log
from ddpm_kernels.triton_shim import tl, triton


class BoundColumn(IntEnum):
    """Columns of the table of the bound; a row is a timestep."""

    LOG_VARIANCE_MIN = 0
    """Of the posterior q(x_{t-1} | x_t, x_0), that of t = 1 in place of the −∞ at t = 0."""
    LOG_VARIANCE_MAX = 1
    """log β_t."""
    MEAN_FROM_ERROR = 2
    """k: the difference of the means for one unit of prediction − target."""


# --- Reference


def variational_bound(
    error: Tensor, r: Tensor, x_0: Tensor | None, timesteps: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ℓ of each element, and ∂ℓ/∂r, in the precision of `error`, a constant here.

    Args:
        error: e, `[B, C, H, W]`.
        r: the network's second half, shaped as `error`.
        x_0: the clean images, shaped as `error`, whose outermost bins reach to infinity; None for
            latents, which have no range.
        timesteps: int64 `[B]`.
        table: `[T, 3]`, see `BoundColumn`.

    Returns:
        Both shaped as `error`.
    """
    rows = table.to(error.dtype)[timesteps][:, :, None, None, None]
    low = rows[:, BoundColumn.LOG_VARIANCE_MIN]
    high = rows[:, BoundColumn.LOG_VARIANCE_MAX]
    difference = rows[:, BoundColumn.MEAN_FROM_ERROR] * error.detach()
    fraction = (r.to(error.dtype) + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low

    excess = log_variance - low
    ratio, scaled = (-excess).exp(), difference.square() * (-log_variance).exp()
    kl = 0.5 * (excess - 1 + ratio + scaled)
    kl_slope = 0.5 * (1 - ratio - scaled)

    inverse_deviation = (-0.5 * log_variance).exp()
    upper, lower = (inverse_deviation * (end / 255 - difference) for end in (1, -1))
    above, below = _normal_distribution(upper), _normal_distribution(lower)
    if x_0 is not None:
        above = torch.where(x_0 > 0.999, 1, above)
        below = torch.where(x_0 < -0.999, 0, below)
    mass = (above - below).clamp(min=1e-12)
    # The bin's ends, in deviations, shrink by half of what the log-variance grows.
    decoder_slope = 0.5 * (upper * _density(upper, above) - lower * _density(lower, below)) / mass
    decoder_slope = torch.where(above - below >= 1e-12, decoder_slope, 0)

    first = timesteps[:, None, None, None] == 0
    slope = torch.where(first, decoder_slope, kl_slope) * (high - low) / 2
    return torch.where(first, -mass.log(), kl), slope


def _normal_distribution(z: Tensor) -> Tensor:
    """Φ(z), as the module's formula."""
    return (2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).sigmoid()


def _density(z: Tensor, distribution: Tensor) -> Tensor:
    """The derivative of Φ at z; zero where Φ has been set to 0 or 1."""
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z.square())
    return distribution * (1 - distribution) * slope


# --- Triton

_LOG_VARIANCE_MIN = tl.constexpr(int(BoundColumn.LOG_VARIANCE_MIN))
_LOG_VARIANCE_MAX = tl.constexpr(int(BoundColumn.LOG_VARIANCE_MAX))
_MEAN_FROM_ERROR = tl.constexpr(int(BoundColumn.MEAN_FROM_ERROR))
_COLUMNS = tl.constexpr(len(BoundColumn))
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def bound_row(table, timestep, error, r):  # type: ignore[no-untyped-def]
    """The difference of the means, the lower log-variance, what r adds to it, and half the range.

    Of elements of one sample, whose row of the table is `timestep`.
    """
    row = table + timestep * _COLUMNS
    low = tl.load(row + _LOG_VARIANCE_MIN)
    half_range = 0.5 * (tl.load(row + _LOG_VARIANCE_MAX) - low)
    return tl.load(row + _MEAN_FROM_ERROR) * error, low, half_range * (r + 1.0), half_range


@triton.jit
def kl_elements(difference, low, excess):  # type: ignore[no-untyped-def]
    """ℓ at t > 0 and its derivative by the log-variance."""
    ratio = tl.exp2(excess * -_LOG2_E)
    scaled = difference * difference * tl.exp2((low + excess) * -_LOG2_E)
    return 0.5 * (excess - 1.0 + ratio + scaled), 0.5 * (1.0 - ratio - scaled)


@triton.jit
def decoder_elements(x_0, difference, log_variance):  # type: ignore[no-untyped-def]
    """ℓ at t = 0 and its derivative by the log-variance; x_0 is None for latents."""
    inverse_deviation = tl.exp2(log_variance * (-0.5 * _LOG2_E))
    upper = inverse_deviation * (0.00392156862745098 - difference)
    lower = inverse_deviation * (-0.00392156862745098 - difference)
    if x_0 is None:
        above, below = _distribution_elements(upper), _distribution_elements(lower)
    else:
        above = tl.where(x_0 > 0.999, 1.0, _distribution_elements(upper))
        below = tl.where(x_0 < -0.999, 0.0, _distribution_elements(lower))
    mass = above - below
    bounded = tl.maximum(mass, 1e-12)
    slope = upper * _density_elements(upper, above) - lower * _density_elements(lower, below)
    slope = tl.where(mass >= 1e-12, 0.5 * slope / bounded, 0.0)
    return 0.5 * minus_two_log(bounded), slope


@triton.jit
def _distribution_elements(z):  # type: ignore[no-untyped-def]
    """As `_normal_distribution`."""
    return tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def _density_elements(z, distribution):  # type: ignore[no-untyped-def]
    """As `_density`."""
    slope = 1.5957691216057308 + 0.21406444801541077 * z * z
    return distribution * (1.0 - distribution) * slope
