"""A folder of numbered things made with the same settings, which several processes fill together.

The manifest is written first and never again: it says what everything in the folder was made with.
Processes divide the ids by locking ranges of them, as ranges of the manifest's bytes, which the
operating system releases whenever and however a process ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, write_once
from ddpm_engine.errors import UserError
from ddpm_engine.generation.sample_formats import consecutive, ids_being_written, ids_in

MANIFEST = "manifest.json"
_EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB
_SHARED = fcntl.LOCK_SH | fcntl.LOCK_NB
_PRESENCE = 1 << 60  # a byte beyond every id, which all who fill the set lock together


class IdStore(ABC):
    """Things made with the same settings, in files that are named by the ids they hold.

    Args:
        directory: made if missing. If it holds things of the same settings, more are added.
        folder: where in it the files are.
        settings: JSON values: whatever determines a thing, besides its id.
        flag: how the user chose the directory, for error messages.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """

    def __init__(
        self, directory: Path, folder: Path, settings: Mapping[str, Any], flag: str = "--out"
    ) -> None:
        self.directory, self.folder, self.flag = directory, folder, flag
        # Through JSON and back, so that it compares with what the file says.
        self.settings = json.loads(json.dumps(settings))
        manifest = directory / MANIFEST
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{flag} {directory} is a file; choose a folder")
        if not manifest.exists():
            self._refuse_foreign()
            with self.writing():
                directory.mkdir(parents=True, exist_ok=True)
                write_once(manifest, (json.dumps(self.settings, indent=2) + "\n").encode())
        with self.writing():
            # Kept open, and the only time that this process opens it: closing the file a second
            # time would release every lock.
            self._manifest = manifest.open("r+b")
        self._refuse_other_settings(self._manifest.read())
        self.locks = self._try_lock(_SHARED) is not None
        self._remove_leftovers()

    def ids(self) -> set[int]:
        """Which things are there."""
        return {k for name in self._names() for k in ids_in(name) or ()}

    @contextmanager
    def claim(self, ids: Sequence[int]) -> Iterator[bool]:
        """Reserve the ids from the first to the last for this process; False: they are taken.

        On a file system without locks everything is granted: see `locks`.

        Args:
            ids: ascending, not empty.
        """
        with self._locked(ids[0], ids[-1] - ids[0] + 1) as granted:
            yield granted

    @abstractmethod
    def write(
        self, ids: Sequence[int], things: np.ndarray, labels: Sequence[int | None] | None = None
    ) -> None:
        """Write things whose ids this process has claimed.

        Args:
            ids: N ascending ids.
            things: `[N, ...]`.
            labels: the class of each, or None.

        Raises:
            UserError: the disk is full or the folder cannot be written; whole files stay.
        """

    @property
    @abstractmethod
    def sharded(self) -> bool:
        """Whether one file holds many things."""

    def finish(self, ids: Sequence[int]) -> None:  # noqa: B027
        """Whatever is to be done once all these ids are there; for one process at a time."""

    def leave(self) -> bool:
        """Stop counting as one who fills the set; True: nobody else does, and nobody else is told.

        Of several who leave at the same time one is the last. True without locks.
        """
        self._try_lock(fcntl.LOCK_UN)
        return self._try_lock(_EXCLUSIVE) is not False

    def _names(self) -> Collection[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return ()

    @contextmanager
    def _locked(self, start: int, length: int) -> Iterator[bool]:
        granted = self._try_lock(_EXCLUSIVE, start, length)
        try:
            yield granted is not False
        finally:
            if granted:
                self._try_lock(fcntl.LOCK_UN, start, length)

    def _try_lock(self, kind: int, start: int = _PRESENCE, length: int = 1) -> bool | None:
        """Lock or unlock bytes: whether that was granted, or None without locks."""
        try:
            fcntl.lockf(self._manifest, kind, length, start)
        except OSError as error:
            return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
        return True

    def _remove_leftovers(self) -> None:
        """Delete what killed processes had begun to write; what is being written is locked."""
        for name in self._names():
            ids = ids_being_written(name)
            if ids is None:
                continue
            with self._locked(ids[0], len(ids)) as granted, suppress(FileNotFoundError):
                if granted:
                    (self.folder / name).unlink()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Say what to do when the operating system refuses to write.

        Raises:
            UserError: instead of any `OSError` in the block.
        """
        try:
            yield
        except OSError as error:
            raise UserError(
                f"writing to {self.flag} {self.directory} failed: {error}; make room or choose "
                "another, and run it again"
            ) from None

    def _refuse_foreign(self) -> None:
        foreign = [
            name
            for name in (os.listdir(self.directory) if self.directory.exists() else [])
            if not name.startswith((".", MANIFEST)) and not name.endswith(TEMPORARY_SUFFIX)
        ]
        # Looked at again: another process of the same run may have begun meanwhile.
        if foreign and not (self.directory / MANIFEST).exists():
            raise UserError(
                f"{self.flag} {self.directory} holds other things ({min(foreign)}); choose another"
            )

    def _refuse_other_settings(self, content: bytes) -> None:
        manifest = self.directory / MANIFEST
        try:
            before = json.loads(content)
            before["format"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{manifest} is not a manifest of pictures; choose another {self.flag}"
            ) from None
        different = [
            f"{name} was {before.get(name)} and is now {self.settings.get(name)}"
            for name in {**self.settings, **before}
            if before.get(name) != self.settings.get(name)
        ]
        if different:
            raise UserError(
                f"{self.flag} {self.directory} holds pictures drawn otherwise "
                f"({'; '.join(different)}); choose another"
            )


def units(ids: Sequence[int], size: int, aligned: bool) -> list[list[int]]:
    """Cut ascending ids into pieces that are drawn one at a time.

    Args:
        ids: ascending.
        size: ids of a piece, at most.
        aligned: cut at multiples of `size` and wherever an id is left out, as shards do, so that a
            shard holds the same ids whichever else are asked for.
    """
    if not aligned:
        return [list(ids[i : i + size]) for i in range(0, len(ids), size)]
    pieces: list[list[int]] = []
    for part in consecutive(ids):
        for k in ids[part]:
            if not pieces or k % size == 0 or k != pieces[-1][-1] + 1:
                pieces.append([])
            pieces[-1].append(k)
    return pieces
