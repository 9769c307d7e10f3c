"""Latents of an autoencoder in place of pixels."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from ddpm_engine.images.grid import to_levels

_AT_ONCE = 32
"""Images that are in memory as floating-point numbers at a time."""


class ImageAutoencoder(Protocol):
    """What `LatentCodec` asks of an autoencoder; `networks.autoencoder` has one."""

    factor: int
    """Pixels along a side for each latent."""
    image_channels: int
    """Channels of the images."""
    scale: float
    """What latents are multiplied by, behind the shift."""
    shift: float
    """What is subtracted from latents."""

    def moments(self, images: Tensor) -> Tensor:
        """Map uint8 images `[B, C, H, W]` to means and log-variances, fp32 `[B, 2 C', h, w]`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents `[B, C', h, w]` to images around 0 … 255, fp32 `[B, C, H, W]`."""


class LatentCodec:
    """Diffuses latents: x_0 = (z − shift) · scale for latents z of an autoencoder.

    Args:
        autoencoder: of the latents.
        scale: in place of the autoencoder's own.
        shift: in place of the autoencoder's own.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
    section 3 and appendix G.
    """

    clip_range: tuple[float, float] | None = None
    """Latents have no bounds."""

    def __init__(
        self,
        autoencoder: ImageAutoencoder,
        scale: float | None = None,
        shift: float | None = None,
    ) -> None:
        self.autoencoder = autoencoder
        self.scale = autoencoder.scale if scale is None else scale
        self.shift = autoencoder.shift if shift is None else shift

    def encode(self, images: Tensor) -> Tensor:
        """Return the means of latents, scaled.

        Args:
            images: uint8 `[B, C, H, W]`; or moments of latents, float `[B, 2 C', h, w]`, as sets of
                latents hold them.

        Returns:
            fp32 `[B, C', h, w]`, of images on the device of the autoencoder.

        Raises:
            UserError: images that the autoencoder does not take.
        """
        stored = images.is_floating_point()
        moments = images.float() if stored else self.autoencoder.moments(images)
        means = moments.chunk(2, dim=1)[0]
        return (means - self.shift) * self.scale

    def from_images(self, images: Tensor) -> Tensor:
        """Do what `encode` does with `images` `[B, C, H, W]` in [-1, 1], rounded to 8 bits.

        Raises:
            UserError: as `encode`.
        """
        return self.encode(to_levels(images).permute(0, 3, 1, 2))

    def from_mask(self, mask: Tensor) -> Tensor:
        """Return where latents are known: where all pixels are that they stand for.

        Args:
            mask: bool `[B, 1 or C, H, W]`.

        Returns:
            bool `[B, 1, h, w]`.
        """
        unknown = (~mask).any(dim=1, keepdim=True).float()
        return max_pool2d(unknown, self.autoencoder.factor) == 0

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return `(C, H, W)` of the images that latents of a shape `(C', h, w)` decode to."""
        factor = self.autoencoder.factor
        return self.autoencoder.image_channels, shape[1] * factor, shape[2] * factor

    def decode(self, samples: Tensor) -> np.ndarray:
        """Decode, and round to the nearest of 0 … 255, as many at a time as memory holds.

        Args:
            samples: float `[B, C', h, w]`.

        Returns:
            uint8 `[B, H, W, C]`.
        """
        parts = samples.split(_AT_ONCE)
        return np.concatenate([self._levels(part).cpu().numpy() for part in parts])

    def levels(self, samples: Tensor) -> Tensor:
        """Return what `decode` does, uint8 `[B, H, W, C]`, on the device of the autoencoder."""
        return torch.cat([self._levels(part) for part in samples.split(_AT_ONCE)])

    def _levels(self, samples: Tensor) -> Tensor:
        images = self.autoencoder.decode(samples.detach().float() / self.scale + self.shift)
        levels = images.round().clamp(0, 255).byte()
        return levels.permute(0, 2, 3, 1).contiguous()
