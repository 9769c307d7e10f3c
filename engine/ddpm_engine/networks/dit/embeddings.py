"""Patches of images as tokens, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.dit.config import DiTConfig


class PatchEmbedding(nn.Module):
    """Patches of an image as tokens: `[B, C, H, W]` → `[B, H W / p², width]`.

    A convolution whose stride is its kernel: a product with each patch, and computed as one.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        patch, bottleneck = config.patch_size, config.patch_bottleneck
        self.bottleneck = (
            None
            if bottleneck is None
            else nn.Conv2d(config.in_channels, bottleneck, patch, stride=patch, bias=False)
        )
        self.proj: nn.Conv2d | nn.Linear = (
            nn.Conv2d(config.in_channels, config.channels, patch, stride=patch)
            if bottleneck is None
            else nn.Linear(bottleneck, config.channels)
        )
        self.patch_size = patch

    def forward(self, x: Tensor) -> Tensor:
        """Project every patch of `[B, C, H, W]`, row after row, to `[B, L, width]`."""
        size = self.patch_size
        patches = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        tokens = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        if self.bottleneck is not None:
            tokens = F.linear(tokens, self.bottleneck.weight.flatten(1))
        weight = self.proj.weight.flatten(1)
        assert self.proj.bias is not None
        # Biases of convolutions may be wider than their weights.
        return F.linear(tokens, weight, self.proj.bias.to(weight.dtype))


def unpatched(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Lay patches side by side.

    Args:
        tokens: `[B, height * width, p² C]`, the channels of each pixel side by side.
        height: patches of a column.
        width: patches of a row.
        patch_size: p.

    Returns:
        `[B, C, p * height, p * width]`, contiguous.
    """
    patches = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (height, width))
    size = height * patch_size, width * patch_size
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, *size)
