"""The autoencoder whose latents a model samples, opened when samples are first decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.images.latent_codec import LatentCodec
from ddpm_engine.json_files import described
from ddpm_engine.networks.autoencoder.folders import open_autoencoder

_SHOWN = 12
"""Digits of a fingerprint in a message."""


class LazyCodec:
    """The latents of a trained model: their autoencoder is opened, and compared, at its first use.

    It is a `Codec`. On a GPU it decodes in half precision where that is safe.

    Args:
        place: as `open_autoencoder` takes it.
        fingerprint: of the autoencoder that the model was trained with; None: it is not known.
        scale: of the latents; None: the autoencoder's own.
        shift: of the latents; None: the autoencoder's own.
        channels: of the network's samples.
        device: where it computes.
        recorded: whether `place` is what the training recorded, rather than what someone gave.
    """

    clip_range: tuple[float, float] | None = None
    """Latents have no bounds."""

    def __init__(
        self,
        place: str,
        *,
        channels: int,
        fingerprint: str | None = None,
        scale: float | None = None,
        shift: float | None = None,
        device: torch.device | str = "cpu",
        recorded: bool = False,
    ) -> None:
        self.place = place
        self.fingerprint = fingerprint
        self._scale, self._shift = scale, shift
        self._channels, self._device, self._recorded = channels, device, recorded
        self._opened: LatentCodec | None = None

    def open(self) -> LatentCodec:
        """Open the autoencoder, or return the codec with the one that is open.

        Raises:
            UserError: it cannot be opened, or is another than the one of the training.
        """
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def encode(self, images: Tensor) -> Tensor:
        """Encode uint8 images `[B, C, H, W]`; see `LatentCodec`.

        Raises:
            UserError: as `open`, and as `LatentCodec`.
        """
        return self.open().encode(images)

    def from_images(self, images: Tensor) -> Tensor:
        """Encode images `[B, C, H, W]` in [-1, 1]; see `LatentCodec`.

        Raises:
            UserError: as `encode`.
        """
        return self.open().from_images(images)

    def from_mask(self, mask: Tensor) -> Tensor:
        """Return where latents are known, by a mask `[B, 1 or C, H, W]`; see `LatentCodec`.

        Raises:
            UserError: as `open`.
        """
        return self.open().from_mask(mask)

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return `(C, H, W)` of the images that latents of a shape decode to.

        Raises:
            UserError: as `open`.
        """
        return self.open().image_shape(shape)

    def decode(self, samples: Tensor) -> np.ndarray:
        """Decode samples `[B, C, h, w]` to uint8 images `[B, H, W, C]`.

        Raises:
            UserError: as `open`.
        """
        return self.open().decode(samples)

    def levels(self, samples: Tensor) -> Tensor:
        """Do what `decode` does with samples `[B, C, h, w]`, and leave the images on the device.

        Raises:
            UserError: as `open`.
        """
        return self.open().levels(samples)

    def _open(self) -> LatentCodec:
        half = torch.device(self._device).type == "cuda"
        try:
            autoencoder = open_autoencoder(self.place, self._device, half=half)
        except UserError as error:
            if not self._recorded:
                raise UserError(str(error), "autoencoder") from error
            raise UserError(
                f"the model's autoencoder cannot be opened: {error}. If it has moved, give its "
                "place as `autoencoder`",
                "autoencoder",
            ) from error
        if self.fingerprint not in (None, autoencoder.fingerprint):
            assert self.fingerprint is not None
            raise UserError(
                f"the autoencoder {self.place} has the fingerprint "
                f"{autoencoder.fingerprint[:_SHOWN]}…, and the model was trained with another, of "
                f"fingerprint {self.fingerprint[:_SHOWN]}…; give that one's place as `autoencoder`",
                "autoencoder",
            )
        if self._channels != autoencoder.channels:
            raise UserError(
                f"the autoencoder {self.place} has latents of {autoencoder.channels} channels, and "
                f"the network samples {self._channels}; give the one that it was trained with as "
                "`autoencoder`",
                "autoencoder",
            )
        return LatentCodec(autoencoder, self._scale, self._shift)


def recorded_codec(
    record: Any, channels: int, device: torch.device | str, place: str | None = None
) -> LazyCodec:
    """Return the codec whose autoencoder a checkpoint's state records.

    Args:
        record: `place`, `fingerprint`, `scale` and `shift`.
        channels: of the network's samples.
        device: where it computes.
        place: where the autoencoder is now; None: where it was in training.

    Raises:
        UserError: the record is damaged.
    """
    if not _is_record(record):
        raise UserError(
            f"the checkpoint records {described(record)} as its autoencoder, without the place, "
            "the fingerprint, the scale and the shift that belong there; load an older checkpoint"
        )
    return LazyCodec(
        record["place"] if place is None else place,
        fingerprint=record["fingerprint"],
        scale=record["scale"],
        shift=record["shift"],
        channels=channels,
        device=device,
        recorded=place is None,
    )


def _is_record(record: Any) -> bool:
    if not isinstance(record, Mapping):
        return False
    texts = all(isinstance(record.get(name), str) for name in ("place", "fingerprint"))
    return texts and all(
        isinstance(number, int | float) and math.isfinite(number) and number != unusable
        for number, unusable in ((record.get("scale"), 0), (record.get("shift"), None))
    )
