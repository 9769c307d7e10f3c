"""A folder of samples generated with the same settings, filled by several processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.generation.id_store import IdStore
from ddpm_engine.generation.sample_formats import About, Format, ids_in, sample_files
from ddpm_engine.generation.sample_reader import SampleReader
from ddpm_engine.images.grid import class_grid, grid, save_png

METADATA = "metadata.jsonl"
_GRID_LIMIT = 256
_SHORTEST_ROW = 4


class SampleDir(IdStore):
    """Samples generated with the same settings, in one folder.

    Args:
        directory: created if missing. If it holds samples of the same settings, more are added.
        settings: JSON values: everything that determines a sample besides its id; `seed` among
            them.
        format: `"png"`: one file per sample; `"tar"`, `"tar-npy"`, `"npz"`: shards.
        label_of: returns the class of an id, to be written beside the sample; None: as the
            settings say.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        format: Format = "png",
        label_of: Callable[[int], int | None] | None = None,
    ) -> None:
        self._files = sample_files(directory, format)
        super().__init__(directory, self._files.folder, {**settings, "format": format})
        self.reader = SampleReader(directory, self.settings)
        self.label_of = label_of or self.reader.label_of

    @property
    def grid(self) -> Path:
        """File of the grid of the first samples."""
        return self.directory / "grid.png"

    @property
    def sharded(self) -> bool:
        """Whether one file holds many samples."""
        return self.folder != self.directory

    def write(self, ids: Sequence[int], items: np.ndarray) -> None:
        """Write samples whose ids this process has reserved.

        Args:
            ids: N ascending ids.
            items: uint8 `[N, H, W, C]`.

        Raises:
            UserError: the disk is full or the folder cannot be written; whole files stay.
        """
        with self.writing():
            seed, prompt_of = self.settings["seed"], self.reader.prompt_of
            about = [About(seed, self.label_of(k), prompt_of(k)) for k in ids]
            self._files.write(ids, items, about)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Read samples that are there: uint8 `[N, H, W, C]`.

        Raises:
            KeyError: one is not there.
            UserError: a file cannot be read.
        """
        return self.reader.read(ids)

    def finish(self, ids: Sequence[int]) -> None:
        """Write the grid of the first of these samples; one process at a time calls it.

        Samples of several classes get a row per class, unless rows would be short. Of files that
        were made from prompts, metadata.jsonl says which, as Hugging Face's imagefolder does.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        first = ids[:_GRID_LIMIT]
        labels = [label for k in first if (label := self.reader.label_of(k)) is not None]
        by_class = 1 < len(set(labels)) <= len(first) / _SHORTEST_ROW
        with self.writing():
            if self.reader.prompt_of(0) is not None and not self.sharded:
                self._write_metadata()
            images = self.read(first)
            save_png(class_grid(images, labels) if by_class else grid(images), self.grid)

    def _write_metadata(self) -> None:
        paths = {k: name for name in self._names() for k in ids_in(name) or ()}
        with atomic_write(self.directory / METADATA) as file:
            for k in sorted(paths):
                entry = {"file_name": paths[k], "text": self.reader.prompt_of(k)}
                file.write(f"{json.dumps(entry, ensure_ascii=False)}\n".encode())
