"""The data of a run: made if asked for, opened, and checked against the network."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from ddpm_engine.config import RunConfig
from ddpm_engine.data.config import DataConfig, is_location
from ddpm_engine.data.dataset import Batch, ShardDataset, collate
from ddpm_engine.data.mixture import MixedDataset
from ddpm_engine.data.packing.pack import prepare_shards
from ddpm_engine.data.remote.cache import ShardCache, default_cache_directory
from ddpm_engine.data.shards.manifest import ShardSet, open_shards
from ddpm_engine.data.stream import ShardStream, is_stream
from ddpm_engine.distributed import raise_together
from ddpm_engine.errors import UserError

logger = logging.getLogger(__name__)

RunDataset = ShardDataset | MixedDataset | ShardStream


def open_dataset(config: RunConfig, accelerator: Accelerator) -> RunDataset:
    """Open a run's data, which the main process makes first if it is missing.

    Raises:
        UserError: no shards there, or images or labels that do not fit the network.
    """
    data = config.data
    with raise_together(UserError):
        if data.source is not None and accelerator.is_main_process:
            if isinstance(data.path, str):
                raise UserError(
                    f"--data.source {data.source} cannot be packed into {data.path}: give a folder"
                )
            prepare_shards(data.path, data.source, config.model.sample_size)
    return dataset_of(config, check=accelerator.is_main_process)


def dataset_of(config: RunConfig, check: bool = True) -> RunDataset:
    """A run's data, as its configuration describes it.

    Args:
        config: the run.
        check: as `open_shards` takes it.

    Raises:
        UserError: as `open_dataset`.
    """
    data, model = config.data, config.model
    locations: list[str | Path] = [data.path, *data.mix_with]
    if is_stream(str(data.path)):
        return _stream(config)
    for location in locations:
        if is_stream(str(location)):
            raise UserError(f"{location} is streamed, which cannot be mixed with other sets")
    cache = _cache(data, locations)
    sets = [open_shards(location, cache, check) for location in locations]
    for shards in sets:
        _check_images(config, shards)
        if model.num_class_embeds is not None:
            _check_labels(shards, model.num_class_embeds)
            _check_classes(sets[0], shards)
    datasets = [
        ShardDataset(
            shards,
            config.training.seed,
            size=model.sample_size,
            channels=model.in_channels,
            window_shards=data.window_shards,
        )
        for shards in sets
    ]
    return datasets[0] if len(datasets) == 1 else MixedDataset(datasets, data.weights)


def samples_at(dataset: RunDataset, positions: Sequence[int]) -> Batch:
    """The samples at some positions; of a stream, which has none, as many that come first."""
    if isinstance(dataset, ShardStream):
        return collate(list(itertools.islice(dataset, len(positions))))
    return collate(dataset.__getitems__(positions))


def _cache(data: DataConfig, locations: list[str | Path]) -> ShardCache | None:
    """Made only for a run that reads from elsewhere."""
    if not any(is_location(str(location)) for location in locations):
        return None
    return ShardCache(data.cache or default_cache_directory(), int(data.cache_gb * 1e9))


def _stream(config: RunConfig) -> ShardStream:
    data, model = config.data, config.model
    if data.mix_with:
        raise UserError(f"{data.path} is streamed, which cannot be mixed with other sets")
    classes = model.num_class_embeds
    stream = ShardStream(
        str(data.path),
        model.sample_size,
        model.in_channels,
        None if classes is None else classes - 1,
        data.allow_pipe,
    )
    logger.warning(
        "streaming %d shards of %s, drawn with replacement: there are no epochs; a resumed run "
        "sees other samples than one that was never stopped; images are cut and resized to %d "
        "pixels; damage that an image format does not notice is not noticed. Shards with an index "
        "(make_shards.py index) promise all of that",
        len(stream.urls), stream.pattern, model.sample_size,
    )  # fmt: skip
    return stream


def _check_images(config: RunConfig, shards: ShardSet) -> None:
    """Refuse to resize without a word: images of one size must have the network's."""
    stored, model = shards.manifest, config.model
    size, channels = model.sample_size, model.in_channels
    change, repack = [], []
    if any(side not in (None, size) for side in (stored.height, stored.width)):
        repack.append(f"--size {size}")
        if stored.height == stored.width:
            change.append(f"--model.sample-size {stored.height}")
    if stored.channels not in (None, channels):
        repack.append(f"--channels {channels}")
        outputs = model.out_channels // channels * (stored.channels or channels)
        change += [f"--model.in-channels {stored.channels}", f"--model.out-channels {outputs}"]
    if repack:
        fitting = f"give {' '.join(change)}, or make" if change else "make"
        raise UserError(
            f"images in {shards.storage} are {stored.height}×{stored.width} with "
            f"{stored.channels} channels, but the network's are {size}×{size} with {channels}; "
            f"{fitting} the shards anew with launch/make_shards.py {' '.join(repack)}"
        )


def _check_classes(first: ShardSet, other: ShardSet) -> None:
    """A class is the same in all sets of a mix: one list of names begins with the other."""
    ours, theirs = first.manifest.classes or (), other.manifest.classes or ()
    for number, (one, two) in enumerate(zip(ours, theirs, strict=False)):
        if one != two:
            raise UserError(
                f"class {number} is {one!r} in {first.storage} and {two!r} in {other.storage}; "
                "sets that are mixed for a class-conditional model must agree: pack them anew with "
                "the same class folders"
            )


def _check_labels(shards: ShardSet, embeddings: int) -> None:
    path, highest_label = shards.storage, shards.highest_label
    if highest_label is None:
        raise UserError(
            f"--model.num-class-embeds is {embeddings} but samples in {path} have no labels; make "
            "shards with labels, or leave it unset for an unconditional model"
        )
    if highest_label + 2 > embeddings:
        raise UserError(
            f"--model.num-class-embeds is {embeddings} but labels in {path} go up to "
            f"{highest_label}; it must be at least {highest_label + 2}, one more than the classes, "
            "for the null class"
        )
