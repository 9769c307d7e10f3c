"""Self-attention over the pixels of a feature map."""

from __future__ import annotations

from typing import cast

from torch import nn

from ddpm_engine.networks.attention import Attend
from ddpm_engine.networks.linear import apply_together, split_bias
from ddpm_engine.networks.unet.features import Features, residual
from ddpm_engine.networks.unet.norm import GroupNorm


class Attention(nn.Module):
    """Multi-head self-attention with a residual connection: `[B, C, H, W]` → same shape.

    Args:
        channels: C.
        heads: their number, a divisor of C.
        attend: the kernel, from `choose_attention`.
        groups: of the GroupNorm that comes first, or None for none.
        eps: of that norm.
        divisor: the residual sum is divided by it.
    """

    separate: bool = False
    """See `Network.separate_blocks`."""

    def __init__(
        self,
        channels: int,
        heads: int,
        attend: Attend,
        groups: int | None,
        eps: float,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads, self.attend, self.divisor = heads, attend, divisor
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps, "none")
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Features) -> Features:
        """Let every pixel attend to every pixel: `[B, C, H, W]` to the same."""
        if self.group_norm is None:
            x = x.settled()
            h = x.map
        else:
            h, (x,) = self.group_norm(x)
        # A channels-last map is already [B, HW, C] in memory: both reshapes are views.
        tokens = h.flatten(2).transpose(1, 2)
        query, key, value = (
            projected.unflatten(2, (self.heads, -1))
            for projected in apply_together((self.to_q, self.to_k, self.to_v), tokens)
        )
        to_out = cast(nn.Linear, self.to_out[0])
        attended, bias = split_bias(to_out, self.attend(query, key, value).flatten(2))
        h = attended.transpose(1, 2).unflatten(2, x.map.shape[2:])
        return residual(h, x.map, bias, divisor=self.divisor, settled=self.separate)
