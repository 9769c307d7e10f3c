"""Index WebDataset shards, made here or elsewhere.

A set is finished when its manifest is written, which happens last.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tarfile import TarInfo
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.atomic_io import atomic_write, sha256_of
from ddpm_engine.data.members import BOUNDS, MAX_TEXT, StoredText
from ddpm_engine.data.packing.journal import MARKER_NAME, explain_os_error
from ddpm_engine.data.packing.process_map import map_forked
from ddpm_engine.data.shards.index import BESIDE, MAX_KEY, Index, index_dtype
from ddpm_engine.data.shards.manifest import MANIFEST_NAME, Manifest, Shard, how_to_index_again
from ddpm_engine.data.shards.records import place_for_records, records_of
from ddpm_engine.data.tar import scan_tar
from ddpm_engine.errors import UserError
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.images.codec import DecodeError, probe
from ddpm_engine.locations import check_local

logger = logging.getLogger(__name__)

_CHUNK = 4096


@dataclass(frozen=True)
class Scan:
    """Findings of one scan of a shard."""

    shard: Shard
    highest_label: int
    """-1: there are no labels."""
    unlabelled: str | None
    """Key of the first sample without a label."""
    shapes: frozenset[tuple[int, int, int]] = frozenset()
    """Heights, widths and channels that occur; empty for shards that were packed here."""
    without: Mapping[str, str | None] = field(default_factory=dict)
    """For each member beside image and label that occurs, the key of the first sample that lacks
    it; None: all have it."""
    longest: int = 0
    """Number of tokens of the longest caption that the shard holds the embeddings of."""
    imageless: str | None = None
    """Key of the first sample that holds latents in place of an image."""


def index_shards(
    directory: str | os.PathLike[str],
    processes: int = 1,
    progress: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Index WebDataset shards made elsewhere: one scan of every `*.tar` in a folder.

    A sample is an image with one of the known extensions (the first of `EXTENSIONS` where there are
    several) and a label if there is a `cls` (an integer) or a `json` with an integer `label`, `cls`
    or `class`; and captions where every sample has a `txt`. All other members are skipped, and
    never decoded.

    Args:
        directory: where the shards are.
        processes: number of forked processes; 1 works in this one.
        progress: called with the number of images of every finished shard.

    Raises:
        UserError: no shards, a finished set, a damaged tar (named with the offset), a sample
            without an image or of latents, unreadable labels or labels for only some samples, a
            folder that cannot be written.
    """
    folder = Path(directory)
    if not folder.is_dir():
        check_local(folder)
        raise UserError(f"no folder of shards at {folder}")
    records = records_of(folder)
    if (records / MANIFEST_NAME).exists():
        raise UserError(
            f"{folder} is indexed already; to index it again, {how_to_index_again(str(records))}"
        )
    if (folder / MARKER_NAME).exists():
        raise UserError(f"{folder} is an unfinished set: pack its source again")
    paths = sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))
    if not paths:
        raise UserError(f"{folder} holds no .tar files to index")
    with explain_os_error(folder):
        place = place_for_records(folder)
    if place != folder:
        logger.warning(
            "%s cannot be written: its manifest and its indexes are kept in %s, where they are "
            "found as long as the folder stays where it is",
            folder, place,
        )  # fmt: skip
    scans = []
    for scan in map_forked(partial(index_shard, place=place), paths, processes):
        scans.append(scan)
        progress(scan.shard.samples)
    scans.sort(key=lambda scan: scan.shard.name)
    for scan in scans:
        if scan.imageless is not None:
            raise UserError(
                f"sample {scan.imageless!r} of {folder / scan.shard.name} is a latent, of an "
                f"autoencoder that only {MANIFEST_NAME} would name: restore it, or pack the source "
                "of the shards again"
            )
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
        classes=class_names(scans, None, str(folder)),
        captions=_all_have(scans, "captions", str(folder)),
    )
    with explain_os_error(place / MANIFEST_NAME):
        manifest.write(place)
    return manifest


def index_shard(path: Path, place: Path | None = None) -> Scan:
    """Scan a shard, write its index, and describe both.

    Args:
        path: of the shard.
        place: folder of the index; None: beside the shard.

    Raises:
        UserError: a damaged tar, or a sample without an image or with an unreadable label.
    """
    with explain_os_error(path):
        index, shapes, longest = _rows(path)
        shard = Shard(path.name, len(index), path.stat().st_size, sha256_of(path), index_sha256="")
    index_path = (place or path.parent) / shard.index_name
    with explain_os_error(index_path):
        with atomic_write(index_path) as index_file:
            np.save(index_file, index, allow_pickle=False)
        shard = replace(shard, index_sha256=sha256_of(index_path))
    return Scan(
        shard,
        int(index["label"].max(initial=-1)),
        _first_key(index, index["label"] < 0),
        shapes,
        {
            name: _first_key(index, index[name]["offset"] == 0)
            for name in BESIDE
            if name in (index.dtype.names or ())
        },
        longest,
        _first_key(index, index["offset"] == 0),
    )


def _first_key(index: Index, chosen: NDArray[np.bool_]) -> str | None:
    """Return the key of the first chosen row; None if none is."""
    rows = np.flatnonzero(chosen)
    return index["key"][rows[0]].decode("utf-8", "replace") if len(rows) else None


def _rows(path: Path) -> tuple[Index, frozenset[tuple[int, int, int]], int]:
    """Return the index of a shard, the shapes of its images, and the longest embedded caption."""
    chunks: list[Index] = []
    rows: list[tuple[Any, ...]] = []
    shapes: set[tuple[int, int, int]] = set()
    longest = 0

    def pack_rows() -> None:
        # As Python objects, rows take ten times the memory.
        widest = max((len(row[0]) for row in rows), default=0)
        whole = np.array(rows, dtype=index_dtype(widest, BESIDE))
        chunks.append(_without_empty(whole))
        rows.clear()

    with open(path, "rb") as file:
        for sample in scan_tar(path):
            if sample.damage:
                raise UserError(f"sample {sample.key!r} of {path}: {sample.damage}")
            place = 0, 0, 0
            if sample.image is not None:
                file.seek(sample.image.offset_data)
                payload = file.read(sample.image.size)
                # Undecodable images stay in the index, where reading replaces and reports them.
                with suppress(DecodeError):
                    shapes.add(probe(payload, sample.extension))
                place = sample.image.offset_data, sample.image.size, zlib.crc32(payload)
            key = sample.key.encode("utf-8", "surrogateescape")[-MAX_KEY:]
            beside = [_place(file, name, sample.beside.get(name)) for name in BESIDE]
            if "text" in sample.beside:
                longest = max(longest, _longest(file, sample.beside["text"]))
            rows.append((key, *place, sample.extension.encode("ascii"), sample.label, *beside))
            if len(rows) == _CHUNK:
                pack_rows()
    pack_rows()
    return _joined(chunks), frozenset(shapes), longest


_Place = tuple[int, int, int]


def _place(file: BinaryIO, name: str, member: TarInfo | None) -> _Place:
    """Return offset, size and checksum of a member; the offset 0 if there is none."""
    if member is None:
        return 0, 0, 0
    if member.size > BOUNDS[name]:
        # Reading refuses it by its size, and never gets to the checksum.
        return member.offset_data, min(member.size, 0xFFFFFFFF), 0
    file.seek(member.offset_data)
    return member.offset_data, member.size, zlib.crc32(file.read(member.size))


def _longest(file: BinaryIO, member: TarInfo) -> int:
    """Return the number of tokens of the longest caption; 0 if they cannot be read."""
    if member.size > MAX_TEXT:
        return 0
    file.seek(member.offset_data)
    with suppress(ValueError):
        return max(len(caption.tokens) for caption in StoredText(file.read(member.size)))
    return 0


def _without_empty(index: Index) -> Index:
    """Drop the columns of members that no sample has."""
    used = [name for name in BESIDE if np.any(index[name]["offset"])]
    return _copied(index, np.empty(len(index), index_dtype(index.dtype["key"].itemsize, used)))


def _joined(chunks: list[Index]) -> Index:
    """Join chunks, whose keys and columns may differ; drops them as it goes, to save memory."""
    widest = max(chunk.dtype["key"].itemsize for chunk in chunks)
    used = {name for chunk in chunks for name in chunk.dtype.names or ()}
    index = np.zeros(sum(map(len, chunks)), index_dtype(widest, tuple(used)))
    first = 0
    while chunks:
        chunk = chunks.pop(0)
        _copied(chunk, index[first : first + len(chunk)])
        first += len(chunk)
    return index


def _copied(index: Index, into: Index) -> Index:
    for name in into.dtype.names or ():
        if name in (index.dtype.names or ()):
            into[name] = index[name]
    return into


def _all_have(scans: Sequence[Scan], name: str, source: str) -> bool:
    """Whether all samples have a member; warns if only some have."""
    having = [scan for scan in scans if name in scan.without]
    if not having:
        return False
    lacking = [scan for scan in scans if scan.shard.samples and scan.without.get(name, "")]
    lacking += [scan for scan in scans if scan.shard.samples and name not in scan.without]
    if lacking:
        first = lacking[0]
        key = first.without.get(name)
        logger.warning(
            "%s is indexed without %s, which not all samples have: %s in %s has none",
            source, name, "every sample" if key is None else f"sample {key!r}", first.shard.name,
        )  # fmt: skip
    return not lacking


def class_names(
    scans: Sequence[Scan], known: tuple[str, ...] | None, source: str
) -> tuple[str, ...] | None:
    """Return the names of the classes; numbers where none are known; None without labels.

    Raises:
        UserError: some samples have a label and some have none.
    """
    highest = max(scan.highest_label for scan in scans)
    if highest < 0:
        return None
    key = next((scan.unlabelled for scan in scans if scan.unlabelled is not None), None)
    if key is not None:
        raise UserError(
            f"of {source}, sample {key!r} has no label while others do: label all or none"
        )
    return known or tuple(str(label) for label in range(highest + 1))
