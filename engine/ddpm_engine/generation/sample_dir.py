"""A folder of pictures drawn with the same settings, which several processes may fill together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_engine.generation.id_store import IdStore
from ddpm_engine.generation.sample_formats import Format
from ddpm_engine.generation.sample_reader import SampleReader
from ddpm_engine.images.grid import class_grid, grid, save_png

_GRID_LIMIT = 256
_SHORTEST_ROW = 4


class SampleDir(IdStore):
    """Pictures drawn with the same settings, in one folder.

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
        self.stored = SampleReader(directory, {**settings, "format": format})
        self.files = self.stored.files
        super().__init__(directory, self.files.folder, self.stored.settings)

    @property
    def grid(self) -> Path:
        """The picture that shows the first ones."""
        return self.directory / "grid.png"

    @property
    def sharded(self) -> bool:
        """Whether one file holds many pictures."""
        return self.files.folder != self.directory

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
        with self.writing():
            self.files.write(ids, images, labels or [None] * len(ids), self.settings["seed"])

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Some of the pictures that are there: uint8 `[N, H, W, C]`.

        Raises:
            KeyError: one is not there.
        """
        return self.stored.read(ids)

    def finish(self, ids: Sequence[int]) -> None:
        """Show the first of these pictures in one; for one process at a time.

        If they are of several classes there is a row for each, unless rows would be short.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        shown = ids[:_GRID_LIMIT]
        labels = [label for k in shown if (label := self.stored.label_of(k)) is not None]
        by_class = 1 < len(set(labels)) <= len(shown) / _SHORTEST_ROW
        with self.writing():
            pictures = self.read(shown)
            save_png(class_grid(pictures, labels) if by_class else grid(pictures), self.grid)
