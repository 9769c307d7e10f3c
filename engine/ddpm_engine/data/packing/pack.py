"""Making sets of shards: packing a source, and indexing shards made elsewhere.

A set is finished when its manifest is written, which happens last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import webdataset
from webdataset import TarWriter

from ddpm_engine.atomic_io import atomic_write, sha256_of
from ddpm_engine.data.packing.journal import MARKER_NAME, Journal, claim, naming
from ddpm_engine.data.packing.process_map import map_forked
from ddpm_engine.data.packing.sources import Example, Source, open_source
from ddpm_engine.data.shards.manifest import (
    MANIFEST_NAME,
    MAX_KEY,
    Index,
    Manifest,
    Shard,
    index_dtype,
)
from ddpm_engine.data.tar import MAX_CLASSES, scan_tar
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import EXTENSIONS, DecodeError, encode, fit, probe, with_channels

_CHUNK = 4096


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
    key is its number, followed by what the source calls it where that says more. Every file appears
    complete or not at all. A run that was interrupted is simply run again: shards that it finished
    are kept if their hashes are right and the source is still of the same revision.

    Args:
        source: what to pack.
        out: folder to make; it may exist if it is empty or holds an unfinished run.
        size: cut and resize to so many pixels a side (see `fit`); None requires equal sizes.
        channels: convert to 1 (grey) or 3 (RGB); None requires that all images agree.
        per_shard: images of each shard but the last.
        image_format: png, webp and npy are lossless; jpg is smaller.
        processes: forked for the work; 1 does it in this one.
        progress: called with the number of images of every shard that is finished.

    Raises:
        UserError: an argument out of range, an empty source, images that differ, labels that are
            missing for some images, a folder in use, a full disk.
    """
    if size is not None and size < 1:
        raise UserError(f"image size must be at least 1, not {size}")
    if channels not in (None, 1, 3):
        raise UserError(f"images have 1 or 3 channels, not {channels}")
    if per_shard < 1:
        raise UserError(f"a shard holds at least 1 image, not {per_shard}")
    if image_format not in EXTENSIONS:
        raise UserError(f"no image format {image_format!r}: choose {', '.join(EXTENSIONS)}")
    if not len(source.examples):
        raise UserError(f"source {source.name} holds no images")
    folder = Path(out)
    packing = _Packing(source, folder, size, channels, per_shard, image_format)
    with claim(folder, packing.recipe(), _files_of) as journal:
        scans = _pack_all(packing, journal, processes, progress)
        height, width, depth = packing.first.image.shape
        manifest = Manifest(
            shards=tuple(scan.shard for scan in scans),
            height=height,
            width=width,
            channels=depth,
            classes=_class_names(scans, source.classes, source.name),
        )
        with naming(folder / MANIFEST_NAME):
            manifest.write(folder)
    return manifest


def index_shards(
    directory: str | os.PathLike[str],
    processes: int = 1,
    progress: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Index WebDataset shards made elsewhere: one scan of every `*.tar` in a folder.

    A sample is an image with one of the known extensions (the first of `EXTENSIONS` where there are
    several) and a label if there is a `cls` (an integer) or a `json` with an integer `label`, `cls`
    or `class`. Captions (`txt`) and all other members are left alone, and never decoded.

    Args:
        directory: where the shards are.
        processes: forked for the work; 1 does it in this one.
        progress: called with the number of images of every shard that is finished.

    Raises:
        UserError: no shards, a finished set, a damaged tar (named with the offset), a sample
            without an image, unreadable labels or labels for only some samples, a folder that
            cannot be written.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(f"no folder of shards at {folder}")
    if (folder / MANIFEST_NAME).exists():
        raise UserError(
            f"{folder} is indexed already; to index it again, delete {folder / MANIFEST_NAME}"
        )
    if (folder / MARKER_NAME).exists():
        raise UserError(f"{folder} is an unfinished set: run make_shards.py on its source again")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder} holds no .tar files to index")
    scans = []
    for scan in map_forked(_index, paths, processes):
        scans.append(scan)
        progress(scan.shard.samples)
    scans.sort(key=lambda scan: scan.shard.name)
    if not any(scan.shard.samples for scan in scans):
        raise UserError(f"the shards in {folder} hold no samples")
    shapes = frozenset[tuple[int, int, int]]().union(*(scan.shapes for scan in scans))
    height, width, depth = (
        sides.pop() if len(sides := {shape[axis] for shape in shapes}) == 1 else None
        for axis in range(3)
    )
    manifest = Manifest(
        shards=tuple(scan.shard for scan in scans),
        height=height,
        width=width,
        channels=depth,
        classes=_class_names(scans, None, str(folder)),
    )
    with naming(folder / MANIFEST_NAME):
        manifest.write(folder)
    return manifest


def prepare_shards(directory: str | os.PathLike[str], source: str, size: int | None = None) -> None:
    """Pack a source, named as `open_source` takes it, unless the folder holds a finished set.

    A set that is there is left as it is, whatever it was made from. For one process at a time.

    Raises:
        UserError: as `open_source` and `write_shards`.
    """
    if not (Path(directory) / MANIFEST_NAME).exists():
        write_shards(open_source(source), directory, size)


# Packing


@dataclass(frozen=True)
class _Scan:
    """What one scan of a shard finds."""

    shard: Shard
    highest_label: int
    """-1: no labels."""
    unlabelled: str | None
    """Key of the first sample without a label."""
    shapes: frozenset[tuple[int, int, int]] = frozenset()
    """Heights, widths and channels that occur; not recorded of shards that were packed here."""


class _Packing:
    """Everything that decides about the bytes of a set."""

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
        """Shards of the set."""
        return -(-len(self.source.examples) // self._per_shard)

    def recipe(self) -> str | None:
        """Hash of everything here; None where the source does not know its revision."""
        if self.source.revision is None:
            return None
        everything = (
            self.source.name, self.source.revision, len(self.source.examples), self._size,
            self._channels, self._per_shard, self._format,
            np.__version__, PIL.__version__, webdataset.__version__,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def make(self, number: int) -> _Scan:
        """Write one shard and its index."""
        path = self.folder / f"shard-{number:06d}.tar"
        end = min((number + 1) * self._per_shard, len(self.source.examples))
        with naming(path):
            self._write_tar(path, range(number * self._per_shard, end))
            return _index(path)

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
        """All examples have the first one's shape and labelling."""
        first, source = self.first, self.source
        (height, width, depth), (h, w, d) = first.image.shape, example.image.shape
        if (h, w) != (height, width):
            raise UserError(
                f"images of {source.name} differ in size: {first.key!r} is {height}×{width}, "
                f"{example.key!r} is {h}×{w}; give --size to cut and resize all of them"
            )
        if d != depth:
            raise UserError(
                f"images of {source.name} differ in channels: {first.key!r} has {depth}, "
                f"{example.key!r} has {d}; give --channels 1 (grey) or --channels 3 (RGB)"
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


def _pack_all(
    packing: _Packing, journal: Journal, processes: int, progress: Callable[[int], object]
) -> list[_Scan]:
    """Every shard of the set, in order: those in the journal if they are sound, else made."""
    recorded = {entry["number"]: _recorded(entry) for entry in journal.finished}
    scans: dict[int, _Scan] = {}
    make = partial(_keep_or_make, packing, recorded)
    with closing(map_forked(make, range(len(packing)), processes)) as made:
        for number, scan in made:
            scans[number] = scan
            if recorded.get(number) != scan:
                with naming(packing.folder / MARKER_NAME):
                    journal.record(_entry(number, scan))
            progress(scan.shard.samples)
    return [scans[number] for number in range(len(packing))]


def _keep_or_make(packing: _Packing, recorded: dict[int, _Scan], number: int) -> tuple[int, _Scan]:
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


def _entry(number: int, scan: _Scan) -> dict[str, Any]:
    return {
        "number": number,
        "shard": dataclasses.asdict(scan.shard),
        "highest_label": scan.highest_label,
        "unlabelled": scan.unlabelled,
    }


def _recorded(entry: dict[str, Any]) -> _Scan:
    return _Scan(Shard(**entry["shard"]), entry["highest_label"], entry["unlabelled"])


def _files_of(entry: dict[str, Any]) -> set[str]:
    shard = Shard(**entry["shard"])
    return {shard.name, shard.index_name}


def _member_key(number: int, name: str) -> str:
    """A key that is unique, sorts in order, and has no dot, at which WebDataset would split it."""
    key = f"{number:08d}"
    return key if name == key else f"{key}-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[-60:]}"


# Indexing


def _index(path: Path) -> _Scan:
    """Scan a shard, write its index beside it, and describe both."""
    with naming(path):
        index, shapes = _rows(path)
        shard = Shard(path.name, len(index), path.stat().st_size, sha256_of(path), index_sha256="")
        index_path = path.with_name(shard.index_name)
        with atomic_write(index_path) as index_file:
            np.save(index_file, index, allow_pickle=False)
        shard = replace(shard, index_sha256=sha256_of(index_path))
    without = np.flatnonzero(index["label"] < 0)
    return _Scan(
        shard,
        int(index["label"].max(initial=-1)),
        index["key"][without[0]].decode("utf-8", "replace") if len(without) else None,
        shapes,
    )


def _rows(path: Path) -> tuple[Index, frozenset[tuple[int, int, int]]]:
    """Index of a shard, and the shapes of its images."""
    chunks: list[Index] = []
    rows: list[tuple[bytes, int, int, int, bytes, int]] = []
    shapes: set[tuple[int, int, int]] = set()

    def pack_rows() -> None:
        # Python's objects take ten times the room of the rows.
        widest = max((len(row[0]) for row in rows), default=0)
        chunks.append(np.array(rows, dtype=index_dtype(widest)))
        rows.clear()

    with open(path, "rb") as file:
        for sample in scan_tar(path):
            if sample.damage:
                raise UserError(f"sample {sample.key!r} of {path}: {sample.damage}")
            file.seek(sample.image.offset_data)
            payload = file.read(sample.image.size)
            # Undecodable images stay in the index, where reading replaces and reports them.
            with suppress(DecodeError):
                shapes.add(probe(payload, sample.extension))
            key = sample.key.encode("utf-8", "surrogateescape")[-MAX_KEY:]
            place = sample.image.offset_data, sample.image.size, zlib.crc32(payload)
            rows.append((key, *place, sample.extension.encode("ascii"), sample.label))
            if len(rows) == _CHUNK:
                pack_rows()
    pack_rows()
    dtype = index_dtype(max(chunk.dtype["key"].itemsize for chunk in chunks))
    return np.concatenate([chunk.astype(dtype) for chunk in chunks]), frozenset(shapes)


def _class_names(
    scans: Sequence[_Scan], known: tuple[str, ...] | None, source: str
) -> tuple[str, ...] | None:
    """Names of the classes; numbers where the source has no names; None without labels."""
    highest = max(scan.highest_label for scan in scans)
    if highest < 0:
        return None
    key = next((scan.unlabelled for scan in scans if scan.unlabelled is not None), None)
    if key is not None:
        raise UserError(
            f"of {source}, sample {key!r} has no label while others do: label all or none"
        )
    return known or tuple(str(label) for label in range(highest + 1))
