"""The images that are compared: drawn on demand, of a folder, or of a set of shards.

All are uint8: what a model draws is rounded to the nearest of 256 levels before anything looks at
it, as a file would hold it, and files are lossless (PNG). An image of another size is cut to its
central square and resized by `fit` to that of the pictures it is compared with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.atomic_io import sha256_of
from ddpm_engine.data.shards.reader import DamagedSample, ShardReader
from ddpm_engine.data.shards.shard_set import ShardSet, open_shards
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.subsets import evenly_spaced
from ddpm_engine.generation.id_store import MANIFEST
from ddpm_engine.generation.recipe import Drawing
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.sample_formats import ids_in, picture_files
from ddpm_engine.images.codec import EXTENSIONS, DecodeError, decode, fit

RULE = (
    "uint8; cut to the central square, halved by averaging while at least twice as large, then "
    "Pillow's bicubic, to the pictures' size"
)
"""How `RealImages` brings images to one size."""


class Images(Protocol):
    """Numbered images of one size."""

    shape: tuple[int, int, int]
    """(H, W, C)."""

    def read(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """Some of them, ids ascending: `[N, H, W, C]`.

        Raises:
            UserError: one cannot be had.
        """
        ...


class DrawnPictures:
    """Pictures of a recipe, drawn when they are first asked for and kept.

    Args:
        drawing: draws them.
        pictures: keeps them; other processes may fill it at the same time.
        batch_size: pictures at a time.
        on_found: called with how many were there already.
    """

    def __init__(
        self,
        drawing: Drawing,
        pictures: SampleDir,
        batch_size: int = 64,
        on_found: Callable[[int], None] = lambda _: None,
    ) -> None:
        channels, height, width = drawing.model.sample_shape
        self.shape = (height, width, channels)
        self.pictures = pictures
        self._drawing, self._batch_size, self._on_found = drawing, batch_size, on_found

    def label_of(self, sample_id: int) -> int | None:
        """The class of a picture, if it has one."""
        return self._drawing.label_of(sample_id)

    def read(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """As `Images.read`: `[N, H, W, C]`. What is missing is drawn.

        Raises:
            UserError: no room to write, or a recipe whose images cannot be read.
        """
        present = self.pictures.ids()
        old, missing = [k for k in ids if k in present], [k for k in ids if k not in present]
        found = dict(zip(old, self.pictures.read(old), strict=True)) if old else {}
        self._on_found(len(old))
        if missing:
            size = self._batch_size
            batches = [missing[i : i + size] for i in range(0, len(missing), size)]
            drawn = np.concatenate([self._drawing.draw(batch) for batch in batches])
            with self.pictures.claim(missing) as granted:
                # Whoever else has claimed them writes the same pictures.
                if granted:
                    labels = [self._drawing.label_of(k) for k in missing]
                    self.pictures.write(missing, drawn, labels)
            found.update(zip(missing, drawn, strict=True))
        return np.stack([found[k] for k in ids])


class RealImages:
    """The images of a set of shards in the order of its manifest, brought to one shape.

    Args:
        shards: an open set.
        shape: (H, W, C), H = W.
        count: only so many, evenly spaced, are ids 0 … count − 1; None: all of them.
    """

    def __init__(
        self, shards: ShardSet, shape: tuple[int, int, int], count: int | None = None
    ) -> None:
        self.shards, self.shape = shards, shape
        self.total = shards.manifest.samples
        """How many the set has."""
        self._picked = evenly_spaced(self.total, min(self.total, count or self.total))
        self._starts = np.cumsum([0] + [shard.samples for shard in shards.manifest.shards])
        self._reader = ShardReader(shards)

    def __len__(self) -> int:
        return len(self._picked)

    def place_in_set(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Which samples of the set these are: int64 `[N]`."""
        return self._picked[np.asarray(ids, dtype=np.int64)]

    def read(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """As `Images.read`: `[N, H, W, C]`.

        Raises:
            UserError: a damaged sample; leaving it out would change the measure.
        """
        return np.stack([self._read(k) for k in ids])

    def label_of(self, sample_id: int) -> int | None:
        """The class of an image, if it has one."""
        shard, row = self._place(sample_id)
        label = int(self.shards.indexes[shard][row]["label"])
        return None if label < 0 else label

    def _place(self, sample_id: int) -> tuple[int, int]:
        sample = int(self._picked[sample_id])
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def _read(self, sample_id: int) -> NDArray[np.uint8]:
        shard, row = self._place(sample_id)
        try:
            return fit(self._reader.image(shard, row, self.shape[2]), self.shape[0])
        except DamagedSample as damage:
            fault = self._reader.describe(shard, row, str(damage))
            raise UserError(
                f"{fault}; a measure of the other samples would be another measure: run "
                f"'make_shards.py verify {self.shards.storage}' and repair the set"
            ) from None


class PictureFolder:
    """Pictures that are there: a folder that launch/sample.py filled, or any folder of images.

    Args:
        folder: of pictures of one size. Ids are those of its files' names if it has a manifest of
            ours, else places in the order of its files' names.

    Raises:
        UserError: nothing there that can be read.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no folder --samples {folder}; give one of pictures")
        self.folder = folder
        self.about = _manifest(folder)
        """What the manifest says of the pictures; None without one."""
        format = (self.about or {}).get("format")
        self._held = _images(folder) if format is None else _numbered(folder, format)
        if not self._held:
            raise UserError(f"--samples {folder} holds no pictures ({', '.join(EXTENSIONS)})")
        self.ids = sorted(self._held)
        """Which there are."""
        self._kept: tuple[Path, dict[int, NDArray[np.uint8]]] | None = None
        self.shape = self._read(self.ids[0]).shape

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content of all files in the order of ids."""
        digest = hashlib.sha256()
        for file in dict.fromkeys(file for file, _ in map(self._held.__getitem__, self.ids)):
            digest.update(bytes.fromhex(sha256_of(file)))
        return digest.hexdigest()

    def label_of(self, sample_id: int) -> int | None:
        """The class of a picture, if the manifest says that they were drawn by class in turn."""
        classes = (self.about or {}).get("classes")
        if not isinstance(classes, list) or not classes:
            return None
        return int(classes[sample_id % len(classes)])

    def read(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """As `Images.read`: `[N, H, W, C]`.

        Raises:
            UserError: a file that cannot be read, or a picture of another size.
        """
        found = []
        for k in ids:
            picture = self._read(k)
            if picture.shape != self.shape:
                raise UserError(
                    f"picture {k} in --samples {self.folder} has shape {list(picture.shape)}, the "
                    f"first has {list(self.shape)}; all must be of one size"
                )
            found.append(picture)
        return np.stack(found)

    def _read(self, sample_id: int) -> NDArray[np.uint8]:
        file, load = self._held[sample_id]
        # A shard holds many, which are asked for in order.
        if self._kept is None or self._kept[0] != file:
            try:
                self._kept = (file, load(file))
            except (DecodeError, OSError, ValueError, KeyError) as error:
                raise UserError(f"cannot read {file}: {error}; repair or remove it") from error
        pictures = self._kept[1]
        return pictures[sample_id] if sample_id in pictures else pictures[-1]


Load = Callable[[Path], dict[int, NDArray[np.uint8]]]
_Held = dict[int, tuple[Path, Load]]


def is_shard_set(folder: Path) -> bool:
    """Whether a folder has the manifest of a set of shards; pictures have one of another kind."""
    return "shards" in (_manifest(folder) or {})


def _manifest(folder: Path) -> dict[str, object] | None:
    try:
        about = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def _numbered(folder: Path, format: object) -> _Held:
    files = picture_files(folder, format)  # type: ignore[arg-type]
    paths = sorted(files.folder.iterdir()) if files.folder.is_dir() else []
    return {
        k: (path, lambda p: dict(files.read(p))) for path in paths for k in ids_in(path.name) or ()
    }


def _images(folder: Path) -> _Held:
    def load(path: Path) -> dict[int, NDArray[np.uint8]]:
        return {-1: decode(path.read_bytes(), path.suffix[1:].lower())}

    paths = [path for path in sorted(folder.iterdir()) if path.suffix[1:].lower() in EXTENSIONS]
    return {k: (path, load) for k, path in enumerate(paths)}


def open_reference(
    location: str, shape: tuple[int, int, int], count: int | None = None
) -> RealImages:
    """Open the real images.

    Args:
        location: a folder of shards, or its URL.
        shape: (H, W, C) that they are brought to.
        count: as `RealImages` takes it.

    Raises:
        UserError: no finished set of shards there, or pictures that are not square.
    """
    if shape[0] != shape[1]:
        raise UserError(
            f"pictures are {shape[0]}×{shape[1]} pixels; images are compared as squares"
        )
    return RealImages(open_shards(location), shape, count)
