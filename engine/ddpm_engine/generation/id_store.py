"""A folder of items numbered by id and made with the same settings, filled by several processes.

The manifest is written first and never again; it records what everything in the folder was made
with. Processes share the ids by locking ranges of them, as byte ranges of the manifest, which the
operating system releases whenever and however a process ends.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_engine import locks
from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, discard, write_once
from ddpm_engine.errors import UserError
from ddpm_engine.generation.sample_formats import ids_being_written, ids_in
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.json_files import to_json
from ddpm_engine.locations import check_local

MANIFEST = "manifest.json"
_PRESENCE = 1 << 60  # a byte beyond every id, which all processes in the store lock together


class IdStore(ABC):
    """Items made with the same settings, in files named by the ids they hold.

    Args:
        directory: created if missing. If it holds items of the same settings, more are added.
        folder: where in it the files are.
        settings: JSON values: everything that determines an item besides its id.
        field: the configuration field that named the directory, for error messages.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """

    def __init__(
        self, directory: Path, folder: Path, settings: Mapping[str, Any], field: str = "out"
    ) -> None:
        self.directory, self.folder, self.field = directory, folder, field
        # Through JSON and back, so that it compares equal to what the file says.
        check_local(directory, field)
        self.settings = json.loads(to_json(settings))
        manifest = directory / MANIFEST
        if directory.exists() and not directory.is_dir():
            raise self._error(f"`{field}` {directory} is a file; choose a folder")
        if not manifest.exists():
            self._refuse_foreign()
            with self.writing():
                directory.mkdir(parents=True, exist_ok=True)
                write_once(manifest, (to_json(self.settings, indent=2) + "\n").encode())
        with self.writing():
            # Kept open and never opened again: closing a second descriptor of the file would
            # release every lock of this process.
            self._manifest = manifest.open("r+b")
        self._refuse_other_settings(self._manifest.read())
        self.supports_locks = self._acquire(_PRESENCE, shared=True) is not None
        self._remove_leftovers()

    def ids(self) -> set[int]:
        """Return the ids of the items that are there."""
        return {k for name in self._names() for k in ids_in(name) or ()}

    @contextmanager
    def reserve(self, ids: Sequence[int], wait: bool = False) -> Iterator[bool]:
        """Reserve the range from the first id to the last for this process.

        Args:
            ids: ascending, not empty.
            wait: block until no other process has reserved any of them.

        Yields:
            Whether the range was reserved; False if another process has reserved part of it. True
            on a file system without locks, see `supports_locks`.
        """
        length = ids[-1] - ids[0] + 1
        acquired = self._acquire(ids[0], length, wait=wait)
        try:
            yield acquired is not False
        finally:
            if acquired:
                locks.release(self._manifest, start=ids[0], length=length)

    @abstractmethod
    def write(self, ids: Sequence[int], items: np.ndarray) -> None:
        """Write items whose ids this process has reserved.

        Args:
            ids: N ascending ids.
            items: `[N, ...]`.

        Raises:
            UserError: the disk is full or the folder cannot be written; whole files stay.
        """

    @property
    @abstractmethod
    def sharded(self) -> bool:
        """Whether one file holds many items."""

    def finish(self, ids: Sequence[int]) -> None:  # noqa: B027
        """Do what is left to do once all these ids are there; one process at a time calls it."""

    def last_to_leave(self) -> bool:
        """Stop counting as a process in the store; True for exactly one: the last to leave.

        Always True on a file system without locks.
        """
        if not self.supports_locks:
            return True
        locks.release(self._manifest, start=_PRESENCE, length=1)
        return self._acquire(_PRESENCE) is not False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Explain a failure to write.

        Raises:
            UserError: instead of any `OSError` in the block.
        """
        try:
            yield
        except OSError as error:
            raise self._error(
                f"writing to `{self.field}` {self.directory} failed: {error}; make room or choose "
                "another, and run it again"
            ) from None

    def _names(self) -> Collection[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return ()

    def _acquire(
        self, start: int, length: int = 1, shared: bool = False, wait: bool = False
    ) -> bool | None:
        """Lock bytes of the manifest: whether that was granted, or None without locks."""
        try:
            if wait:
                locks.acquire_announced(
                    self._manifest, f"another process that fills {self.directory}",
                    inherit=False, start=start, length=length, shared=shared,
                )  # fmt: skip
                return True
            return locks.acquire(self._manifest, start=start, length=length, shared=shared)
        except locks.LocksUnsupportedError:
            return None

    def _remove_leftovers(self) -> None:
        """Delete what killed processes had begun to write; what is being written is reserved."""
        for name in self._names():
            path = self.folder / name
            if (ids := ids_being_written(name)) is not None and not path.is_dir():
                with self.reserve(ids) as reserved:
                    if reserved:
                        discard(path)

    def _refuse_foreign(self) -> None:
        foreign = [
            name
            for name in (os.listdir(self.directory) if self.directory.exists() else [])
            if not is_hidden(name)
            and not name.startswith(MANIFEST)
            and not name.endswith(TEMPORARY_SUFFIX)
        ]
        # Look again: another process of the same run may have begun meanwhile.
        if foreign and not (self.directory / MANIFEST).exists():
            raise self._error(
                f"`{self.field}` {self.directory} holds other things ({min(foreign)}); choose "
                "another"
            )

    def _refuse_other_settings(self, content: bytes) -> None:
        manifest = self.directory / MANIFEST
        try:
            before = json.loads(content)
            before["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._error(
                f"{manifest} is not a manifest of samples; choose another `{self.field}`"
            ) from None
        different = [
            f"{name} was {before.get(name)} and is now {self.settings.get(name)}"
            for name in {**self.settings, **before}
            if before.get(name) != self.settings.get(name)
        ]
        if different:
            raise self._error(
                f"`{self.field}` {self.directory} was made with other settings "
                f"({'; '.join(different)}); choose another"
            )

    def _error(self, message: str) -> UserError:
        return UserError(message, field=self.field)
