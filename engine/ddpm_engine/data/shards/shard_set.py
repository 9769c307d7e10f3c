"""Opening a finished set of shards, in a local folder or under a URL."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from ddpm_engine.data.remote.cache import ShardCache, default_cache_directory
from ddpm_engine.data.remote.storage import Folder, Remote, Storage
from ddpm_engine.data.shards.index import (
    BESIDE,
    MAX_HEADER,
    MAX_KEY,
    Index,
    index_dtype,
    parse_index,
)
from ddpm_engine.data.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    how_to_index_again,
    parse_manifest,
)
from ddpm_engine.errors import UserError
from ddpm_engine.locations import check_local, is_url

DEFAULT_CACHE_BYTES = 64 << 30

MAX_OPEN_INDEXES = 64
"""Indexes that each process keeps in memory: as many as it keeps files open."""


class Indexes(Sequence[Index]):
    """The indexes of a set, read and checked on first use; the most recent ones are kept.

    Args:
        storage: where they are.
        manifest: what they must match.
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
        """Return the rows, of `index_dtype`, of one shard or of several.

        Raises:
            UserError: an index cannot be read, or does not match the manifest.
        """
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) >= MAX_OPEN_INDEXES:
                self._open.popitem(last=False)
            self._open[number] = self._read(number)
        return self._open[number]

    def _read(self, number: int) -> Index:
        shard = self._manifest.shards[number]
        place = _place(self._storage)
        path = f"{place}/{shard.index_name}"
        remedy = f"restore it, or {how_to_index_again(str(place))}"
        at_most = MAX_HEADER + shard.samples * index_dtype(MAX_KEY, BESIDE).itemsize
        try:
            descriptor = self._storage.open(shard.index_name, shard.index_sha256, at_most)
            with open(descriptor, "rb") as file:
                content = file.read(at_most + 1)
        except OSError as error:
            raise UserError(f"index {path} cannot be read ({error.strerror}); {remedy}") from error
        if hashlib.sha256(content).hexdigest() != shard.index_sha256:
            raise UserError(f"index {path} is not the one its manifest describes; {remedy}")
        try:
            return parse_index(content, shard, len(self._manifest.classes or ()))
        except ValueError as error:
            raise UserError(f"index {path} {error}; {remedy}") from error

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

    Reads the manifest only. An index is read, and compared with the manifest, on first use; the
    content of a shard is compared with its index as it is read; `verify` reads every byte.

    Args:
        location: a folder, or the URL of one (see `ddpm_engine.data.remote.fetch`).
        cache: keeps the files of a URL; None: one in `default_cache_directory`, of up to 64 GiB.
        check: compare the sizes of a folder's files with the manifest. One process of a run
            suffices.

    Raises:
        UserError: no finished set there, or a file that is missing or of another size; the message
            names the file and the remedy.
    """
    if isinstance(location, str) and is_url(location):
        cache = cache or ShardCache(default_cache_directory(), DEFAULT_CACHE_BYTES)
        remote = Remote(location, cache)
        return ShardSet(remote, _read_manifest(remote))
    folder = Path(location)
    manifest = read_manifest(folder)
    storage = Folder(folder)
    for shard in manifest.shards if check else ():
        _check_files(storage, shard)
    return ShardSet(storage, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest without looking at its shards.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not folder.is_dir():
        check_local(folder, urls=True)
        raise UserError(f"no folder of shards at {folder}: pack your images into it first")
    storage = Folder(folder)
    if not (storage.records / MANIFEST_NAME).exists():
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}: index shards made elsewhere, or pack an unfinished "
            "set again"
        )
    return _read_manifest(storage)


def _read_manifest(storage: Storage) -> Manifest:
    path = f"{_place(storage)}/{MANIFEST_NAME}"
    try:
        content = storage.manifest(MANIFEST_NAME)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_manifest(content, path)


def _place(storage: Storage) -> Path | Storage:
    """Where the manifest and the indexes are."""
    return storage.records if isinstance(storage, Folder) else storage


def _check_files(storage: Folder, shard: Shard) -> None:
    folder, records = storage.path, storage.records
    path, index_path = folder / shard.name, records / shard.index_name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(
            f"shard {path} of {records / MANIFEST_NAME} cannot be read ({error.strerror}); "
            "restore it, or pack the set again"
        ) from error
    if size != shard.bytes:
        raise UserError(
            f"shard {path} has {size} bytes, its manifest says {shard.bytes}: restore it, or if it "
            f"was replaced, {how_to_index_again(str(records))}"
        )
    if not index_path.exists():
        raise UserError(
            f"index {index_path} cannot be read (it is missing); restore it, or "
            f"{how_to_index_again(str(records))}"
        )
