"""Pack a source of images into a set of shards.

A set is finished when its manifest is written, which happens last.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddpm_engine.atomic_io import sha256_of
from ddpm_engine.data.packing.embeddings import (
    CaptionEmbeddings,
    CaptionEncoder,
    ImageEmbedder,
)
from ddpm_engine.data.packing.index import Scan, class_names
from ddpm_engine.data.packing.journal import MARKER_NAME, Journal, explain_os_error, packing_run
from ddpm_engine.data.packing.latents import LatentEncoder, LatentMoments
from ddpm_engine.data.packing.process_map import check_count, map_forked
from ddpm_engine.data.packing.shard_writer import ShardWriter
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.data.packing.sources.source import DamagedImage, Source
from ddpm_engine.data.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    parse_shard,
)
from ddpm_engine.data.shards.records import records_of
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import EXTENSIONS, MAX_SIDE
from ddpm_engine.images.damaged import unreadable
from ddpm_engine.memory import check_fits
from ddpm_engine.networks.autoencoder.folders import open_autoencoder
from ddpm_engine.networks.text.folders import open_text_encoder
from ddpm_engine.sizes import Size, height_and_width
from ddpm_engine.threads import usable_cores

logger = logging.getLogger(__name__)

_PIECE = 4096  # images that a process looks through at a time
_LATENTS_PER_SHARD = 1000  # so that small sets, too, keep several processes busy


def write_shards(
    source: Source,
    out: str | os.PathLike[str],
    size: Size | None = None,
    channels: int | None = None,
    per_shard: int = 10_000,
    image_format: str = "png",
    processes: int = 1,
    progress: Callable[[int], object] = lambda _: None,
    text_encoder: CaptionEncoder | None = None,
    image_embedder: ImageEmbedder | None = None,
    autoencoder: LatentEncoder | None = None,
    flips: bool = False,
) -> Manifest:
    """Pack a source into shards, indexes and a manifest.

    The same source and arguments give the same bytes, whatever the number of processes. A sample's
    key is its number, followed by the source's key where that says more. Every file appears
    complete or not at all. An interrupted run is simply run again: shards that it finished are kept
    if their hashes are right and the source is still of the same revision.

    Args:
        source: what to pack.
        out: folder to make; it may exist if it is empty or holds an unfinished run.
        size: cut and resize to it (see `fit`); None requires equal sizes.
        channels: convert to 1 (grey) or 3 (RGB); None requires that all images agree, or converts
            to those that an autoencoder takes.
        per_shard: images in each shard but the last.
        image_format: png, webp and npy are lossless; jpg is smaller.
        processes: number of forked processes; 1 works in this one.
        progress: called with the number of images of every finished shard.
        text_encoder: of captions, whose embeddings are packed too, in half precision and without
            padding; None: captions alone.
        image_embedder: of images as they are packed, whose embeddings are packed too.
        autoencoder: the moments of whose latents are packed in place of the images, in half
            precision. On a device other than the CPU it encodes in this process.
        flips: pack the moments of the mirrored image, too.

    Raises:
        UserError: an argument out of range, an empty source, a size that the autoencoder does not
            take, images or captions that cannot be
            read, which the message names, images that differ, labels or captions that are missing
            for some images, a folder in use, a full disk.
    """
    for side in () if size is None else size if isinstance(size, tuple) else (size,):
        check_count(side, "size", MAX_SIDE)
    if channels not in (None, 1, 3):
        raise UserError(f"`channels` is {channels}; it must be 1 or 3", field="channels")
    check_count(per_shard, "per_shard")
    check_count(processes, "processes")
    if autoencoder is None and flips:
        raise UserError(
            "`flips` is given without an autoencoder: images are mirrored as they are read",
            field="flips",
        )
    if autoencoder is not None:
        channels = channels or autoencoder.image_channels
        if autoencoder.device.type != "cpu" and processes > 1:
            raise UserError(
                f"`processes` is {processes}, but one process encodes on a GPU; choose 1",
                field="processes",
            )
    if image_format not in EXTENSIONS:
        raise UserError(f"no image format {image_format!r}: choose {', '.join(EXTENSIONS)}")
    if not len(source.examples):
        raise UserError(f"source {source.name} holds no images")
    try:
        return _write(
            ShardWriter(
                source,
                Path(out),
                size,
                channels,
                per_shard,
                image_format,
                None if text_encoder is None else CaptionEmbeddings(text_encoder),
                image_embedder,
                None if autoencoder is None else LatentMoments(autoencoder, flips),
            ),
            processes,
            progress,
        )
    except DamagedImage as damaged:
        raise _all_damaged(source, damaged, processes) from damaged


def _write(packing: ShardWriter, processes: int, progress: Callable[[int], object]) -> Manifest:
    source, folder = packing.source, packing.folder
    check_fits(
        packing.first.image.nbytes * max(1, min(processes, len(packing))),
        "size" if processes <= 1 else "processes",
        "choose a smaller one" if processes <= 1 else "choose fewer, or a smaller `size`",
    )
    with packing_run(folder, packing.recipe(), _files_of) as journal:
        scans = _pack_all(packing, journal, processes, progress)
        height, width, depth = packing.first.image.shape
        manifest = Manifest(
            shards=tuple(scan.shard for scan in scans),
            height=height,
            width=width,
            channels=depth,
            classes=class_names(scans, source.classes, source.name),
            captions=bool(packing.first.captions),
            text=packing.describe_text(max(scan.longest for scan in scans)),
            embeddings=packing.describe_embeddings(),
            latents=packing.describe_latents(),
        )
        with explain_os_error(folder / MANIFEST_NAME):
            manifest.write(folder)
    return manifest


def prepare_shards(
    directory: str | os.PathLike[str],
    source: str,
    size: Size | None = None,
    text_encoder: str | None = None,
    autoencoder: str | None = None,
    flips: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    """Pack a source, named as `open_source` takes it, unless the folder holds a finished set.

    An existing set is left as it is, whatever it was made from. For one process at a time.

    Args:
        directory: of the set.
        source: with captions, if there is a text encoder.
        size: as `write_shards` takes it; with an autoencoder, that of the latents.
        text_encoder: place of one, as `open_text_encoder` takes it, whose embeddings are packed.
        autoencoder: place of one, as `open_autoencoder` takes it, whose latents are packed in place
            of images.
        flips: pack the latents of mirrored images, too.
        device: on which the autoencoder computes.

    Raises:
        UserError: as `open_source`, `open_text_encoder`, `open_autoencoder` and `write_shards`.
    """
    if (records_of(Path(directory)) / MANIFEST_NAME).exists():
        return
    encoder = None if text_encoder is None else open_text_encoder(text_encoder)
    opened = open_source(source, directory, captions=encoder is not None)
    if autoencoder is None:
        write_shards(opened, directory, size, text_encoder=encoder)
        return
    codec = open_autoencoder(autoencoder, device)
    if size is not None:
        height, width = (side * codec.factor for side in height_and_width(size))
        size = (height, width)
    # Encoding takes much longer than all else; on a GPU, one process does it.
    processes = usable_cores() if codec.device.type == "cpu" else 1
    write_shards(
        opened, directory, size, per_shard=_LATENTS_PER_SHARD, processes=processes,
        text_encoder=encoder, autoencoder=codec, flips=flips,
    )  # fmt: skip


def _all_damaged(source: Source, found: DamagedImage, processes: int) -> UserError:
    """Look for all images that cannot be read, so that they can be repaired at once."""
    count = len(source.examples)
    pieces = [range(k, min(k + _PIECE, count)) for k in range(0, count, _PIECE)]
    if len(pieces) > 1:
        logger.warning("%s; looking for others among %d images", found, count)
    reasons: dict[int, tuple[str, str]] = {}
    for damaged in map_forked(partial(_damaged_among, source), pieces, processes):
        reasons |= damaged
    named = {name: reason for _, (name, reason) in sorted(reasons.items())}
    return unreadable(named or {found.name: found.reason})


def _damaged_among(source: Source, numbers: range) -> dict[int, tuple[str, str]]:
    damaged = {}
    for number in numbers:
        try:
            source.examples[number]
        except DamagedImage as error:
            damaged[number] = error.name, error.reason
    return damaged


def _pack_all(
    packing: ShardWriter, journal: Journal, processes: int, progress: Callable[[int], object]
) -> list[Scan]:
    """Return the scans of all shards in order: kept if the journal has them and they are sound."""
    recorded = dict(filter(None, map(_recorded, journal.finished)))
    scans: dict[int, Scan] = {}
    make = partial(_keep_or_make, packing, recorded)
    with closing(map_forked(make, range(len(packing)), processes)) as made:
        for number, scan in made:
            scans[number] = scan
            if recorded.get(number) != scan:
                with explain_os_error(packing.folder / MARKER_NAME):
                    journal.record(_entry(number, scan))
            progress(scan.shard.samples)
    return [scans[number] for number in range(len(packing))]


def _keep_or_make(packing: ShardWriter, recorded: dict[int, Scan], number: int) -> tuple[int, Scan]:
    scan = recorded.get(number)
    if scan is not None and _is_intact(packing.folder, scan.shard):
        return number, scan
    return number, replace(packing.make(number), shapes=frozenset(), without={}, imageless=None)


def _is_intact(folder: Path, shard: Shard) -> bool:
    try:
        return (
            sha256_of(folder / shard.name) == shard.sha256
            and sha256_of(folder / shard.index_name) == shard.index_sha256
        )
    except OSError:
        return False


def _entry(number: int, scan: Scan) -> dict[str, Any]:
    return {
        "number": number,
        "shard": dataclasses.asdict(scan.shard),
        "highest_label": scan.highest_label,
        "unlabelled": scan.unlabelled,
        "longest": scan.longest,
    }


def _recorded(entry: dict[str, Any]) -> tuple[int, Scan] | None:
    """Invert `_entry`; None for an entry that is damaged, whose shard is packed again."""
    try:
        shard = parse_shard(entry["shard"])
        number, highest, unlabelled = (entry[k] for k in ("number", "highest_label", "unlabelled"))
        longest = entry.get("longest", 0)  # entries of earlier versions have no embeddings
    except (KeyError, TypeError, ValueError):
        return None
    counts = number, highest, longest
    sound = all(type(count) is int for count in counts) and isinstance(unlabelled, str | None)
    return (number, Scan(shard, highest, unlabelled, longest=longest)) if sound else None


def _files_of(entry: dict[str, Any]) -> set[str]:
    recorded = _recorded(entry)
    return set() if recorded is None else {recorded[1].shard.name, recorded[1].shard.index_name}
