"""Read one sample by its place in the index: a `pread`, a checksum and a decode a member."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.data.members import (
    BOUNDS,
    StoredText,
    parse_captions,
    parse_embedding,
    parse_moments,
)
from ddpm_engine.data.remote.cache import CacheError
from ddpm_engine.data.shards.shard_set import ShardSet
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import DecodeError, Pixels, decode

T = TypeVar("T")

MAX_OPEN_SHARDS = 64
"""Files kept open at a time, well below the usual limit of 1024 per process."""


@dataclass(frozen=True)
class BadSample:
    """A sample, or a whole shard, that cannot be used, and why."""

    shard: str
    """File name of the shard."""
    key: str | None
    """WebDataset key of the sample; None for the shard itself."""
    reason: str
    """Why it cannot be used."""

    def __str__(self) -> str:
        sample = "" if self.key is None else f"sample {self.key!r}: "
        return f"{self.shard}: {sample}{self.reason}"


class DamagedSample(Exception):
    """A sample cannot be used; the message says why."""


@dataclass(frozen=True)
class StoredImage:
    """The bytes of an image, and what its index says of them."""

    payload: bytes
    extension: str
    crc32: int

    def decoded(self, channels: int | None = None) -> Pixels:
        """Decode: uint8 `[H, W, C]`; any thread may.

        Raises:
            DamagedSample: the checksum differs, or the bytes are not an image that may be decoded.
        """
        if zlib.crc32(self.payload) != self.crc32:
            raise DamagedSample("checksum differs from the index")
        try:
            return decode(self.payload, self.extension, channels)
        except DecodeError as error:
            raise DamagedSample(str(error)) from error


class ShardReader:
    """Random access to the images of a set.

    Files are opened on first use; the least recently used one is closed when there are too many.
    A reader can be pickled, which leaves its descriptors behind, or inherited by a forked worker,
    since `pread` shares no position.

    Args:
        shards: an open set.
        max_open: files kept open at a time; a downloaded file that is open stays in the cache.
    """

    def __init__(self, shards: ShardSet, max_open: int = MAX_OPEN_SHARDS) -> None:
        self._shards = shards
        self._max_open = max_open
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def image(self, shard: int, row: int, channels: int | None = None) -> Pixels:
        """Decode the image of one index row: uint8 `[H, W, C]`.

        Raises:
            CacheError: the cache of a set under a URL cannot be written.
            DamagedSample: the shard or its index cannot be read, the shard ends early, the checksum
                differs, or the bytes are not an image that may be decoded.
        """
        return self.stored(shard, row).decoded(channels)

    def stored(self, shard: int, row: int) -> StoredImage:
        """Read the image of one index row as it is stored.

        Raises:
            CacheError: the cache of a set under a URL cannot be written.
            DamagedSample: the shard or its index cannot be read, or the shard ends early.
        """
        entry = self._entry(shard, row)
        if not entry["offset"]:
            raise DamagedSample("it has no image")
        extension = entry["extension"].decode("ascii", "replace")
        return StoredImage(self._payload(shard, entry), extension, int(entry["crc32"]))

    def captions(self, shard: int, row: int) -> tuple[str, ...]:
        """Read the captions of one index row.

        Raises:
            CacheError: the cache of a set under a URL cannot be written.
            DamagedSample: they cannot be read, or are not captions; see `parse_captions`.
        """
        return self._beside(shard, row, "captions", parse_captions)

    def text(self, shard: int, row: int) -> StoredText:
        """Read the embeddings of the captions of one index row.

        Raises:
            CacheError: the cache of a set under a URL cannot be written.
            DamagedSample: they cannot be read, or are not embeddings; see `StoredText`.
        """
        return self._beside(shard, row, "text", StoredText)

    def embedding(self, shard: int, row: int) -> NDArray[np.float32]:
        """Read the embedding of the image of one index row: float32 `[D]`.

        Raises:
            CacheError: the cache of a set under a URL cannot be written.
            DamagedSample: it cannot be read, or is none; see `parse_embedding`.
        """
        return self._beside(shard, row, "embedding", parse_embedding)

    def moments(self, shard: int, row: int) -> NDArray[np.float16]:
        """Read the moments of the latents of one index row: float16 `[1 or 2, 2 C, h, w]`.

        Raises:
            CacheError: the cache of a set under a URL cannot be written.
            DamagedSample: they cannot be read, or are none of the set's; see `parse_moments`.
        """
        latents = self._shards.manifest.latents
        if latents is None:
            raise DamagedSample("it has no moments of latents")
        parse = partial(parse_moments, shape=latents.stored_shape)
        return self._beside(shard, row, "moments", parse)

    def _beside(self, shard: int, row: int, name: str, parse: Callable[[bytes], T]) -> T:
        entry = self._entry(shard, row)
        if name not in (entry.dtype.names or ()) or not entry[name]["offset"]:
            raise DamagedSample(f"it has no {name}")
        place = entry[name]
        if place["size"] > BOUNDS[name]:
            raise DamagedSample(f"its {name} has {place['size']} bytes, more than {BOUNDS[name]}")
        payload = self._payload(shard, place)
        if zlib.crc32(payload) != place["crc32"]:
            raise DamagedSample(f"checksum of its {name} differs from the index")
        try:
            return parse(payload)
        except ValueError as error:
            raise DamagedSample(str(error)) from error

    def _entry(self, shard: int, row: int) -> np.void:
        try:
            entry: np.void = self._shards.indexes[shard][row]
        except CacheError:
            raise
        except UserError as error:
            raise DamagedSample(str(error)) from error
        return entry

    def _payload(self, shard: int, place: np.void) -> bytes:
        """Read the bytes at a place, which an index gives by offset and size."""
        size = int(place["size"])
        try:
            payload = os.pread(self._open(shard), size, int(place["offset"]))
        except OSError as error:
            self._close(shard)
            raise DamagedSample(f"cannot read the shard ({error.strerror})") from error
        if len(payload) < size:
            raise DamagedSample(f"the shard ends {size - len(payload)} bytes early")
        return payload

    def describe(self, shard: int, row: int, reason: str) -> BadSample:
        """Name the sample of one index row in a `BadSample`."""
        try:
            key = self._shards.indexes[shard][row]["key"].decode("utf-8", "replace")
        except UserError:
            key = None
        return BadSample(self._shards.manifest.shards[shard].name, key, reason)

    def close(self) -> None:
        """Close every file; reading opens them again."""
        for shard in list(self._descriptors):
            self._close(shard)

    def _open(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            if len(self._descriptors) >= min(self._max_open, MAX_OPEN_SHARDS):
                self._close(next(iter(self._descriptors)))
            wanted = self._shards.manifest.shards[shard]
            self._descriptors[shard] = self._shards.storage.open(
                wanted.name, wanted.sha256, wanted.bytes
            )
        return self._descriptors[shard]

    def _close(self, shard: int) -> None:
        if shard in self._descriptors:
            os.close(self._descriptors.pop(shard))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_descriptors": OrderedDict()}

    def __del__(self) -> None:
        self.close()
