"""Captions of a folder of images: a list of them, or a text file beside each image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ddpm_engine.data.members import (
    EXTENSIONS_BESIDE,
    MAX_CAPTIONS,
    encode_captions,
    parse_captions,
)
from ddpm_engine.data.packing.sources.source import reading
from ddpm_engine.errors import UserError
from ddpm_engine.images.folder import in_words

LISTS = ("captions.jsonl", "metadata.jsonl")
"""Files of one JSON object a line, with `file_name` and one of `FIELDS`."""
FIELDS = ("text", "caption", "captions", "texts", "prompt", "prompts")
"""Names of captions: a string, or a list of strings."""

Captions = tuple[str, ...]

_SUFFIX = f".{EXTENSIONS_BESIDE['captions']}"


class FolderCaptions:
    """The captions of images in a folder.

    Those of an image are in a list in its folder or in one above it, as Hugging Face's imagefolder
    has it, where several lines may name an image; otherwise in a text file of its name, one a line.

    Args:
        root: the folder.
        images: below it.

    Raises:
        UserError: images without captions, which the message names, or a list that cannot be read.
    """

    def __init__(self, root: Path, images: Sequence[Path]) -> None:
        self.files: list[Path] = []
        """Files that hold captions of the images, in a fixed order."""
        self._listed: dict[Path, Captions] = {}
        folders = {folder for image in images for folder in _up_to(root, image)}
        for folder in sorted(folders):
            for path in (folder / name for name in LISTS):
                if path.is_file():
                    self._read(path)
        beside = [image.with_suffix(_SUFFIX) for image in images if image not in self._listed]
        missing = [str(path) for path in beside if not path.is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(images)} images in {root} have no captions: neither a "
                f"line in {' or '.join(LISTS)} with `file_name` and `text`, nor a text file "
                f"({in_words(missing)}); add them, or move the images out",
                field="source",
            )
        self.files += beside

    def of(self, image: Path) -> Captions:
        """Return the captions of an image.

        Raises:
            OSError: they cannot be read.
            ValueError: they are not captions; the message says why.
        """
        if image in self._listed:
            captions = self._listed[image]
            try:
                encode_captions(captions)
            except ValueError as error:
                raise ValueError(f"in the list of captions, {error}") from error
            return captions
        path = image.with_suffix(_SUFFIX)
        with open(path, "rb") as file:
            content = file.read(MAX_CAPTIONS + 1)
        try:
            return parse_captions(content)
        except ValueError as error:
            raise ValueError(f"in {path.name}, {error}") from error

    def _read(self, path: Path) -> None:
        self.files.append(path)
        with reading(path), open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._take(path, number, line)

    def _take(self, path: Path, number: int, line: bytes) -> None:
        """Take a line of a list; it may hold other things than captions, which are passed over."""
        try:
            entry = json.loads(line.decode("utf-8-sig"))
            if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
                raise ValueError("it is no object with a `file_name`")
            field = next((name for name in FIELDS if name in entry), None)
            captions = () if field is None else captions_in(entry[field])
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"line {number} of {path} cannot be used ({error}); it must be like "
                '{"file_name": "0.png", "text": "a caption"}'
            ) from error
        if captions:
            image = path.parent / PurePosixPath(entry["file_name"])
            self._listed[image] = self._listed.get(image, ()) + captions


def captions_in(value: Any) -> Captions:
    """Return the captions in a string or in a list of strings, each on one line.

    Raises:
        ValueError: it is neither.
    """
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Iterable) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"captions are a string or a list of strings, not {type(value).__name__}")
    return tuple(re.sub(r"\s*[\r\n]+\s*", " ", one.strip()) for one in values)


def _up_to(root: Path, image: Path) -> list[Path]:
    """Return the folders that hold an image, from its own up to the root."""
    folders = [image.parent]
    while folders[-1] != root:
        folders.append(folders[-1].parent)
    return folders
