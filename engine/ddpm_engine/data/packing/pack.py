"""Pack a source of images into a set of shards.

A set is finished when its manifest is written, which happens last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import webdataset
from webdataset import TarWriter

from ddpm_engine.atomic_io import atomic_write, sha256_of
from ddpm_engine.data.packing.index import Scan, class_names, index_shard
from ddpm_engine.data.packing.journal import MARKER_NAME, Journal, explain_os_error, packing_run
from ddpm_engine.data.packing.process_map import check_count, map_forked
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.data.packing.sources.source import DamagedImage, Example, Source
from ddpm_engine.data.shards.manifest import MANIFEST_NAME, Manifest, Shard, parse_shard
from ddpm_engine.data.shards.records import records_of
from ddpm_engine.data.tar import MAX_CLASSES
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import EXTENSIONS, MAX_SIDE, encode, fit, with_channels
from ddpm_engine.images.damaged import unreadable
from ddpm_engine.memory import check_fits

logger = logging.getLogger(__name__)

_PIECE = 4096  # images that a process looks through at a time


def write_shards(
    source: Source,
    out: str | os.PathLike[str],
    size: int | None = None,
    channels: int | None = None,
    per_shard: int = 10_000,
    image_format: str = "png",
    processes: int = 1,
    progress: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Pack a source into shards, indexes and a manifest.

    The same source and arguments give the same bytes, whatever the number of processes. A sample's
    key is its number, followed by the source's key where that says more. Every file appears
    complete or not at all. An interrupted run is simply run again: shards that it finished are kept
    if their hashes are right and the source is still of the same revision.

    Args:
        source: what to pack.
        out: folder to make; it may exist if it is empty or holds an unfinished run.
        size: cut and resize to this side in pixels (see `fit`); None requires equal sizes.
        channels: convert to 1 (grey) or 3 (RGB); None requires that all images agree.
        per_shard: images in each shard but the last.
        image_format: png, webp and npy are lossless; jpg is smaller.
        processes: number of forked processes; 1 works in this one.
        progress: called with the number of images of every finished shard.

    Raises:
        UserError: an argument out of range, an empty source, images that cannot be read, which the
            message names, images that differ, labels that are missing for some images, a folder in
            use, a full disk.
    """
    if size is not None:
        check_count(size, "size", MAX_SIDE)
    if channels not in (None, 1, 3):
        raise UserError(f"`channels` is {channels}; it must be 1 or 3", field="channels")
    check_count(per_shard, "per_shard")
    check_count(processes, "processes")
    if image_format not in EXTENSIONS:
        raise UserError(f"no image format {image_format!r}: choose {', '.join(EXTENSIONS)}")
    if not len(source.examples):
        raise UserError(f"source {source.name} holds no images")
    try:
        return _write(
            _Packing(source, Path(out), size, channels, per_shard, image_format),
            processes,
            progress,
        )
    except DamagedImage as damaged:
        raise _all_damaged(source, damaged, processes) from damaged


def _write(packing: _Packing, processes: int, progress: Callable[[int], object]) -> Manifest:
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
        )
        with explain_os_error(folder / MANIFEST_NAME):
            manifest.write(folder)
    return manifest


def prepare_shards(directory: str | os.PathLike[str], source: str, size: int | None = None) -> None:
    """Pack a source, named as `open_source` takes it, unless the folder holds a finished set.

    An existing set is left as it is, whatever it was made from. For one process at a time.

    Raises:
        UserError: as `open_source` and `write_shards`.
    """
    if not (records_of(Path(directory)) / MANIFEST_NAME).exists():
        write_shards(open_source(source, directory), directory, size)


class _Packing:
    """Everything that determines the bytes of a set."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        size: int | None,
        channels: int | None,
        per_shard: int,
        image_format: str,
    ) -> None:
        self.source = source
        self.folder = folder
        self._size = size
        self._channels = channels
        self._per_shard = per_shard
        self._format = image_format
        self.first = self._converted(0)
        self._check_alike(self.first)

    def __len__(self) -> int:
        """Return the number of shards."""
        return -(-len(self.source.examples) // self._per_shard)

    def recipe(self) -> str | None:
        """Return a hash of all of it; None where the source does not know its revision."""
        if self.source.revision is None:
            return None
        everything = (
            self.source.name, self.source.revision, len(self.source.examples), self._size,
            self._channels, self._per_shard, self._format,
            np.__version__, PIL.__version__, webdataset.__version__,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def make(self, number: int) -> Scan:
        """Write one shard and its index."""
        path = self.folder / f"shard-{number:06d}.tar"
        end = min((number + 1) * self._per_shard, len(self.source.examples))
        with explain_os_error(path):
            self._write_tar(path, range(number * self._per_shard, end))
            return index_shard(path)

    def _write_tar(self, path: Path, numbers: Iterable[int]) -> None:
        # No encoder: TarWriter's own would pickle some extensions. mtime 0: the same bytes always.
        with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number in numbers:
                example = self._converted(number)
                self._check_alike(example)
                members = {
                    "__key__": _member_key(number, example.key),
                    self._format: encode(example.image, self._format),
                }
                if example.label is not None:
                    members["cls"] = str(example.label).encode("ascii")
                tar.write(members)

    def _converted(self, number: int) -> Example:
        example = self.source.examples[number]
        image = example.image
        if self._channels is not None:
            image = with_channels(image, self._channels)
        return example._replace(image=image if self._size is None else fit(image, self._size))

    def _check_alike(self, example: Example) -> None:
        """Check that an example has the first one's shape, and a label if that has one."""
        first, source = self.first, self.source
        (height, width, depth), (h, w, d) = first.image.shape, example.image.shape
        if (h, w) != (height, width):
            raise UserError(
                f"images of {source.name} differ in size: {first.key!r} is {height}×{width}, "
                f"{example.key!r} is {h}×{w}; give `size` to cut and resize all of them"
            )
        if d != depth:
            raise UserError(
                f"images of {source.name} differ in channels: {first.key!r} has {depth}, "
                f"{example.key!r} has {d}; give `channels` 1 (grey) or 3 (RGB)"
            )
        if (example.label is None) != (first.label is None):
            raise UserError(
                f"of {source.name}, only one of {first.key!r} and {example.key!r} has a label: "
                "label all images or none"
            )
        limit = MAX_CLASSES if source.classes is None else len(source.classes)
        if example.label is not None and not 0 <= example.label < limit:
            raise UserError(
                f"label {example.label} of {example.key!r} in {source.name} is not within 0 to "
                f"{limit - 1}"
            )


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
    packing: _Packing, journal: Journal, processes: int, progress: Callable[[int], object]
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


def _keep_or_make(packing: _Packing, recorded: dict[int, Scan], number: int) -> tuple[int, Scan]:
    scan = recorded.get(number)
    if scan is not None and _is_intact(packing.folder, scan.shard):
        return number, scan
    return number, replace(packing.make(number), shapes=frozenset())


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
    }


def _recorded(entry: dict[str, Any]) -> tuple[int, Scan] | None:
    """Invert `_entry`; None for an entry that is damaged, whose shard is packed again."""
    try:
        shard = parse_shard(entry["shard"])
        number, highest, unlabelled = (entry[k] for k in ("number", "highest_label", "unlabelled"))
    except (KeyError, TypeError, ValueError):
        return None
    sound = type(number) is type(highest) is int and isinstance(unlabelled, str | None)
    return (number, Scan(shard, highest, unlabelled)) if sound else None


def _files_of(entry: dict[str, Any]) -> set[str]:
    recorded = _recorded(entry)
    return set() if recorded is None else {recorded[1].shard.name, recorded[1].shard.index_name}


def _member_key(number: int, name: str) -> str:
    """Return a key that is unique, sorts in order, and has no dot, where WebDataset would split."""
    key = f"{number:08d}"
    return key if name == key else f"{key}-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[-60:]}"
