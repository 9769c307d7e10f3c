"""Index WebDataset shards, made here or elsewhere.

A set is finished when its manifest is written, which happens last.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ddpm_engine.atomic_io import atomic_write, sha256_of
from ddpm_engine.data.packing.journal import MARKER_NAME, explain_os_error
from ddpm_engine.data.packing.process_map import map_forked
from ddpm_engine.data.shards.index import MAX_KEY, Index, index_dtype
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


def index_shards(
    directory: str | os.PathLike[str],
    processes: int = 1,
    progress: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Index WebDataset shards made elsewhere: one scan of every `*.tar` in a folder.

    A sample is an image with one of the known extensions (the first of `EXTENSIONS` where there are
    several) and a label if there is a `cls` (an integer) or a `json` with an integer `label`, `cls`
    or `class`. Captions (`txt`) and all other members are skipped, and never decoded.

    Args:
        directory: where the shards are.
        processes: number of forked processes; 1 works in this one.
        progress: called with the number of images of every finished shard.

    Raises:
        UserError: no shards, a finished set, a damaged tar (named with the offset), a sample
            without an image, unreadable labels or labels for only some samples, a folder that
            cannot be written.
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
        index, shapes = _rows(path)
        shard = Shard(path.name, len(index), path.stat().st_size, sha256_of(path), index_sha256="")
    index_path = (place or path.parent) / shard.index_name
    with explain_os_error(index_path):
        with atomic_write(index_path) as index_file:
            np.save(index_file, index, allow_pickle=False)
        shard = replace(shard, index_sha256=sha256_of(index_path))
    without = np.flatnonzero(index["label"] < 0)
    return Scan(
        shard,
        int(index["label"].max(initial=-1)),
        index["key"][without[0]].decode("utf-8", "replace") if len(without) else None,
        shapes,
    )


def _rows(path: Path) -> tuple[Index, frozenset[tuple[int, int, int]]]:
    """Return the index of a shard, and the shapes of its images."""
    chunks: list[Index] = []
    rows: list[tuple[bytes, int, int, int, bytes, int]] = []
    shapes: set[tuple[int, int, int]] = set()

    def pack_rows() -> None:
        # As Python objects, rows take ten times the memory.
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
