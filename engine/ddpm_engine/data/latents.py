"""Whether sets of shards hold latents, and those that a network is made for."""

from __future__ import annotations

from collections.abc import Sequence

from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.shards.manifest import LatentSpace
from ddpm_engine.data.shards.shard_set import ShardSet
from ddpm_engine.errors import UserError
from ddpm_engine.networks.autoencoder.folders import autoencoder_fingerprint
from ddpm_engine.sizes import Size, as_text, height_and_width


def check_latents(
    config: DataConfig,
    sets: Sequence[ShardSet],
    size: Size,
    channels: int,
    check_autoencoder: bool = True,
) -> bool:
    """Check that sets of latents fit the network, and are of one autoencoder.

    Args:
        config: may name the autoencoder.
        sets: of shards.
        size: of the network's samples.
        channels: of the network's samples.
        check_autoencoder: compare the autoencoder that the configuration names with that of the
            sets. One process of a run suffices.

    Returns:
        Whether the sets hold latents; otherwise they hold images.

    Raises:
        UserError: they do not fit; or some sets hold latents and others images, or those of another
            autoencoder, or the configuration names another; or images are to be mirrored, and a set
            holds no latents of those.
    """
    first = sets[0].manifest.latents
    for shards in sets:
        latents = shards.manifest.latents
        if (first and first.fingerprint) != (latents and latents.fingerprint):
            raise UserError(
                f"{shards.storage} and {sets[0].storage} hold latents of different autoencoders, "
                "or one of them images: pack them alike to mix them",
                field="data.mix_with",
            )
        if latents is None:
            if config.autoencoder is not None:
                raise UserError(
                    f"`data.autoencoder` is {config.autoencoder}, but {shards.storage} holds "
                    "images: pack their source with the autoencoder into another folder, or leave "
                    "it out to diffuse pixels",
                    field="data.autoencoder",
                )
            continue
        _check_shape(shards, latents, size, channels)
        if config.horizontal_flip and not latents.flipped:
            raise UserError(
                f"`data.horizontal_flip` is set, but {shards.storage} holds no latents of mirrored "
                "images: pack the source again with flips, or leave it out",
                field="data.horizontal_flip",
            )
    if first is not None and check_autoencoder:
        _check_named(config.autoencoder, sets[0], first)
    return first is not None


def _check_shape(shards: ShardSet, latents: LatentSpace, size: Size, channels: int) -> None:
    stored, height, width = latents.shape
    if (height, width) == height_and_width(size) and stored == channels:
        return
    side = f"{height}" if height == width else f"{height} {width}"
    raise UserError(
        f"latents in {shards.storage}, by the autoencoder {latents.place}, are {height}×{width} "
        f"with {stored} channels, but the network's are {as_text(size)} with {channels}; set "
        f"`model.sample_size` {side} and `model.in_channels` {stored}, with `model.out_channels` "
        "to match, or pack the shards again",
    )


def _check_named(named: str | None, shards: ShardSet, latents: LatentSpace) -> None:
    if named is None:
        return
    fingerprint = autoencoder_fingerprint(named)
    if fingerprint != latents.fingerprint:
        raise UserError(
            f"`data.autoencoder` {named} is another than the one that {shards.storage} was packed "
            f"with, {latents.place} (fingerprints {fingerprint[:12]} and "
            f"{latents.fingerprint[:12]}): name that one, or pack the shards again",
            field="data.autoencoder",
        )
