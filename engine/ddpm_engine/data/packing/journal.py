"""A folder that is being packed: reserved for one run, with a journal of finished shards.

Until the manifest is written, which happens last, the folder holds a marker, `.packing`. The marker
distinguishes leftovers of an interrupted run from shards that somebody else put there, which must
not be touched, and is locked while a run writes. Its first line is a hash of what is being packed;
every other line describes a finished shard.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, discard, fsync_directory
from ddpm_engine.data.shards.manifest import MANIFEST_NAME
from ddpm_engine.errors import UserError
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.locations import check_local
from ddpm_engine.locks import LocksUnsupportedError, acquire

MARKER_NAME = ".packing"

_OURS = re.compile(r"(shard-\d{6,}(\.tar|\.index\.npy)|manifest\.json)(\.tmp)?|\.packing", re.ASCII)
_GRACE_SECONDS = 2.0


class Journal:
    """The shards that runs of the same recipe have finished.

    Args:
        descriptor: of the marker, open for reading and appending.
        recipe: hash of the source and of everything else that determines the bytes; None: not
            known, so that nothing can be kept.
    """

    def __init__(self, descriptor: int, recipe: str | None) -> None:
        self._descriptor = descriptor
        first, *entries = self._lines() or [""]
        same = recipe is not None and first == recipe
        self.finished: list[dict[str, Any]] = [json.loads(entry) for entry in entries] * same
        """Entries that earlier runs recorded."""
        if not same:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{recipe or ''}\n".encode())

    def record(self, entry: dict[str, Any]) -> None:
        """Append an entry. It is not synced: losing it costs only the work."""
        os.write(self._descriptor, json.dumps(entry).encode() + b"\n")

    def _lines(self) -> list[str]:
        """Read the whole lines, and cut off what follows, such as a half-written one."""
        content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        lines: list[str] = []
        length = 0
        for line in content.splitlines(keepends=True):
            text = line.decode("utf-8", "replace")
            if not line.endswith(b"\n") or (lines and not _is_object(text)):
                break
            lines.append(text.strip())
            length += len(line)
        os.ftruncate(self._descriptor, length)
        return lines


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def packing_run(
    folder: Path, recipe: str | None, files_of: Callable[[dict[str, Any]], set[str]]
) -> Iterator[Journal]:
    """Reserve an output folder for one run, and remove the marker once it has succeeded.

    Files of earlier runs that are not in the journal are removed.

    Args:
        folder: made if it is missing.
        recipe: as `Journal` takes it.
        files_of: returns the names of the files that an entry of the journal describes.

    Yields:
        The `Journal`.

    Raises:
        UserError: the folder holds something else, is in use, or cannot be written.
    """
    check_local(folder, "out")
    marker = folder / MARKER_NAME
    with explain_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _leftovers(folder)
        lock = os.open(marker, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(lock, folder)
        with explain_os_error(folder):
            journal = Journal(lock, recipe)
            kept = set[str]().union(*(files_of(entry) for entry in journal.finished))
            # Looked at again: whoever held the lock may have finished meanwhile.
            for name in _leftovers(folder) - kept:
                _discard_file(folder / name)
            fsync_directory(folder)
            fsync_directory(folder.resolve().parent)
        try:
            yield journal
        except BaseException:
            for name in os.listdir(folder):
                if _OURS.fullmatch(name) and name.endswith(TEMPORARY_SUFFIX):
                    _discard_file(folder / name)
            raise
        with explain_os_error(folder):
            discard(marker)  # if it stays: what has a manifest is finished
            fsync_directory(folder)
    finally:
        os.close(lock)


def _discard_file(path: Path) -> None:
    """Remove what an interrupted run left; a folder of that name is none of its files."""
    if not path.is_dir():
        discard(path)


def _leftovers(folder: Path) -> set[str]:
    """Return the names of the files that an interrupted run left in an output folder.

    Raises:
        UserError: it holds anything else.
    """
    present = {n for n in os.listdir(folder) if n == MARKER_NAME or not is_hidden(n)}
    if MANIFEST_NAME in present:
        raise UserError(f"{folder} holds a finished set; choose another folder")
    foreign = sorted(name for name in present if not _OURS.fullmatch(name))
    if present and (foreign or MARKER_NAME not in present):
        raise UserError(
            f"{folder} is not empty (it holds {(foreign or sorted(present))[0]}): "
            "choose a new or an empty folder"
        )
    return present - {MARKER_NAME}


def _lock(descriptor: int, folder: Path) -> None:
    # Children of a killed run share its lock, and need a moment to notice that they are orphans.
    deadline = time.monotonic() + _GRACE_SECONDS
    while True:
        try:
            # Inherited, so that the folder stays reserved until the last child has ended.
            if acquire(descriptor, inherit=True):
                return
        except LocksUnsupportedError:
            return  # the marker still protects foreign files
        if time.monotonic() > deadline:
            raise UserError(f"another process is packing into {folder}: wait for it")
        time.sleep(0.05)


@contextmanager
def explain_os_error(path: Path) -> Iterator[None]:
    """Say which file the operating system refused to read or write, and what to do about it.

    Raises:
        UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space or raise the limit, then run again" if full else "check the path"
        raise UserError(f"cannot use {path}: {error.strerror or error}; {remedy}") from error
