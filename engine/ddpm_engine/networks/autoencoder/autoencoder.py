"""A frozen autoencoder: from images to moments of their latents, and from latents to images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.networks.autoencoder.tiling import tiled

LOGVAR_RANGE = (-30.0, 20.0)
"""Bounds of log-variances, as diffusers' `DiagonalGaussianDistribution` has them."""
_PIXELS = {"cpu": 1 << 18}
_PIXELS_ELSEWHERE = 1 << 20
"""Pixels that are encoded or decoded at a time, by the type of the device."""


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the order of elements in memory that convolutions are fastest in."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class Autoencoder:
    """An autoencoder of diffusers, frozen.

    Args:
        model: an `AutoencoderKL` or `AutoencoderTiny`, in eval mode, of which `encoder`, `decoder`
            and the convolutions between are used. Its encoder computes in float32, its decoder in
            the precision of its weights.
        place: where it was opened from.
        fingerprint: identifies configuration and weights, 64 hexadecimal digits.
        channels: of the latents.
        factor: pixels along a side for each latent.
        image_channels: of the images.
        scale: see the field.
        shift: see the field.
    """

    largest_side = 1024
    """Pixels along the side of an image, beyond which it is taken apart into tiles."""
    tile_side = 512
    """Pixels along the side of a tile; neighbours share a quarter."""

    def __init__(
        self,
        model: Any,
        place: str,
        fingerprint: str,
        *,
        channels: int,
        factor: int,
        image_channels: int = 3,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        self._model = model
        self.place = place
        """The folder or `package:NAME` that it was opened from."""
        self.fingerprint = fingerprint
        """Identifies configuration and weights."""
        self.channels = channels
        """C, of the latents."""
        self.factor = factor
        """Pixels along a side for each latent."""
        self.image_channels = image_channels
        """1 or 3, of the images."""
        self.scale = scale
        """What latents are multiplied by, behind the shift, so that their variance is about 1."""
        self.shift = shift
        """What is subtracted from latents, so that their mean is about 0."""

    @property
    def device(self) -> torch.device:
        """Where it computes, and its results are."""
        device: torch.device = next(self._model.parameters()).device
        return device

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return `(C, h, w)` of the latents of images.

        Args:
            height: of the images, in pixels.
            width: of the images, in pixels.

        Raises:
            UserError: a size that is not a multiple of `factor`.
        """
        if height % self.factor or width % self.factor or min(height, width) < 1:
            raise UserError(
                f"images are {height}×{width} pixels, and the autoencoder {self.place} makes one "
                f"latent of {self.factor}×{self.factor}; use sides that are multiples of "
                f"{self.factor}"
            )
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode images to the means and log-variances of their latents, before scaling.

        Latents of an `AutoencoderTiny` are certain: their log-variances are the least there are.

        Args:
            images: uint8 `[B, C, H, W]`.

        Returns:
            float32 `[B, 2 C', h, w]`, means first, on the autoencoder's device; log-variances are
            in [-30, 20].

        Raises:
            UserError: images with other channels, or whose sides are not multiples of `factor`.
        """
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}, not uint8 [B,C,H,W]"
            )
        if images.shape[1] != self.image_channels:
            raise UserError(
                f"images have {images.shape[1]} channels, and the autoencoder {self.place} takes "
                f"{self.image_channels}"
            )
        latent = self.latent_shape(*images.shape[2:])
        empty = torch.empty(0, 2 * latent[0], *latent[1:], device=self.device)
        return self._in_slices(self._moments, images, images.shape[2:], empty)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents, as they are before scaling, to images.

        Args:
            latents: float `[B, C, h, w]`.

        Returns:
            float32 `[B, C', H, W]`, around 0 … 255, neither rounded nor clipped, on the
            autoencoder's device.
        """
        height, width = (side * self.factor for side in latents.shape[2:])
        empty = torch.empty(0, self.image_channels, height, width, device=self.device)
        return self._in_slices(self._decode, latents, (height, width), empty)

    def _in_slices(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        size: torch.Size | tuple[int, int],
        empty: Tensor,
    ) -> Tensor:
        """Apply a function to as many images at a time as memory holds."""
        device = self.device
        # Sums of convolutions depend on the order of elements in memory.
        x = x.to(device).contiguous(memory_format=memory_format(device))
        limit = _PIXELS.get(device.type, _PIXELS_ELSEWHERE)
        count = max(1, limit // (size[0] * size[1]))
        results, done = [empty], 0
        with torch.autocast(device.type, enabled=False):
            while done < len(x):
                try:
                    results.append(function(x[done : done + count]))
                except torch.OutOfMemoryError:
                    if count == 1:
                        raise
                    count = (count + 1) // 2
                else:
                    done += count
        return results[1] if len(results) == 2 else torch.cat(results)

    def _moments(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        moments = self._by_tiles(self._encoded, x, x.shape[2:], self.factor, 1)
        if moments.shape[1] == self.channels:
            return torch.cat((moments, torch.full_like(moments, LOGVAR_RANGE[0])), dim=1)
        means, logvars = moments.chunk(2, dim=1)
        return torch.cat((means, logvars.clamp(*LOGVAR_RANGE)), dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        height, width = (side * self.factor for side in latents.shape[2:])
        x = latents.to(next(self._model.decoder.parameters()).dtype)
        return (self._by_tiles(self._decoded, x, (height, width), 1, self.factor) + 1) * 127.5

    def _by_tiles(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        size: torch.Size | tuple[int, int],
        read: int,
        written: int,
    ) -> Tensor:
        if max(size) <= self.largest_side:
            return function(x)
        tile = max(self.tile_side // self.factor, 2)
        return tiled(function, x, tile, max(tile // 4, 1), read, written)

    def _encoded(self, x: Tensor) -> Tensor:
        encoded = self._model.encoder(x)
        convolution = getattr(self._model, "quant_conv", None)
        result: Tensor = encoded if convolution is None else convolution(encoded)
        return result

    def _decoded(self, x: Tensor) -> Tensor:
        convolution = getattr(self._model, "post_quant_conv", None)
        result: Tensor = self._model.decoder(x if convolution is None else convolution(x))
        return result.float()
