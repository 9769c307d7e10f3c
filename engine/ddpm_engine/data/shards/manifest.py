"""What lies beside the shards: an index of each, and the manifest of the whole set.

    <shard>.tar         a standard WebDataset shard
    <shard>.index.npy   one row a sample (`index_dtype`): place of its image, checksum, label
    manifest.json       written last: a folder without one is not a finished set

The fingerprint is a hash of the shards' hashes in order. It names the data in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.data.remote.cache import ShardCache, default_cache_directory
from ddpm_engine.data.remote.fetch import is_http
from ddpm_engine.data.remote.storage import Folder, Remote, Storage
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import MAX_SIDE

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
DEFAULT_CACHE_BYTES = 64 << 30

MAX_KEY = 255
"""Bytes of a key in an index, where it only names the sample; longer ones lose their start."""
MAX_OPEN_INDEXES = 64
"""Indexes kept in memory by each process: as many as files are kept open."""
MAX_INDEX_HEADER = 1 << 12

_FILE_NAME = re.compile(r"[^/\\\0]+\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")

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

    @cached_property
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


class Indexes(Sequence[Index]):
    """The indexes of a set, read and checked when they are looked at; the last few are kept.

    Args:
        storage: where they are.
        manifest: what they must be.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage = storage
        self._manifest = manifest
        self._open: OrderedDict[int, Index] = OrderedDict()

    def __len__(self) -> int:
        return len(self._manifest.shards)

    @overload
    def __getitem__(self, number: int) -> Index: ...
    @overload
    def __getitem__(self, number: slice) -> list[Index]: ...
    def __getitem__(self, number: int | slice) -> Index | list[Index]:
        """Rows of `index_dtype` of one shard, or of some.

        Raises:
            UserError: an index cannot be read, or is not what the manifest describes.
        """
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) >= MAX_OPEN_INDEXES:
                self._open.popitem(last=False)
            self._open[number] = _read_index(self._storage, self._manifest, number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {"_storage": self._storage, "_manifest": self._manifest, "_open": OrderedDict()}


class ShardSet:
    """An open set of shards.

    Args:
        storage: where its files are.
        manifest: what it holds.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest
        self.indexes = Indexes(storage, manifest)

    @property
    def highest_label(self) -> int | None:
        """The greatest label that may occur; None for a set without labels."""
        return None if self.manifest.classes is None else len(self.manifest.classes) - 1


def open_shards(
    location: str | os.PathLike[str], cache: ShardCache | None = None, check: bool = True
) -> ShardSet:
    """Open a finished set.

    The manifest is read; indexes are read, and compared with it, when they are first used. The
    content of shards is compared with the indexes as it is read; `verify` reads every byte.

    Args:
        location: a folder, or an http(s) URL of one.
        cache: where files of a URL are kept; None: in `default_cache_directory`, up to 64 GiB.
        check: compare the sizes of a folder's files with the manifest. Of the processes of a run
            one is enough.

    Raises:
        UserError: no finished set there, or a file that is missing or of another size; the message
            names the file and the remedy.
    """
    if isinstance(location, str) and is_http(location):
        cache = cache or ShardCache(default_cache_directory(), DEFAULT_CACHE_BYTES)
        remote = Remote(location, cache)
        return ShardSet(remote, _manifest_of(remote))
    folder = Path(location)
    manifest = read_manifest(folder)
    for shard in manifest.shards if check else ():
        _check_files(folder, shard)
    return ShardSet(Folder(folder), manifest)


def _check_files(folder: Path, shard: Shard) -> None:
    path, index_path = folder / shard.name, folder / shard.index_name
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
    if not index_path.exists():
        raise UserError(
            f"index {index_path} cannot be read (it is missing); delete {MANIFEST_NAME} and run "
            f"'make_shards.py index {folder}'"
        )


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest without looking at its shards.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise UserError(
            f"no folder of shards at {folder}; make one with 'make_shards.py SOURCE --out {folder}'"
        )
    if not (folder / MANIFEST_NAME).exists():
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}: index shards made elsewhere with "
            f"'make_shards.py index {folder}', or pack an unfinished set again"
        )
    return _manifest_of(Folder(folder))


def _manifest_of(storage: Storage) -> Manifest:
    path = f"{storage}/{MANIFEST_NAME}"
    try:
        content = storage.manifest(MANIFEST_NAME)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_manifest(content, path)


def parse_manifest(content: bytes, path: str) -> Manifest:
    """Read a manifest's bytes, which may come from anyone.

    Raises:
        UserError: naming `path`: they are not a manifest of this engine.
    """
    try:
        values = json.loads(content)
        version = values["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version!r}; this engine reads {FORMAT_VERSION}")
    try:
        manifest = _parse(values)
        raise_together = values["fingerprint"], values["samples"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if raise_together != (manifest.fingerprint, manifest.samples):
        raise _damaged(path, "its totals do not match its list of shards")
    return manifest


def _damaged(path: str, reason: str) -> UserError:
    folder = path.removesuffix(MANIFEST_NAME).rstrip("/")
    return UserError(
        f"{path} is damaged ({reason}); delete it and run 'make_shards.py index {folder}'"
    )


def _parse(values: dict[str, Any]) -> Manifest:
    shards = tuple(Shard(**shard) for shard in values["shards"])
    for shard in shards:
        # The manifest came with the data: it must not point outside the folder.
        if not isinstance(shard.name, str) or not _FILE_NAME.fullmatch(shard.name):
            raise ValueError(f"shard name {shard.name!r} is not the name of a .tar file")
        for count in (shard.samples, shard.bytes):
            if type(count) is not int or not 0 <= count < 1 << 48:
                raise ValueError(f"shard {shard.name} has no counts")
        for digest in (shard.sha256, shard.index_sha256):
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise ValueError(f"shard {shard.name} has no hashes")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice")
    classes = values["classes"]
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise ValueError("classes are not a list of names")
    for name in ("height", "width", "channels"):
        side = values[name]
        if side is not None and (type(side) is not int or not 1 <= side <= MAX_SIDE):
            raise ValueError(f"{name} is {side!r}")
    return Manifest(
        shards=shards,
        height=values["height"],
        width=values["width"],
        channels=values["channels"],
        classes=None if classes is None else tuple(classes),
    )


def _read_index(storage: Storage, manifest: Manifest, number: int) -> Index:
    """One shard's index, checked.

    Raises:
        UserError: it cannot be had, or is not what the manifest describes.
    """
    shard = manifest.shards[number]
    path = f"{storage}/{shard.index_name}"
    remedy = f"delete {MANIFEST_NAME} and run 'make_shards.py index {storage}'"
    at_most = MAX_INDEX_HEADER + shard.samples * index_dtype(MAX_KEY).itemsize
    try:
        descriptor = storage.open(shard.index_name, shard.index_sha256, at_most)
        with open(descriptor, "rb") as file:
            content = file.read(at_most + 1)
    except OSError as error:
        raise UserError(f"index {path} cannot be read ({error.strerror}); {remedy}") from error
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise UserError(f"index {path} is not the one its manifest describes; {remedy}")
    try:
        return parse_index(content, shard, len(manifest.classes or ()))
    except ValueError as error:
        raise UserError(f"index {path} {error}; {remedy}") from error


def parse_index(content: bytes, shard: Shard, classes: int) -> Index:
    """Read an index's bytes, which may come from anyone: rows of `index_dtype`.

    Raises:
        ValueError: they are not an index of this shard; the message continues the file's name.
    """
    stream = io.BytesIO(content)
    try:
        npy.read_magic(stream)
        shape, _, dtype = npy.read_array_header_1_0(stream)
    except Exception as error:  # the header is evaluated as a literal, which fails in many ways
        raise ValueError(f"is not an npy file ({error})") from error
    names = dtype.names or ()
    if "key" not in names or dtype != index_dtype(dtype["key"].itemsize):
        raise ValueError("has other rows than this engine's")
    if shape != (shard.samples,) or len(content) - stream.tell() != shard.samples * dtype.itemsize:
        raise ValueError(f"has {list(shape)} rows for {shard.samples} samples")
    index = np.frombuffer(content, dtype, offset=stream.tell())
    # Subtracted, not added: the sum of two unsigned numbers could wrap.
    if np.any(index["offset"] > shard.bytes) or np.any(
        index["size"] > shard.bytes - index["offset"]
    ):
        raise ValueError("points outside its shard")
    labels = index["label"]
    if len(labels) and not -1 <= labels.min() <= labels.max() < max(classes, 0):
        raise ValueError(f"has labels up to {labels.max()}, the manifest names {classes} classes")
    return index
