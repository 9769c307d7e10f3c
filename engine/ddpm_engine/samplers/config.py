"""Configuration of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ddpm_engine.diffusion.config import Variance

SamplerName = Literal[
    "ddpm",
    "ddim",
    "dpm++1",
    "dpm++2m",
    "dpm++3m",
    "dpm++2m_sde",
    "unipc",
    "unipc3",
    "euler",
    "heun",
]

Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are drawn, during training and by default afterwards."""

    sampler: SamplerName = "ddpm"
    """Which coefficient table."""
    steps: int | None = None
    """Steps a picture, each one network evaluation, or two with heun; None: all T."""
    spacing: Spacing = "trailing"
    """Which timesteps are visited when there are fewer than T (not euler and heun)."""
    variance: Variance = "fixed_large"
    """Variance of ancestral sampling (ddpm); learned_range: by the network's other half."""
    eta: float = 0.0
    """Share of fresh noise in ddim: 0 draws none, 1 is ddpm with fixed_small variance."""
