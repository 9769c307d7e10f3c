"""Latents that are computed once, when a source is packed."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_engine.data.shards.manifest import LatentSpace
from ddpm_engine.errors import UserError


class LatentEncoder(Protocol):
    """What packing needs of an autoencoder, such as an `Autoencoder`."""

    place: str
    fingerprint: str
    channels: int
    factor: int
    image_channels: int
    scale: float
    shift: float

    @property
    def device(self) -> torch.device:
        """As `Autoencoder`."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """As `Autoencoder.latent_shape`."""
        ...

    def moments(self, images: Tensor) -> Tensor:
        """As `Autoencoder.moments`."""
        ...


class LatentMoments:
    """Moments of the latents of images, in half precision.

    Args:
        autoencoder: that encodes.
        flips: encode mirrored images, too. The latent of a mirrored image is not the mirrored
            latent.
    """

    def __init__(self, autoencoder: LatentEncoder, flips: bool) -> None:
        self.autoencoder = autoencoder
        self.flips = flips

    def of(self, images: NDArray[np.uint8]) -> NDArray[np.float16]:
        """Encode images.

        Args:
            images: `[N, H, W, C]`.

        Returns:
            `[N, 1 or 2, 2 C', h, w]`, means before log-variances, before scaling; the second are
            those of the mirrored image.

        Raises:
            UserError: images that the autoencoder does not take, or moments that are not finite in
                half precision.
        """
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        views = [pixels, pixels.flip(3)] if self.flips else [pixels]
        moments = torch.stack([self._half(view) for view in views], dim=1)
        if not bool(moments.isfinite().all()):
            raise UserError(
                f"latents of the autoencoder {self.autoencoder.place} exceed the range of half "
                "precision; choose another autoencoder",
                field="autoencoder",
            )
        result: NDArray[np.float16] = moments.numpy()
        return result

    def _half(self, images: Tensor) -> Tensor:
        return self.autoencoder.moments(images).to("cpu", torch.float16)

    def describe(self, height: int, width: int) -> LatentSpace:
        """Describe latents of images of a size."""
        encoder = self.autoencoder
        return LatentSpace(
            encoder.place, encoder.fingerprint, encoder.channels, encoder.factor,
            encoder.scale, encoder.shift, height, width, encoder.image_channels, self.flips,
        )  # fmt: skip
