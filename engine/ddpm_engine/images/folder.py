"""Which files of a folder are its images: one rule for packing, sampling and evaluating.

Hidden files are left out, as are files that this engine writes beside images, and folders that it
writes. Whatever else is there is no image, and is named.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX
from ddpm_engine.errors import UserError
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.images.codec import EXTENSIONS

logger = logging.getLogger(__name__)

_OTHER_FORMATS = frozenset({
    "apng", "avif", "bmp", "cr2", "dds", "dng", "exr", "gif", "hdr", "heic", "heif", "ico", "j2k",
    "jfif", "jp2", "jpe", "jxl", "nef", "pbm", "pcx", "pgm", "pnm", "ppm", "psd", "raw", "svg",
    "tga", "tif", "tiff",
})  # fmt: skip
_MANIFEST = "manifest.json"
_METADATA = "metadata.jsonl"
_NUMBERED = re.compile(r"\d{8,}\.png")
_REPORT = re.compile(r"result-[0-9a-f]+\.(json|md)")
_MOST_NAMES = 10


class FolderContents(NamedTuple):
    """What is directly inside a folder, but for what is hidden or written beside images."""

    images: list[Path]
    """In the order of their names."""
    folders: list[Path]
    """In the order of their names."""
    outputs: list[Path]
    """Folders that this engine wrote."""
    others: list[Path]
    """Files that are no images."""


def extension_in(name: str) -> str:
    """Return a file's extension in lower case, without the dot."""
    return Path(name).suffix[1:].lower()


def folder_contents(folder: Path, out: Path | None = None) -> FolderContents:
    """List a folder.

    Args:
        folder: to list.
        out: folder that is about to be written; it counts as output, whatever is in it.

    Raises:
        OSError: it cannot be read.
    """
    found = FolderContents([], [], [], [])
    with os.scandir(folder) as scanned:
        entries = sorted(
            (entry for entry in scanned if not is_hidden(entry.name)), key=lambda entry: entry.name
        )
    for entry in entries:
        path = folder / entry.name
        if entry.is_dir():
            is_own = is_output(path) or (out is not None and _is_same(path, out))
            (found.outputs if is_own else found.folders).append(path)
        else:
            is_image = extension_in(entry.name) in EXTENSIONS
            (found.images if is_image else found.others).append(path)
    _drop_by_products(folder, found)
    return found


def image_files(folder: Path) -> list[Path]:
    """Return the images directly inside a folder, in the order of their names.

    Raises:
        UserError: the folder cannot be read.
    """
    return _listed(folder).images


def check_image_files(folder: Path, field: str) -> None:
    """Warn of everything that `image_files` passes over, so that nothing is missed silently.

    Args:
        folder: of images.
        field: that it is from.

    Raises:
        UserError: no images; some of formats that cannot be read, without which the images would be
            others; or a folder that cannot be read.
    """
    found = _listed(folder)
    check_formats(found.others, folder, field)
    left_out = in_words(path.name for path in (*found.others, *found.folders))
    if not found.images:
        only = f", only {left_out}" if left_out else ""
        raise UserError(
            f"`{field}` {folder} holds no images ({', '.join(EXTENSIONS)}){only}", field
        )
    if left_out:
        logger.warning("%s: left out, %s", folder, left_out)


def _listed(folder: Path) -> FolderContents:
    try:
        return folder_contents(folder)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; check its permissions") from error


def check_formats(others: Sequence[Path], folder: Path, field: str | None = None) -> None:
    """Refuse images of formats that cannot be read: without them, a folder would hold others.

    Args:
        others: files that are not images of a known format.
        folder: that holds them.
        field: that the folder is from.

    Raises:
        UserError: there are some; the message names them.
    """
    files = [file for file in others if extension_in(file.name) in _OTHER_FORMATS]
    if files:
        are_none, them = ("are not images", "them") if len(files) > 1 else ("is not an image", "it")
        raise UserError(
            f"{in_words(map(str, files))} {are_none} ({', '.join(EXTENSIONS)}): move {them} out of "
            f"{folder}, hide {them} with a leading dot, or convert {them}",
            field,
        )


def in_words(names: Iterable[str], separator: str = ", ") -> str:
    """Name some things, and count the rest."""
    known = list(names)
    rest = len(known) - _MOST_NAMES
    listed = separator.join(known[:_MOST_NAMES])
    return listed if rest <= 0 else f"{listed} and {rest} more"


def is_output(folder: Path) -> bool:
    """Whether this engine wrote a folder: a run, samples, features, shards or an evaluation."""
    try:
        names = {name for name in os.listdir(folder) if not is_hidden(name) or name == ".packing"}
    except OSError:
        return False
    return (
        ".packing" in names
        or ("config.json" in names and not names.isdisjoint({"lock", "checkpoints"}))
        or (_MANIFEST in names and _is_own_manifest(folder / _MANIFEST))
        or (
            any(_REPORT.fullmatch(name) for name in names)
            and not any(extension_in(name) in EXTENSIONS for name in names - {"terms.png"})
        )
        or (bool(names) and all(_is_output_folder(folder / name) for name in names))
    )


def _is_output_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and is_output(path)


def _drop_by_products(folder: Path, found: FolderContents) -> None:
    """Remove what this engine writes beside images."""
    others = {file.name for file in found.others}
    reports = any(_REPORT.fullmatch(name) for name in others)
    has_samples = _MANIFEST in others and _is_own_manifest(folder / _MANIFEST)
    # Samples that were copied elsewhere: their numbers remain.
    numbered = [file for file in found.images if _NUMBERED.fullmatch(file.name)]
    copied = bool(numbered) and len(numbered) == len(found.images) - 1
    own = {"grid.png"} if has_samples or copied else set()
    own |= {"terms.png"} if reports else set()
    found.images[:] = [file for file in found.images if file.name not in own]
    found.others[:] = [
        file
        for file in found.others
        if not (has_samples and file.name in (_MANIFEST, _METADATA))
        and not file.name.endswith(TEMPORARY_SUFFIX)
        and not _REPORT.fullmatch(file.name)
    ]
    if has_samples:
        found.outputs.extend([path for path in found.folders if path.name == "shards"])
        found.folders[:] = [path for path in found.folders if path.name != "shards"]


def _is_own_manifest(path: Path) -> bool:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        return isinstance(content, dict) and "format" in content
    return False


def _is_same(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return False
