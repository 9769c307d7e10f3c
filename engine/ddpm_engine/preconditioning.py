"""EDM's preconditioning: what stands between a network and the images.

    D(y; σ) = c_skip y + c_out F(c_in y; c_noise),        y = x_0 + σ n

estimates x_0. The factors keep what the network F sees and what it has to say at the same deviation
at every noise level, and its errors as small in x_0 as they can be.

Source: Karras, Aittala, Aila & Laine, "Elucidating the Design Space of Diffusion-Based Generative
Models", 2022, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Preconditioning:
    """The factors at some noise levels, each shaped as σ."""

    skip: Tensor
    """c_skip = σ_data² / (σ² + σ_data²)."""
    out: Tensor
    """c_out = σ σ_data / sqrt(σ² + σ_data²)."""
    input: Tensor
    """c_in = 1 / sqrt(σ² + σ_data²)."""
    noise: Tensor
    """c_noise = ln(σ) / 4, what the network is told of the noise level."""


def preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """The factors of D.

    Args:
        sigma: σ > 0, any shape, best float64.
        sigma_data: σ_data > 0, the deviation of the images' values.
    """
    deviation = (sigma.square() + sigma_data**2).sqrt()
    return Preconditioning(
        skip=(sigma_data / deviation).square(),
        out=sigma * sigma_data / deviation,
        input=1 / deviation,
        noise=sigma.log() / 4,
    )
