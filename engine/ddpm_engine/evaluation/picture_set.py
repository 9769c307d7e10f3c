"""A folder of drawn pictures, with a manifest from which each can be made again."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.pictures import grid, save_png
from ddpm_engine.files import atomic_write

MANIFEST = "manifest.json"
_GRID_LIMIT = 256


class PictureSet:
    """Pictures drawn with the same settings, in one folder.

    Args:
        directory: made if missing. If it holds pictures of the same settings, more are added.
        settings: JSON values: whatever determines a picture, besides its id.
        format: `"png"`: one file a picture, named by id; `"npz"`: `samples.npz`.

    Raises:
        UserError: the folder holds something else, or cannot be made.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], format: str = "png") -> None:
        self.directory = directory
        self.settings = {**settings, "format": format}
        self.ids = self._existing_ids()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {directory} cannot be made: {error}") from None

    @property
    def grid(self) -> Path:
        """The picture that shows the last ones written."""
        return self.directory / "grid.png"

    def missing(self, ids: Sequence[int]) -> list[int]:
        """Those of the ids whose pictures are not there yet; all of them for an npz."""
        if self.settings["format"] == "npz" and self.ids != sorted(ids):
            return list(ids)
        existing = set(self.ids)
        return [sample_id for sample_id in ids if sample_id not in existing]

    def write(self, ids: Sequence[int], images: np.ndarray) -> None:
        """Write pictures, the grid that shows them, and last the manifest.

        Args:
            ids: N picture ids.
            images: uint8 `[N, H, W, C]`.

        Raises:
            UserError: the disk is full or the folder cannot be written; whole files stay.
        """
        try:
            if self.settings["format"] == "npz":
                self._write_npz(ids, images)
            else:
                for sample_id, image in zip(ids, images, strict=True):
                    save_png(image, self.directory / f"{sample_id:08d}.png")
            save_png(grid(images[:_GRID_LIMIT]), self.grid)
            self.ids = sorted({*self.ids, *ids})
            with atomic_write(self.directory / MANIFEST) as file:
                content = {**self.settings, "ids": self.ids}
                file.write((json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(
                f"writing to --out {self.directory} failed: {error}; make room and run it again"
            ) from None

    def _write_npz(self, ids: Sequence[int], images: np.ndarray) -> None:
        if self.ids and self.ids != sorted(ids):
            raise UserError(
                f"{self.directory} already holds a samples.npz with other ids; choose another --out"
            )
        encoded = io.BytesIO()
        np.savez(encoded, images=images, ids=np.asarray(ids, dtype=np.int64))
        with atomic_write(self.directory / "samples.npz") as file:
            file.write(encoded.getvalue())

    def _existing_ids(self) -> list[int]:
        if not self.directory.exists():
            return []
        if not self.directory.is_dir():
            raise UserError(f"--out {self.directory} is a file; choose a folder")
        manifest = self.directory / MANIFEST
        if not manifest.exists():
            # A first run that was interrupted leaves pictures and no manifest: it may be run again.
            foreign = [
                entry.name
                for entry in self.directory.iterdir()
                if not (entry.stem.isdigit() or entry.stem in ("grid", "samples"))
            ]
            if foreign:
                raise UserError(
                    f"--out {self.directory} holds other things ({foreign[0]}); choose another"
                )
            return []
        try:
            before = json.loads(manifest.read_text())
            ids = [int(sample_id) for sample_id in before.pop("ids")]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{manifest} is not a manifest of pictures; choose another --out"
            ) from None
        different = [
            f"{name} was {before.get(name)} and is now {value}"
            for name, value in self.settings.items()
            if before.get(name) != value
        ]
        if different:
            raise UserError(
                f"--out {self.directory} holds pictures drawn otherwise ({'; '.join(different)}); "
                "choose another"
            )
        return ids
