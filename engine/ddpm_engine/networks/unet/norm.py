"""GroupNorm by the fused kernel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ddpm_kernels import group_norm_silu


class GroupNorm(nn.Module):
    """GroupNorm with the activation that follows it: `[N, C, H, W]` → same shape and dtype.

    The parameters are those of `torch.nn.GroupNorm`; the statistics are float32 in any precision.
    """

    def __init__(
        self, groups: int, channels: int, eps: float, activation: Literal["silu", "none"] = "silu"
    ) -> None:
        super().__init__()
        self.groups, self.eps, self.activation = groups, eps, activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Normalise, apply 1 + `scale` and `shift` if given, each `[N, C]`, and activate."""
        return group_norm_silu(
            x, self.groups, self.weight, self.bias, scale, shift, self.eps, self.activation
        )

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.groups}, {len(self.weight)}, eps={self.eps}, activation={self.activation!r}"
