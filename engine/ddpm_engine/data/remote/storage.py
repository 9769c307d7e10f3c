"""Where the files of a set are: a local folder, or a URL whose files come through the cache."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol

from ddpm_engine.data.remote.cache import ShardCache
from ddpm_engine.data.remote.fetch import FetchError, fetch
from ddpm_engine.data.shards.manifest import INDEX_SUFFIX
from ddpm_engine.data.shards.records import records_of
from ddpm_engine.locations import redacted

MAX_MANIFEST = 1 << 28
"""Bytes of a manifest under a URL."""

_REMEMBERED_SECONDS = 60.0


class Storage(Protocol):
    """The files of a set, by name."""

    def open(self, name: str, sha256: str, at_most: int) -> int:
        """Return a descriptor for reading a file of this hash and of at most `at_most` bytes.

        A local file may have another hash and size: readers check what they read.

        Raises:
            OSError: it cannot be opened or fetched.
        """

    def manifest(self, name: str) -> bytes:
        """Return the content of the manifest.

        Raises:
            OSError: it cannot be read or fetched.
        """

    def __str__(self) -> str:
        """The set's location, as the user wrote it."""


class Folder:
    """A set in a local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = records_of(path)
        """Where the manifest and the indexes are."""

    def open(self, name: str, sha256: str, at_most: int) -> int:
        """As `Storage`."""
        folder = self.records if name.endswith(INDEX_SUFFIX) else self.path
        return os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)

    def manifest(self, name: str) -> bytes:
        """As `Storage`."""
        return (self.records / name).read_bytes()

    def __str__(self) -> str:
        return str(self.path)


class Remote:
    """A set under a URL, whose files are downloaded on first use.

    Args:
        url: of the folder that holds the manifest.
        cache: keeps what is downloaded.
    """

    def __init__(self, url: str, cache: ShardCache) -> None:
        self.url = url.rstrip("/")
        self._cache = cache
        self._failures: dict[str, tuple[float, OSError]] = {}

    def open(self, name: str, sha256: str, at_most: int) -> int:
        """As `Storage`."""
        failed = self._failures.get(name)
        # Ten thousand samples of a shard that is gone must not all wait for it.
        if failed is not None and time.monotonic() - failed[0] < _REMEMBERED_SECONDS:
            raise failed[1]
        try:
            return self._cache.open(f"{self.url}/{name}", sha256, at_most)
        except FetchError as error:
            self._failures[name] = (time.monotonic(), error)
            raise

    def manifest(self, name: str) -> bytes:
        """As `Storage`."""
        return fetch(f"{self.url}/{name}", MAX_MANIFEST)

    def __str__(self) -> str:
        return redacted(self.url)
