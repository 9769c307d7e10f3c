"""Read samples of a folder by their ids, without taking part in generating them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.atomic_io import sha256_of
from ddpm_engine.data.classes import ClassNames, class_names_in
from ddpm_engine.errors import UserError
from ddpm_engine.generation.id_store import MANIFEST
from ddpm_engine.generation.sample_formats import ids_in, sample_files
from ddpm_engine.images.codec import EXTENSIONS, DecodeError, decode
from ddpm_engine.locations import check_local

CLASS_NAMES = "class_names"
"""Entry of a manifest of samples: names of the classes 0, 1, ... of the model."""


class SampleReader:
    """The samples in a folder at the time of asking.

    In a folder that was generated, the names of the files hold the ids. In any other folder of
    images, ids are positions in the order of the files' names.

    Args:
        directory: the folder.
        settings: what the samples were generated with, as the manifest says, `format` among them;
            empty for any other folder.

    Raises:
        UserError: unknown format.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.settings = settings
        self.files = sample_files(directory, settings["format"]) if settings else None
        self._paths: dict[int, Path] = {}
        self._last: tuple[Path, Mapping[int, NDArray[np.uint8]]] | None = None
        self._first: tuple[int, tuple[int, ...]] | None = None

    def ids(self) -> set[int]:
        """Return the ids of the samples that are there."""
        self._paths = self._list()
        return set(self._paths)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the sample of the lowest id: (H, W, C)."""
        return self.read([min(self.ids())]).shape[1:]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content of all files in the order of ids."""
        digest = hashlib.sha256()
        paths = self._list()
        for path in dict.fromkeys(paths[k] for k in sorted(paths)):
            digest.update(bytes.fromhex(sha256_of(path)))
        return digest.hexdigest()

    def read(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """Read samples that are there: `[N, H, W, C]`.

        Raises:
            KeyError: one is not there.
            UserError: a file cannot be read, or samples differ in shape.
        """
        # File by file: a shard holds many.
        found = {k: self._read(k) for k in sorted(set(ids))}
        for k, image in found.items():
            self._first = self._first or (k, image.shape)
            first, shape = self._first
            if image.shape != shape:
                raise UserError(
                    f"images in {self.directory} differ in shape: {first} has {list(shape)}, {k} "
                    f"has {list(image.shape)}; all must be of one size"
                )
        return np.stack([found[k] for k in ids])

    def label_of(self, sample_id: int) -> int | None:
        """Return the class a sample was conditioned on, or None."""
        classes = self.settings.get("classes")
        if not isinstance(classes, list) or not classes:
            return None
        return int(classes[sample_id % len(classes)])

    @property
    def classes(self) -> ClassNames | None:
        """Names of the classes that labels number, if the manifest has them."""
        return class_names_in(self.settings.get(CLASS_NAMES))

    def _list(self) -> dict[int, Path]:
        if self.files is None:
            names = sorted(os.listdir(self.directory))
            images = [name for name in names if _extension(Path(name)) in EXTENSIONS]
            return {k: self.directory / name for k, name in enumerate(images)}
        folder = self.files.folder
        names = os.listdir(folder) if folder.exists() else []
        return {k: folder / name for name in sorted(names) for k in ids_in(name) or ()}

    def _read(self, sample_id: int) -> NDArray[np.uint8]:
        if sample_id not in self._paths:
            self._paths = self._list()
        path = self._paths[sample_id]
        if self._last is None or self._last[0] != path:
            try:
                if self.files is not None:
                    self._last = path, self.files.read(path)
                else:
                    self._last = path, {sample_id: decode(path.read_bytes(), _extension(path))}
            except (DecodeError, OSError, ValueError, KeyError) as error:
                raise UserError(f"cannot read {path}: {error}; repair or remove it") from error
        return self._last[1][sample_id]


def open_samples(directory: Path) -> SampleReader:
    """Open a folder of generated samples, finished or not; nothing is changed.

    Raises:
        UserError: it has no manifest of samples.
    """
    try:
        settings = json.loads((directory / MANIFEST).read_bytes())
        settings["format"]
        return SampleReader(directory, settings)
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = "it is not a manifest of samples"
    raise UserError(
        f"{directory} is no folder of generated samples: its {MANIFEST} cannot be read ({reason})"
    )


def open_images(directory: Path) -> SampleReader:
    """Open a folder of generated samples, or any folder of images.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not directory.is_dir():
        check_local(directory, "samples")
        raise UserError(
            f"there is no folder `samples` {directory}; give one of images", field="samples"
        )
    manifest = read_manifest(directory)
    reader = SampleReader(directory, manifest if manifest and "format" in manifest else {})
    if not reader.ids():
        raise UserError(
            f"`samples` {directory} holds no images ({', '.join(EXTENSIONS)})", field="samples"
        )
    return reader


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder, of samples or of shards; None if there is none."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()
