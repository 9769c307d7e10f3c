"""A folder of pictures drawn with the same settings, which several processes may fill together.

The manifest is written first and never again: it says what every picture of the folder was drawn
with. Processes divide the ids by locking ranges of them, as ranges of the manifest's bytes, which
the operating system releases whenever and however a process ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_engine.drawing.picture_files import (
    Format,
    consecutive,
    ids_being_written,
    ids_in,
    picture_files,
)
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.pictures import class_grid, grid, save_png
from ddpm_engine.files import TEMPORARY_SUFFIX, write_once

MANIFEST = "manifest.json"
_GRID_LIMIT = 256
_SHORTEST_ROW = 4
_EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB
_SHARED = fcntl.LOCK_SH | fcntl.LOCK_NB
_PRESENCE = 1 << 60  # a byte beyond every id, which all who fill the set lock together


class StoredPictures:
    """Pictures that lie in a folder, read by their ids.

    Args:
        directory: of the pictures.
        settings: what its manifest says.

    Raises:
        UserError: a format that nobody writes.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.settings = settings
        self.files = picture_files(directory, settings["format"])

    def ids(self) -> set[int]:
        """Which pictures are there."""
        return {k for name in self._names() for k in ids_in(name) or ()}

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Some of the pictures that are there: uint8 `[N, H, W, C]`.

        Raises:
            KeyError: one is not there.
        """
        wanted, found = set(ids), dict[int, np.ndarray]()
        for name in sorted(self._names()):
            if wanted.intersection(ids_in(name) or ()):
                pictures = self.files.read(self.files.folder / name)
                found.update((k, pictures[k]) for k in wanted.intersection(pictures))
        return np.stack([found[k] for k in ids])

    def label_of(self, sample_id: int) -> int | None:
        """The class that a picture was asked to be of, if of any."""
        classes: Sequence[int] | None = self.settings.get("classes")
        return classes[sample_id % len(classes)] if classes else None

    def _names(self) -> Collection[str]:
        try:
            return os.listdir(self.files.folder)
        except FileNotFoundError:
            return ()


def open_pictures(directory: Path) -> StoredPictures:
    """Pictures that `PictureSet` wrote, finished or not; nothing is changed.

    Raises:
        UserError: there is no manifest, or it is none.
    """
    manifest = directory / MANIFEST
    try:
        return StoredPictures(directory, _parsed(manifest, manifest.read_bytes()))
    except OSError as error:
        raise UserError(
            f"{directory} holds no pictures of launch/sample.py: {manifest.name} cannot be read "
            f"({error.strerror})"
        ) from None


class PictureSet(StoredPictures):
    """Pictures drawn with the same settings, in one folder, which may become more.

    Args:
        directory: made if missing. If it holds pictures of the same settings, more are added.
        settings: JSON values: whatever determines a picture, besides its id; `seed` among them.
        format: `"png"`: one file a picture; `"tar"`, `"tar-npy"`, `"npz"`: in shards.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], format: Format = "png"
    ) -> None:
        # Through JSON and back, so that it compares with what the file says.
        super().__init__(directory, json.loads(json.dumps({**settings, "format": format})))
        manifest = directory / MANIFEST
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--out {directory} is a file; choose a folder")
        if not manifest.exists():
            self._refuse_foreign()
            with self._writing():
                directory.mkdir(parents=True, exist_ok=True)
                write_once(manifest, (json.dumps(self.settings, indent=2) + "\n").encode())
        with self._writing():
            # Kept open, and the only time that this process opens it: closing the file a second
            # time would release every lock.
            self._manifest = manifest.open("r+b")
        self._refuse_other_settings(self._manifest.read())
        self.locks = self._try_lock(_SHARED) is not None
        self._remove_leftovers()

    @property
    def grid(self) -> Path:
        """The picture that shows the first ones."""
        return self.directory / "grid.png"

    @property
    def sharded(self) -> bool:
        """Whether one file holds many pictures."""
        return self.files.folder != self.directory

    @contextmanager
    def claim(self, ids: Sequence[int]) -> Iterator[bool]:
        """Reserve the ids from the first to the last for this process; False: they are taken.

        On a file system without locks everything is granted: see `locks`.

        Args:
            ids: ascending, not empty.
        """
        with self._locked(ids[0], ids[-1] - ids[0] + 1) as granted:
            yield granted

    def write(
        self, ids: Sequence[int], images: np.ndarray, labels: Sequence[int | None] | None = None
    ) -> None:
        """Write pictures whose ids this process has claimed.

        Args:
            ids: N ascending ids.
            images: uint8 `[N, H, W, C]`.
            labels: the class of each, or None.

        Raises:
            UserError: the disk is full or the folder cannot be written; whole files stay.
        """
        with self._writing():
            self.files.write(ids, images, labels or [None] * len(ids), self.settings["seed"])

    def write_grid(self, ids: Sequence[int]) -> None:
        """Show the first of these pictures in one; for one process at a time.

        If they are of several classes there is a row for each, unless rows would be short.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        shown = ids[:_GRID_LIMIT]
        labels = [label for k in shown if (label := self.label_of(k)) is not None]
        rows = len(set(labels))
        with self._writing():
            pictures = self.read(shown)
            by_class = 1 < rows <= len(shown) / _SHORTEST_ROW
            save_png(class_grid(pictures, labels) if by_class else grid(pictures), self.grid)

    def leave(self) -> bool:
        """Stop counting as one who fills the set; True: nobody else does, and nobody else is told.

        Of several who leave at the same time one is the last. True without locks.
        """
        self._try_lock(fcntl.LOCK_UN)
        return self._try_lock(_EXCLUSIVE) is not False

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
                    (self.files.folder / name).unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"writing to --out {self.directory} failed: {error}; make room or choose another, "
                "and run it again"
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
                f"--out {self.directory} holds other things ({min(foreign)}); choose another"
            )

    def _refuse_other_settings(self, content: bytes) -> None:
        before = _parsed(self.directory / MANIFEST, content)
        different = [
            f"{name} was {before.get(name)} and is now {self.settings.get(name)}"
            for name in {**self.settings, **before}
            if before.get(name) != self.settings.get(name)
        ]
        if different:
            raise UserError(
                f"--out {self.directory} holds pictures drawn otherwise ({'; '.join(different)}); "
                "choose another"
            )


def _parsed(manifest: Path, content: bytes) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(content)
        settings["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{manifest} is not a manifest of pictures; choose another folder"
        ) from None
    return settings


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
