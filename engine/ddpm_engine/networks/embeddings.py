"""Timestep embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(
    timesteps: Tensor, channels: int, *, flip_sin_to_cos: bool = False, freq_shift: int = 1
) -> Tensor:
    """Embed timesteps as sines and cosines of geometrically spaced frequencies.

        [sin(t ω₀), …, sin(t ω_{h−1}), cos(t ω₀), …, cos(t ω_{h−1})],   ω_k = 10000^(−k/(h − shift))

    with h = channels // 2, and a final zero if `channels` is odd.

    Args:
        timesteps: `[B]`, any real or integer dtype.
        channels: width of the embedding.
        flip_sin_to_cos: cosines first.
        freq_shift: 1 as in the paper's code, where ω_{h−1} is exactly 1/10000; 0 in others.

    Returns:
        float32 `[B, channels]`.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5, as used by Ho, Jain &
    Abbeel, "Denoising Diffusion Probabilistic Models", 2020.
    """
    half = channels // 2
    # The frequencies are rounded to float32 exactly where published models rounded them: at t = 999
    # one ulp of ω moves the embedding by 6e-5. They are not a buffer, which `.half()` would round.
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10_000) * exponents / (half - freq_shift))
    angles = timesteps[:, None].to(torch.float32) * frequencies
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    embedding = torch.cat(parts, dim=1)
    return F.pad(embedding, (0, 1)) if channels % 2 else embedding


class TimestepMLP(nn.Module):
    """Two linear layers between the sinusoids and the residual blocks: `[B, in]` → `[B, out]`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers, SiLU between them: `[B, channels]` to `[B, E]`."""
        hidden: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return hidden
