"""Replacing the files of a model, which are read together, in a folder that may hold others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, fsync_directory
from ddpm_engine.json_files import to_json

Writer = Callable[[Path], None]
"""Writes a file's content to a path."""


def write_together(
    folder: Path,
    files: Mapping[str, Writer],
    entries: Sequence[str],
    obsolete: Sequence[str] = (),
) -> None:
    """Write files so that nobody reads some of them beside others of an earlier save.

    All are written beside their places first: until then the earlier ones stay as they are, also
    if that fails. Then the entries, without which nothing here is read, are removed; the other
    files are renamed into place, and the entries last. Whatever else is in the folder stays.

    Args:
        folder: created if missing.
        files: by name, such as `unet/config.json`.
        entries: those of the files by which readers know the folder, in the order of their writing.
        obsolete: names of files that an earlier save may have left and this one does not have.

    Raises:
        OSError: the folder cannot be written.
    """
    temporaries = {name: folder / f"{name}{TEMPORARY_SUFFIX}" for name in files}
    inside = sorted({(folder / name).parent for name in files})
    made = [one for one in {folder, *inside} if not one.exists()]
    try:
        for one in inside:
            one.mkdir(parents=True, exist_ok=True)
        for name, write in files.items():
            write(temporaries[name])
            with open(temporaries[name], "rb") as written:
                os.fsync(written.fileno())
        for name in [*obsolete, *reversed(entries)]:
            (folder / name).unlink(missing_ok=True)
        _sync(inside)
        for name in [name for name in files if name not in entries]:
            os.replace(temporaries[name], folder / name)
        _sync(inside)
        for name in entries:
            os.replace(temporaries[name], folder / name)
            fsync_directory((folder / name).parent)
    except BaseException:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink()
        for one in sorted(made, reverse=True):
            with suppress(OSError):  # unless somebody has put something there
                one.rmdir()
        raise
    fsync_directory(folder.parent)


def json_writer(values: Mapping[str, Any]) -> Writer:
    """Write a JSON object."""
    content = (to_json(values, indent=2) + "\n").encode()
    return lambda path: _write(path, content)


def text_writer(text: str) -> Writer:
    """Write text in UTF-8; of names that are no text, what a terminal shows."""
    return lambda path: _write(path, text.encode(errors="backslashreplace"))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _sync(folders: Sequence[Path]) -> None:
    for folder in folders:
        fsync_directory(folder)
