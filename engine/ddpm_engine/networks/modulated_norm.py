"""Residual sum, norm, and a sample's own scale and shift, as transformers without a U have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpm_kernels import modulate

EPS = 1e-6
"""Epsilon of norms whose configuration has none."""

Stream = tuple[Tensor, Tensor | None, Tensor | None]
"""Tokens `[B, L, C]`, what a block adds to them `[B, L, C]`, and the gate of that, `[B, C]`; the
norm that comes next adds it on its way."""


class ModulatedNorm(nn.Module):
    """Adds what a branch computed, normalises, and applies a sample's own scale and shift.

    Args:
        channels: C.
        norm: "layer", or "rms" with a gain.
        eps: added to variance or mean square.

    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023, adaLN-zero.
    """

    def __init__(self, channels: int, norm: str = "layer", eps: float = EPS) -> None:
        super().__init__()
        self.norm, self.eps = norm, eps
        self.weight = nn.Parameter(torch.ones(channels)) if norm == "rms" else None

    def forward(self, stream: Stream, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Modulate the norm of the sum; scale and shift are `[B, C]`.

        Returns:
            The sum and its modulated norm, both `[B, L, C]`.
        """
        return modulate(*stream, scale, shift, weight=self.weight, norm=self.norm, eps=self.eps)
