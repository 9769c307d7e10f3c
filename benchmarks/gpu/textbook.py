"""The operations as a textbook has them, of torch's own operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_engine.networks.unet import norm
from ddpm_kernels import Column


def per_pixel(per_sample: Tensor) -> Tensor:
    """Shape `[B]` or `[B, C]` to broadcast against images."""
    return per_sample.reshape(*per_sample.shape, *[1] * (4 - per_sample.ndim))


def q_sample(
    images: Tensor, signal: Tensor, sigma: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return x_t, and the noise, which the loss will want."""
    x_0 = images.to(dtype) / 127.5 - 1
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


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str
) -> Tensor:
    """Compute what `ddpm_kernels.group_norm_silu` does without scale and shift."""
    z = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(z) if activation == "silu" else z


@contextmanager
def plain_norms() -> Iterator[None]:
    """Let networks normalise by torch's own operations, in eager code and in compiled."""

    def plain(
        x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None,
        shift: Tensor | None = None, eps: float = 1e-6, activation: str = "silu",
    ) -> Tensor:  # fmt: skip
        assert scale is None
        assert shift is None
        return group_norm_silu(x, groups, weight, bias, eps, activation)

    with mock.patch.object(norm, "group_norm_silu", plain):
        yield
