"""Algorithm 2 of Ho et al. 2020 in plain eager PyTorch, as most codebases write it.

    x_T ~ N(0, I)
    for t = T, …, 1:
        z ~ N(0, I) if t > 1, else z = 0
        x_{t-1} = mean(x_t, ε(x_t, t)) + σ_t z
    return x_0

As in the authors' code, the mean is computed from an estimate of x_0 clipped to [-1, 1],
and σ_t² is fixed to β_t or to the posterior's variance. With fewer steps than T, timesteps are
evenly strided and β is that of the shorter chain (Nichol & Dhariwal 2021, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def extract(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a `[S]` table, one a sample, to broadcast against `[B, C, H, W]`."""
    return table.gather(0, index)[:, None, None, None]


class GaussianDiffusion:
    """The reverse process of a network that predicts the noise.

    Args:
        model: `model(x, t)` → ε, with x float32 `[B, C, H, W]` and t int64 `[B]`.
        betas: β_1 … β_T of the process that the network was trained on, `[T]`.
        steps: how many timesteps to visit; must divide T.
        variance: σ_t²: `fixed_large` is β_t, `fixed_small` the posterior's.
        device: of the tables and the samples.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        betas: Tensor,
        steps: int,
        variance: Literal["fixed_small", "fixed_large"] = "fixed_large",
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model
        self.steps = steps
        self.device = torch.device(device)
        stride = len(betas) // steps
        self.timesteps = torch.arange(0, steps * stride, stride, device=device)

        # The shorter chain keeps ᾱ at the timesteps that it visits.
        alphas_cumprod = (1 - betas.double()).cumprod(0)[: steps * stride : stride]
        alphas_cumprod_prev = torch.cat([torch.ones(1).double(), alphas_cumprod[:-1]])
        alphas = alphas_cumprod / alphas_cumprod_prev
        betas = 1 - alphas
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.sqrt_recip_alphas_cumprod = table((1 / alphas_cumprod).sqrt())
        self.sqrt_recipm1_alphas_cumprod = table((1 / alphas_cumprod - 1).sqrt())
        self.posterior_mean_coef1 = table(betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod))
        self.posterior_mean_coef2 = table(
            (1 - alphas_cumprod_prev) * alphas.sqrt() / (1 - alphas_cumprod)
        )
        self.variance = table(posterior_variance if variance == "fixed_small" else betas)

    def predict_x0_from_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The x_0 that x_t and its noise imply."""
        return (
            extract(self.sqrt_recip_alphas_cumprod, t) * x
            - extract(self.sqrt_recipm1_alphas_cumprod, t) * noise
        )

    def p_mean_variance(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(x_{t-1} | x_t)."""
        noise = self.model(x, self.timesteps[t])
        x0 = self.predict_x0_from_noise(x, t, noise).clamp(-1, 1)
        mean = (
            extract(self.posterior_mean_coef1, t) * x0 + extract(self.posterior_mean_coef2, t) * x
        )
        return mean, extract(self.variance, t)

    def p_sample(self, x: Tensor, t: int) -> Tensor:
        """x_{t-1} from x_t."""
        mean, variance = self.p_mean_variance(x, torch.full((len(x),), t, device=self.device))
        if t == 0:
            return mean
        return mean + variance.sqrt() * torch.randn(x.shape, device=self.device)

    @torch.no_grad()
    def sample(self, shape: tuple[int, int, int, int]) -> Tensor:
        """Generate samples of shape (B, C, H, W)."""
        x = torch.randn(shape, device=self.device)
        for t in reversed(range(self.steps)):
            x = self.p_sample(x, t)
        return x
