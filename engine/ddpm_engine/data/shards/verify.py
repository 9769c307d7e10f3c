"""Read every byte of a set and name what is damaged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from ddpm_engine.atomic_io import sha256_of
from ddpm_engine.data.remote.storage import Folder
from ddpm_engine.data.shards.index import Index, index_dtype
from ddpm_engine.data.shards.manifest import Shard
from ddpm_engine.data.shards.reader import BadSample, DamagedSample, ShardReader
from ddpm_engine.data.shards.shard_set import ShardSet, read_manifest
from ddpm_engine.data.tar import scan_tar
from ddpm_engine.errors import UserError


def verify(
    directory: str | os.PathLike[str],
    progress: Callable[[Iterable[Shard]], Iterable[Shard]] = iter,
) -> list[BadSample]:
    """Check a finished set against its manifest and indexes, and decode every member of a sample.

    Args:
        directory: the set's folder.
        progress: wraps the iterable of shards, such as `tqdm.tqdm`.

    Returns:
        Everything damaged, empty for a sound set: missing or altered shards and indexes, and each
        sample whose checksum, image, label, captions, embeddings or moments are wrong.

    Raises:
        UserError: no finished set there, or its manifest is damaged.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    faults: list[BadSample] = []
    shards = ShardSet(Folder(folder), manifest)
    reader = ShardReader(shards)
    reads: list[Callable[[int, int], object]] = [
        reader.image if manifest.latents is None else reader.moments
    ]
    reads += [reader.captions] if manifest.captions else []
    reads += [] if manifest.text is None else [partial(_read_text, reader)]
    reads += [] if manifest.embeddings is None else [reader.embedding]
    for number, shard in enumerate(progress(manifest.shards)):
        try:
            index = shards.indexes[number]
        except UserError as error:
            faults.append(BadSample(shard.name, None, str(error)))
            index = np.empty(0, index_dtype(1))
        faults += _check_shard(folder / shard.name, shard, index)
        for row in range(len(index)) if (folder / shard.name).exists() else ():
            for read in reads:
                try:
                    read(number, row)
                except (DamagedSample, ValueError) as damage:
                    faults.append(reader.describe(number, row, str(damage)))
    reader.close()
    return faults


def _read_text(reader: ShardReader, shard: int, row: int) -> None:
    """Read the embeddings of all captions of a sample."""
    list(reader.text(shard, row))


def _check_shard(path: Path, shard: Shard, index: Index) -> list[BadSample]:
    """Check the file as a whole and, where it was altered, its structure and labels."""
    try:
        size, digest = path.stat().st_size, sha256_of(path)
    except OSError as error:
        return [BadSample(shard.name, None, f"cannot be read ({error.strerror})")]
    if digest == shard.sha256:
        return []
    faults = [BadSample(shard.name, None, "the file's SHA-256 differs from the manifest")]
    if size != shard.bytes:
        faults.append(BadSample(shard.name, None, f"{size} bytes, the manifest says {shard.bytes}"))
    labels = {_first_place(row): int(row["label"]) for row in index}
    try:
        for sample in scan_tar(path):
            if sample.damage:
                faults.append(BadSample(shard.name, sample.key, sample.damage))
            elif labels.get(sample.offset, sample.label) != sample.label:
                faults.append(BadSample(shard.name, sample.key, "label differs from the index"))
    except UserError as error:
        faults.append(BadSample(shard.name, None, str(error)))
    return faults


def _first_place(row: np.void) -> int:
    """Return where the image of a sample begins; the moments of its latents where it has none."""
    if row["offset"] or "moments" not in (row.dtype.names or ()):
        return int(row["offset"])
    return int(row["moments"]["offset"])
