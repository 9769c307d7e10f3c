"""What lies beside the shards: an index of each, and the manifest of the whole set.

    <shard>.tar         a standard WebDataset shard
    <shard>.index.npy   one row a sample (`index_dtype`): place of its image, checksum, label
    manifest.json       written last: a folder without one is not a finished set

The fingerprint is a hash of the shards' hashes in order. It names the data in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.errors import UserError
from ddpm_engine.files import atomic_write, sha256_of

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

Index = NDArray[np.void]


def index_dtype(key_bytes: int) -> np.dtype[np.void]:
    """Row of an index whose longest key has so many bytes. A label of -1 means none."""
    return np.dtype(
        [
            ("key", f"S{max(1, key_bytes)}"),
            ("offset", "<u8"),
            ("size", "<u4"),
            ("crc32", "<u4"),
            ("extension", "S4"),
            ("label", "<i4"),
        ]
    )


@dataclass(frozen=True)
class Shard:
    """One shard as it was when it was indexed."""

    name: str
    """File name inside the set's folder."""
    samples: int
    """Images in it."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Hash of the file."""
    index_sha256: str
    """Hash of its index."""

    @property
    def index_name(self) -> str:
        """File name of the shard's index."""
        return str(Path(self.name).with_suffix(".index.npy"))


@dataclass(frozen=True)
class Manifest:
    """A set of shards."""

    shards: tuple[Shard, ...]
    """In the order in which samples are counted."""
    height: int | None
    """Rows of every image; None where images differ."""
    width: int | None
    """Columns of every image; None where images differ."""
    channels: int | None
    """1 (grey) or 3 (RGB); None where images differ."""
    classes: tuple[str, ...] | None
    """Names of the labels 0, 1, ...; None for a set without labels."""

    @property
    def samples(self) -> int:
        """Images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of all shard hashes in order: 64 hexadecimal digits."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into the set's folder, atomically.

        Raises:
            OSError: it cannot be written.
        """
        summary = {
            "format": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
        }
        with atomic_write(directory / MANIFEST_NAME) as file:
            text = json.dumps(summary | dataclasses.asdict(self), indent=1, ensure_ascii=False)
            file.write(text.encode() + b"\n")


@dataclass(frozen=True)
class ShardSet:
    """A set of shards on disk: its folder, manifest and indexes, checked against each other."""

    directory: Path
    """Where the shards are."""
    manifest: Manifest
    """What the folder holds."""
    indexes: tuple[Index, ...]
    """Of each shard, rows of `index_dtype`."""

    @property
    def highest_label(self) -> int | None:
        """The greatest label that occurs; None for a set without labels."""
        highest = max((int(index["label"].max(initial=-1)) for index in self.indexes), default=-1)
        return None if highest < 0 else highest


def open_shards(directory: str | os.PathLike[str]) -> ShardSet:
    """Open a finished set: read its manifest and indexes, and compare them with the files.

    Sizes of shards are checked, their content is not: `verify` reads every byte.

    Raises:
        UserError: no finished set there, or a file that is missing, of another size, or altered;
            the message names the file and the remedy.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(
                f"shard {path} of {folder / MANIFEST_NAME} cannot be read ({error.strerror}); "
                "restore it, or pack the set again"
            ) from error
        if size != shard.bytes:
            raise UserError(
                f"shard {path} has {size} bytes, its manifest says {shard.bytes}: restore it, or "
                f"delete {MANIFEST_NAME} and run 'make_shards.py index {folder}' if it was replaced"
            )
    indexes = tuple(read_index(folder, shard) for shard in manifest.shards)
    shards = ShardSet(folder, manifest, indexes)
    highest = shards.highest_label
    if highest is not None and highest >= len(manifest.classes or ()):
        raise _damaged(folder / MANIFEST_NAME, f"it names no class {highest}")
    return shards


def read_manifest(folder: Path) -> Manifest:
    """Read a set's manifest without looking at its shards.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"no folder of shards at {folder}; make one with 'make_shards.py SOURCE'")
    if not path.exists():
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}: index shards made elsewhere with "
            f"'make_shards.py index {folder}', or pack an unfinished set again"
        )
    try:
        content = json.loads(path.read_bytes())
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version!r}; this engine reads {FORMAT_VERSION}")
    try:
        manifest = _parse_manifest(content)
        agreed = content["fingerprint"], content["samples"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if agreed != (manifest.fingerprint, manifest.samples):
        raise _damaged(path, "its totals do not match its list of shards")
    return manifest


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged ({reason}); delete it and run 'make_shards.py index {path.parent}'"
    )


def _parse_manifest(content: dict[str, Any]) -> Manifest:
    shards = tuple(Shard(**shard) for shard in content["shards"])
    for shard in shards:
        # The manifest came with the data: it must not point outside the folder.
        if Path(shard.name).name != shard.name:
            raise ValueError(f"shard name {shard.name!r} is not a file name")
        if not (isinstance(shard.samples, int) and isinstance(shard.bytes, int)):
            raise ValueError(f"shard {shard.name} has no counts")
    classes = content["classes"]
    for name in ("height", "width", "channels"):
        if not isinstance(content[name], int | None):
            raise ValueError(f"{name} is {content[name]!r}")
    return Manifest(
        shards=shards,
        height=content["height"],
        width=content["width"],
        channels=content["channels"],
        classes=None if classes is None else tuple(classes),
    )


def read_index(folder: Path, shard: Shard) -> Index:
    """Read one shard's index: rows of `index_dtype`.

    Raises:
        UserError: it is missing, or not what the manifest describes.
    """
    path = folder / shard.index_name
    remedy = f"delete {MANIFEST_NAME} and run 'make_shards.py index {folder}'"
    try:
        if sha256_of(path) != shard.index_sha256:
            raise UserError(f"index {path} is not the one its manifest describes; {remedy}")
        index = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"index {path} cannot be read ({error.strerror}); {remedy}") from error
    # The hash is right, but it came with the data: the rows are checked too.
    names = getattr(index, "dtype", np.dtype(np.uint8)).names or ()
    if "key" not in names or index.dtype != index_dtype(index.dtype["key"].itemsize):
        raise UserError(f"index {path} has other rows than this engine's; {remedy}")
    if index.shape != (shard.samples,):
        raise UserError(f"index {path} has {len(index)} rows for {shard.samples} samples; {remedy}")
    # Subtracted, not added: the sum of two unsigned numbers could wrap.
    if np.any(index["offset"] > shard.bytes) or np.any(
        index["size"] > shard.bytes - index["offset"]
    ):
        raise UserError(f"index {path} points outside its shard; {remedy}")
    return index
