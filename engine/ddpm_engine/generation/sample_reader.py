"""Reading the pictures of a set by their ids, without a part in making it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_engine.errors import UserError
from ddpm_engine.generation.id_store import MANIFEST
from ddpm_engine.generation.sample_formats import ids_in, picture_files


class SampleReader:
    """The pictures that are in a folder at the time of asking.

    Args:
        directory: of the pictures.
        settings: that they were drawn with, as the manifest has them; `format` among them.

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

    def _names(self) -> list[str]:
        return os.listdir(self.files.folder) if self.files.folder.exists() else []


def open_pictures(directory: Path) -> SampleReader:
    """The pictures of a set, finished or not; nothing is changed.

    Args:
        directory: that launch/sample.py drew into.

    Raises:
        UserError: it holds no manifest of pictures.
    """
    try:
        settings = json.loads((directory / MANIFEST).read_bytes())
        return SampleReader(directory, settings)
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError):
        reason = "it is not a manifest of pictures"
    raise UserError(
        f"{directory} is no folder of launch/sample.py: its {MANIFEST} cannot be read ({reason})"
    )
