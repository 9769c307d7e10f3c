"""What stands between stored data and what is diffused."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from ddpm_engine.images.grid import to_levels, to_uint8


class Codec(Protocol):
    """Maps stored images to the space of the diffusion process, and back.

    The two-way map of pixels is `PixelCodec`; `LatentCodec` is that of an autoencoder's latents.
    """

    clip_range: tuple[float, float] | None
    """Bounds of encoded values, to which estimates of x_0 may be clipped; None: unbounded."""

    def encode(self, images: Tensor) -> Tensor:
        """Map images as they are stored, uint8 `[B, C, H, W]`, to clean samples x_0, fp32."""

    def from_images(self, images: Tensor) -> Tensor:
        """Map images, float `[B, C, H, W]` in [-1, 1], to clean samples x_0, fp32."""

    def from_mask(self, mask: Tensor) -> Tensor:
        """Map where images are known, bool `[B, 1 or C, H, W]`, to where samples are."""

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return `(C, H, W)` of the images that samples of a shape decode to."""

    def decode(self, samples: Tensor) -> np.ndarray:
        """Map samples as the network generates them to uint8 images `[B, H, W, C]`."""

    def levels(self, samples: Tensor) -> Tensor:
        """Do what `decode` does, and leave the images on the device."""


class PixelCodec:
    """Diffuses the pixels themselves: 0 … 255 ↔ [-1, 1]."""

    clip_range: tuple[float, float] | None = (-1.0, 1.0)
    """As `Codec`."""

    def encode(self, images: Tensor) -> Tensor:
        """Return x / 127.5 - 1, fp32 `[B, C, H, W]`, of uint8 `images` of the same shape.

        Training kernels take uint8 and compute it themselves.
        """
        return images.float() / 127.5 - 1

    def from_images(self, images: Tensor) -> Tensor:
        """Return `images`, `[B, C, H, W]` in [-1, 1], themselves."""
        return images

    def from_mask(self, mask: Tensor) -> Tensor:
        """Return the `mask`, `[B, 1 or C, H, W]`, itself."""
        return mask

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the `shape` itself."""
        return shape

    def decode(self, samples: Tensor) -> np.ndarray:
        """Return (x + 1) · 127.5, rounded to the nearest and clipped to 0 … 255.

        Args:
            samples: float `[B, C, H, W]`.

        Returns:
            uint8 `[B, H, W, C]`.
        """
        return to_uint8(samples)

    def levels(self, samples: Tensor) -> Tensor:
        """Return what `decode` does, uint8 `[B, H, W, C]`, on the device of the `samples`."""
        return to_levels(samples)
