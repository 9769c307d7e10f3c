"""The latents of a run: the autoencoder of its shards, which decodes previews and is recorded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from ddpm_engine.checkpoints.lazy_codec import LazyCodec
from ddpm_engine.config import RunConfig
from ddpm_engine.data.open import TrainingData
from ddpm_engine.data.shards.manifest import LatentSpace
from ddpm_engine.data_rules import problems_of_latents
from ddpm_engine.distributed import is_main
from ddpm_engine.errors import UserError
from ddpm_engine.locations import redacted, user_path
from ddpm_engine.networks.files.places import PACKAGE

_SHOWN = 12
"""Digits of a fingerprint in a message."""


@dataclass(frozen=True, eq=False)
class RunLatents:
    """What a run diffuses in place of images."""

    space: LatentSpace
    """As the shards describe it."""
    place: str
    """Folder or package of the autoencoder."""
    codec: LazyCodec
    """Decodes samples, on the device of this rank."""

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint says of it, as JSON values; its folder is absolute."""
        place = self.place
        if not place.startswith(PACKAGE):
            place = os.path.abspath(user_path(place))
        space = self.space
        return {
            "place": place,
            "fingerprint": space.fingerprint,
            "scale": space.scale,
            "shift": space.shift,
        }

    def settled(self, config: RunConfig) -> RunConfig:
        """Say of a run that estimates of x_0 are not clipped: latents have no bounds."""
        return replace(config, sampling=replace(config.sampling, clip_x0=False))


def open_latents(
    config: RunConfig, dataset: TrainingData, device: torch.device | str
) -> RunLatents | None:
    """Find the autoencoder of a run's latents, and open it on the first rank if it is to decode.

    Args:
        config: the run.
        dataset: its data.
        device: where samples are decoded.

    Returns:
        None: the run diffuses no latents.

    Raises:
        UserError: the configuration suits images alone, or previews are wanted and the autoencoder
            cannot be opened, or is another than the shards' are of.
    """
    data, space = config.data, dataset.latents
    if space is None or data.diffuse == "embeddings":
        return None
    for problem in problems_of_latents(config):
        raise problem
    place = data.autoencoder or space.place
    codec = LazyCodec(
        place,
        channels=space.channels,
        fingerprint=space.fingerprint,
        scale=space.scale,
        shift=space.shift,
        device=device,
    )
    if config.log.sample_every and is_main():
        try:
            codec.open()
        except UserError as error:
            raise UserError(
                f"previews cannot be decoded: {error}. Name the autoencoder of "
                f"{redacted(str(data.path))} by `data.autoencoder`, or let `log.sample_every` be 0",
                "data.autoencoder",
            ) from error
    return RunLatents(space, place, codec)


def check_same_latents(recorded: Any, latents: RunLatents | None, checkpoint: str) -> None:
    """Refuse to go on from a checkpoint with other latents than it was trained on.

    Args:
        recorded: what the checkpoint says, as `RunLatents.record` gives it; None: it was trained on
            images.
        latents: the run's.
        checkpoint: where it is, for the message.

    Raises:
        UserError: they are others, or images.
    """
    before = recorded if isinstance(recorded, dict) else None
    now = None if latents is None else latents.record()
    names = ("fingerprint", "scale", "shift")
    then_and_now = [
        None if record is None else tuple(record.get(name) for name in names)
        for record in (before, now)
    ]
    if then_and_now[0] != then_and_now[1]:
        raise UserError(
            f"{checkpoint} was trained on {_described(before)}, and the data of this start are "
            f"{_described(now)}; give it the same data, or choose another `out`",
            "data.path",
        )


def check_teachers_latents(autoencoder: str | None, latents: RunLatents | None) -> None:
    """Refuse to distil a teacher of other latents than a run's data are.

    Args:
        autoencoder: as the teacher says.
        latents: the run's.

    Raises:
        UserError: they are others, or images.
    """
    ours = None if latents is None else latents.space.fingerprint
    if autoencoder == ours or (autoencoder == "" and ours is not None):
        return
    teachers, data = (
        "images" if one is None else f"latents of the autoencoder {one[:_SHOWN]}…"
        for one in (autoencoder, ours)
    )
    raise UserError(
        f"`distillation.teacher` samples {teachers}, and the data are {data}; give students the "
        "data of their teacher",
        "distillation.teacher",
    )


def _described(record: dict[str, Any] | None) -> str:
    if record is None:
        return "images"
    scale, shift = record.get("scale"), record.get("shift")
    return (
        f"latents of {record.get('place')} (fingerprint {str(record.get('fingerprint'))[:_SHOWN]}…,"
        f" scale {scale}, shift {shift})"
    )
