"""Remote files on a local disk: verified, bounded, shared by all processes of a node.

A file is kept under the hash of its whole URL and the hash of its content, so that neither two sets
with equal names nor two versions of a set are confused. It is downloaded under a temporary name,
hashed on the way, and renamed only if the hash is right. Three kinds of locks, which end with their
process:

    locks/NN      exclusive during the download of a file whose key begins so: one per node
    files/KEY     shared while the file is read: such a file is never removed
    room.lock     exclusive while room is made and taken

The least recently opened files are removed first.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, discard, fsync_directory, unused_name
from ddpm_engine.cache_directories import node_cache
from ddpm_engine.data.remote.fetch import Body, FetchError, retried
from ddpm_engine.errors import UserError
from ddpm_engine.locations import redacted
from ddpm_engine.locks import acquire, acquire_announced, locked

logger = logging.getLogger(__name__)

_PIECE = 1 << 20


def default_cache_directory() -> Path:
    """Return the folder of this user's shards on this node's local disk.

    Raises:
        UserError: it is not safe to use.
    """
    try:
        return node_cache("shards")
    except OSError as error:
        raise UserError(
            f"there is no folder for shards of a URL ({error}); give one by `data.cache`",
            field="data.cache",
        ) from error


class CacheError(UserError):
    """The folder of the cache cannot be written: no fault of the data."""


class ShardCache:
    """A bounded folder of downloaded files.

    Args:
        directory: made if it is missing; on a local disk, since file locks must work. Several
            processes may use it at the same time, best with the same limit.
        limit: bytes of all files together. It is exceeded, with a warning, only while every file is
            in use.

    Raises:
        UserError: the folder cannot be made, or belongs to somebody else.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.limit = limit
        self._files = directory / "files"
        self._locks = directory / "locks"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files.mkdir(exist_ok=True)
            self._locks.mkdir(exist_ok=True)
            owner = directory.stat().st_uid
            with locked(directory / "room.lock"):
                pass  # the cache is worth nothing without locks: better said now than in a worker
        except OSError as error:
            raise UserError(
                f"`data.cache` {directory} cannot be used ({error.strerror}): choose another",
                field="data.cache",
            ) from error
        if hasattr(os, "getuid") and owner != os.getuid():
            raise UserError(
                f"`data.cache` {directory} belongs to someone else: choose another",
                field="data.cache",
            )

    def open(self, url: str, sha256: str, at_most: int) -> int:
        """Return a descriptor for reading a file, which is downloaded if it is not there.

        The file counts as in use until the descriptor is closed.

        Args:
            url: of the file.
            sha256: of its content.
            at_most: its size in bytes, or a bound on it.

        Raises:
            FetchError: it cannot be fetched, or its content has another hash or is longer.
            UserError: it alone is over the limit, or no package here reads such URLs.
            CacheError: the cache cannot be written.
        """
        try:
            return self._opened(url, sha256, at_most)
        except FetchError:
            raise
        except OSError as error:
            raise CacheError(
                f"`data.cache` {self.directory} cannot be written ({error.strerror or error}); "
                "free space there, lower `data.cache_gb`, or choose another `data.cache`",
                field="data.cache",
            ) from error

    def _opened(self, url: str, sha256: str, at_most: int) -> int:
        if at_most > self.limit:
            raise UserError(
                f"{redacted(url)} may have {at_most} bytes, more than the cache holds "
                f"({self.limit}): raise `data.cache_gb`"
            )
        key = f"{hashlib.sha256(url.encode()).hexdigest()}-{sha256}"
        descriptor = self._open_present(key)
        if descriptor is not None:
            return descriptor
        with locked(self._locks / key[:2]):
            while True:
                # Looked for again: another process may have downloaded it, or removed it.
                descriptor = self._open_present(key)
                if descriptor is not None:
                    return descriptor
                retried(lambda: self._download(key, url, sha256, at_most))

    def _open_present(self, key: str) -> int | None:
        try:
            descriptor = os.open(self._files / key, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        acquire_announced(descriptor, f"another process that uses {self._files / key}", shared=True)
        if os.fstat(descriptor).st_nlink == 0:  # removed before it was locked
            os.close(descriptor)
            return None
        os.utime(descriptor)  # the time of its last use
        return descriptor

    def _download(self, key: str, url: str, sha256: str, at_most: int) -> None:
        path = self._files / key
        temporary = path.with_name(key + TEMPORARY_SUFFIX)
        with Body(url) as body:
            with locked(self.directory / "room.lock"):
                self._make_room(body.length if body.length is not None else at_most)
                discard(temporary)
                temporary = unused_name(temporary)
                file = open(temporary, "xb")  # noqa: SIM115
                # Locked before others make room, who would take it for what a killed download left.
                acquire(file, wait=True, inherit=True)
            try:
                digest, size = hashlib.sha256(), 0
                while piece := body.read(_PIECE):
                    digest.update(piece)
                    size += len(piece)
                    if size > at_most:
                        raise FetchError(url, f"it has more than {at_most} bytes", lasting=True)
                    file.write(piece)
                if digest.hexdigest() != sha256:
                    raise FetchError(
                        url, f"its SHA-256 is {digest.hexdigest()}, the manifest says {sha256}"
                    )
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            finally:
                with suppress(OSError):
                    file.close()
        fsync_directory(self._files)

    def _make_room(self, needed: int) -> None:
        """Remove the least recently used files; the caller holds `room.lock`."""
        entries = []
        for entry in os.scandir(self._files):
            with suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    status = entry.stat()
                    entries.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        excess = sum(size for _, size, _ in entries) + needed - self.limit
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            if _remove_unused(path):
                excess -= size
        if excess > 0:
            logger.warning(
                "the cache %s is %d bytes over its limit, all of it in use: raise `data.cache_gb`",
                self.directory, excess,
            )  # fmt: skip


def _remove_unused(path: Path) -> bool:
    """Remove a file unless it is locked, or cannot be removed; return whether it is gone."""
    try:
        # Open for writing, without which network file systems lock nothing exclusively.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if not acquire(descriptor, inherit=True):
            return False
        discard(path)
        return not path.exists()
    finally:
        os.close(descriptor)
