"""The operations as a textbook has them, of torch's own operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_kernels import Column


def per_pixel(per_sample: Tensor) -> Tensor:
    """Shape `[B]` or `[B, C]` to broadcast against images."""
    return per_sample.reshape(*per_sample.shape, *[1] * (4 - per_sample.ndim))


def q_sample(
    images: Tensor, signal: Tensor, sigma: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return x_t, and the noise, which the loss will want."""
    return mix(images.to(dtype) / 127.5 - 1, signal, sigma, dtype)


def latents(moments: Tensor, latent_scale: float, latent_shift: float) -> Tensor:
    """Return latents drawn from the moments of an autoencoder, in float32."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    sampled = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    return (sampled - latent_shift) * latent_scale


def mix(x_0: Tensor, signal: Tensor, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x_t, and the noise, which the loss will want."""
    noise = torch.randn_like(x_0)
    return (per_pixel(signal) * x_0 + per_pixel(sigma) * noise).to(dtype), noise


def loss(prediction: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean square of prediction − noise, `[B]`."""
    return (prediction.float() - noise.float()).square().mean((1, 2, 3)) * weights


def reverse_step(x: Tensor, output: Tensor, row: Tensor) -> Tensor:
    """Take one step of ancestral sampling with x̂_0 clipped; `row` as in a coefficient table."""
    x_0 = (row[Column.X0_FROM_X] * x + row[Column.X0_FROM_OUTPUT] * output).clamp(-1, 1)
    mean = row[Column.X] * x + row[Column.X0] * x_0
    return mean + row[Column.NOISE] * torch.randn_like(x)


def modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what `ddpm_kernels.modulate` does with LayerNorm."""
    r = x + gate.unsqueeze(1) * y
    normalised = F.layer_norm(r, r.shape[-1:], eps=1e-6)
    return r, normalised * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str
) -> Tensor:
    """Compute what `ddpm_kernels.group_norm_silu` does without scale and shift."""
    z = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(z) if activation == "silu" else z
