"""Open the training data: made if asked for, checked against the network."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ddpm_engine.data.classes import check_same_classes
from ddpm_engine.data.conditions import (
    Needs,
    check_conditions,
    check_stream,
    longest_caption,
)
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.dataset import Batch, ShardDataset, collate
from ddpm_engine.data.latents import check_latents
from ddpm_engine.data.mixture import MixedDataset
from ddpm_engine.data.packing.pack import prepare_shards
from ddpm_engine.data.remote.cache import ShardCache, default_cache_directory
from ddpm_engine.data.shards.shard_set import ShardSet, open_shards
from ddpm_engine.data.stream import ShardStream, is_stream
from ddpm_engine.errors import UserError
from ddpm_engine.locations import is_location, redacted
from ddpm_engine.sizes import Size, as_text, height_and_width
from ddpm_engine.waiting import announced

logger = logging.getLogger(__name__)

TrainingData = ShardDataset | MixedDataset | ShardStream


def make_missing_shards(config: DataConfig, size: Size, device: torch.device | str = "cpu") -> None:
    """Pack `config.source` into `config.path` unless that is a finished set.

    For one process at a time. With a text encoder, captions are packed with their embeddings; with
    an autoencoder, latents in place of images, of mirrored images too if images are to be mirrored.

    Args:
        config: without a source, nothing is done.
        size: of the network's images, or of its latents.
        device: on which an autoencoder encodes.

    Raises:
        UserError: the source cannot be packed, or the path is a URL.
    """
    if config.source is None:
        return
    if isinstance(config.path, str):
        raise UserError(
            f"`data.source` {config.source} cannot be packed into {redacted(config.path)}: give a "
            "folder",
            field="data.source",
        )
    with announced(f"packing {config.source} into {config.path}"):
        prepare_shards(
            config.path, config.source, size, config.text_encoder, config.autoencoder,
            flips=config.autoencoder is not None and config.horizontal_flip, device=device,
        )  # fmt: skip


def open_dataset(
    config: DataConfig,
    size: Size,
    channels: int,
    classes: int | None,
    seed: int,
    check: bool = True,
    text: int | None = None,
    vector: int | None = None,
) -> TrainingData:
    """Open a set of shards, a mixture of sets, or a stream.

    Args:
        config: where the data is, and how it is read.
        size: of the network's images, or of its latents.
        channels: of the network's images, 1 (grey) or 3 (RGB); or of the latents or embeddings that
            are diffused.
        classes: number of classes of the network; None: unconditional.
        seed: of the order of samples.
        check: as in `open_shards`; and that text encoder and autoencoder are those of the shards.
        text: width of the embeddings of tokens that the network attends to; None: it takes no text.
        vector: width of the vector that the network is conditioned on; None: it takes none.

    Returns:
        Samples with what the network needs: captions, with embeddings unless they are encoded in
        training, and embeddings of images.

    Raises:
        UserError: no shards there, or images, latents, labels, captions or embeddings that do not
            fit the network, or another text encoder or autoencoder than the shards'.
    """
    locations: list[str | Path] = [config.path, *config.mix_with]
    for location in locations:
        if config.mix_with and is_stream(str(location)):
            raise UserError(
                f"{redacted(str(location))} is streamed, which cannot be mixed with other sets"
            )
    needs = Needs.of(config, channels, text, vector)
    if is_stream(str(config.path)):
        check_stream(needs, str(config.path), config.autoencoder)
        return _open_stream(config, size, channels, classes, needs.captions)
    cache = _open_cache(config, locations)
    sets = [open_shards(location, cache, check) for location in locations]
    check_conditions(needs, sets, check)
    latent = config.diffuse == "images" and check_latents(config, sets, size, channels, check)
    pixels = config.diffuse == "images" and not latent
    for shards in sets:
        if pixels:
            _check_images(shards, size, channels)
        if classes is not None:
            _check_labels(shards, classes)
            check_same_classes(
                sets[0].manifest.classes, str(sets[0].storage),
                shards.manifest.classes, str(shards.storage),
            )  # fmt: skip
    datasets = [
        ShardDataset(
            shards,
            seed,
            size=size if pixels else None,
            channels=channels if pixels else None,
            window_shards=config.window_shards,
            captions=needs.captions,
            embeddings=needs.embeddings is not None,
            text_length=config.text_length or longest_caption(sets),
            flips=latent and config.horizontal_flip,
        )
        for shards in sets
    ]
    return datasets[0] if len(datasets) == 1 else MixedDataset(datasets, config.weights)


def samples_at(dataset: TrainingData, positions: Sequence[int]) -> Batch:
    """Read the samples at some positions; of a stream, which has none, the same number of samples.

    Raises:
        UserError: data that cannot be read.
    """
    if isinstance(dataset, ShardStream):
        return collate(list(itertools.islice(dataset, len(positions))))
    return collate(dataset.__getitems__(positions))


def _open_cache(config: DataConfig, locations: list[str | Path]) -> ShardCache | None:
    """Open the cache if any location is a URL."""
    if not any(is_location(str(location)) for location in locations):
        return None
    return ShardCache(config.cache or default_cache_directory(), int(config.cache_gb * 1e9))


def _open_stream(
    config: DataConfig, size: Size, channels: int, classes: int | None, captions: bool
) -> ShardStream:
    stream = ShardStream(str(config.path), size, channels, classes, config.allow_pipe, captions)
    logger.warning(
        "streaming %d shards of %s with replacement: there are no epochs; a resumed run reads "
        "other samples than one that was never stopped; images are cut and resized to %s pixels; "
        "damage that an image format does not notice is not noticed. Indexed shards have none of "
        "these limitations",
        len(stream.urls), stream.pattern, as_text(size),
    )  # fmt: skip
    return stream


def _check_images(shards: ShardSet, size: Size, channels: int) -> None:
    """Refuse to resize silently: where stored images have one size, it must be the network's."""
    stored = shards.manifest
    height, width = height_and_width(size)
    change, repack = [], []
    if stored.height not in (None, height) or stored.width not in (None, width):
        repack.append(f"size {height}" if height == width else f"size {height} {width}")
        if stored.height == stored.width:
            change.append(f"`model.sample_size` {stored.height}")
        elif None not in (stored.height, stored.width):
            change.append(f"`model.sample_size` {stored.height} {stored.width}")
    if stored.channels not in (None, channels):
        repack.append(f"{channels} channels")
        change.append(f"`model.in_channels` {stored.channels} and `model.out_channels` to match")
    if repack:
        alternative = f"give {', '.join(change)}, or " if change else ""
        raise UserError(
            f"images in {shards.storage} are {stored.height}×{stored.width} with "
            f"{stored.channels} channels, but the network's are {as_text(size)} with {channels}; "
            f"{alternative}pack the shards again with {', '.join(repack)}"
        )


def _check_labels(shards: ShardSet, classes: int) -> None:
    path, highest = shards.storage, shards.highest_label
    if highest is None:
        raise UserError(
            f"`model.num_class_embeds` is {classes + 1} but samples in {path} have no labels; pack "
            "shards with labels, or leave it unset for an unconditional model",
            field="model.num_class_embeds",
        )
    if highest >= classes:
        raise UserError(
            f"`model.num_class_embeds` is {classes + 1} but labels in {path} go up to {highest}; "
            f"it must be at least {highest + 2}, one more than the classes, for the null class",
            field="model.num_class_embeds",
        )
