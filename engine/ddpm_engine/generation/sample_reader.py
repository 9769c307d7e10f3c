"""Read samples of a folder by their ids, without taking part in generating them."""

from __future__ import annotations

import hashlib
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
from ddpm_engine.images.damaged import read_image, reason_of, unreadable
from ddpm_engine.images.folder import check_image_files, image_files
from ddpm_engine.json_files import read_json
from ddpm_engine.locations import check_local

_MOST_BYTES = 1 << 30  # of a manifest: one of shards may name very many

CLASS_NAMES = "class_names"
"""Entry of a manifest of samples: names of the classes 0, 1, ... of the model."""


class SampleReader:
    """The samples in a folder at the time of asking.

    In a folder that was generated, the names of the files hold the ids. In any other folder of
    images, ids are positions in the order of the files' names; `image_files` says which are images.

    Args:
        directory: the folder, or one image file, of id 0.
        settings: what the samples were generated with, as the manifest says, `format` among them;
            empty for any other folder.

    Raises:
        UserError: unknown format.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.settings = settings
        classes = settings.get("classes")
        if not (classes is None or (isinstance(classes, list) and all(map(_is_class, classes)))):
            raise UserError(f"{directory / MANIFEST} is damaged: its classes are no numbers")
        prompts = settings.get("prompts")
        texts = isinstance(prompts, list) and all(isinstance(one, str) for one in prompts)
        if prompts is not None and not (texts and prompts):
            raise UserError(f"{directory / MANIFEST} is damaged: its prompts are no texts")
        try:
            self.files = sample_files(directory, settings["format"]) if settings else None
        except UserError as error:
            raise UserError(f"{directory / MANIFEST} is not of samples: its {error}") from None
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
        found = {k: self.image(k) for k in sorted(set(ids))}
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
        return int(classes[sample_id % len(classes)]) if classes else None

    def prompt_of(self, sample_id: int) -> str | None:
        """Return the prompt a sample was conditioned on, or None."""
        prompts = self.settings.get("prompts")
        return prompts[sample_id % len(prompts)] if prompts else None

    @property
    def classes(self) -> ClassNames | None:
        """Names of the classes that labels number, if the manifest has them."""
        return class_names_in(self.settings.get(CLASS_NAMES))

    def image(self, sample_id: int) -> NDArray[np.uint8]:
        """Read one sample that is there: `[H, W, C]`.

        Raises:
            KeyError: it is not there.
            UserError: its file cannot be read; the message names all files that cannot.
        """
        if sample_id not in self._paths:
            self._paths = self._list()
        path = self._paths[sample_id]
        if self._last is None or self._last[0] != path:
            try:
                self._last = path, self._read(path, sample_id)
            except MemoryError:
                raise
            except Exception as error:  # archives and shards that are damaged fail in many ways
                raise self._unreadable(path, error) from None
        return self._last[1][sample_id]

    def _list(self) -> dict[int, Path]:
        if self.directory.is_file():
            return {0: self.directory}
        if self.files is None:
            return dict(enumerate(image_files(self.directory)))
        folder = self.files.folder
        names = os.listdir(folder) if folder.exists() else []
        return {k: folder / name for name in sorted(names) for k in ids_in(name) or ()}

    def _read(self, path: Path, sample_id: int) -> Mapping[int, NDArray[np.uint8]]:
        if self.files is None:
            return {sample_id: read_image(path)}
        held = self.files.read(path)
        for promised in ids_in(path.name) or ():
            if promised not in held:
                raise ValueError(f"it does not hold sample {promised}, as its name says")
            if held[promised].dtype != np.uint8 or held[promised].ndim != 3:
                raise ValueError("its arrays are not images of uint8")
        return held

    def _unreadable(self, found: Path, error: Exception) -> UserError:
        reasons = {str(found): reason_of(error)}
        read = {found}
        for sample_id, path in sorted(self._list().items()):
            if path not in read:
                read.add(path)
                try:
                    self._read(path, sample_id)
                except Exception as another:
                    reasons[str(path)] = reason_of(another)
        return unreadable(reasons)


def open_samples(directory: Path) -> SampleReader:
    """Open a folder of generated samples, finished or not; nothing is changed.

    Raises:
        UserError: it has no manifest of samples.
    """
    settings = read_manifest(directory)
    if settings is None or "format" not in settings:
        raise UserError(
            f"{directory} is no folder of generated samples: it has no {MANIFEST} of samples"
        )
    return SampleReader(directory, settings)


def open_images(directory: Path, field: str = "samples") -> SampleReader:
    """Open a folder of generated samples, or any folder of images.

    Args:
        directory: the folder. What is in it besides images is named in a warning.
        field: that it is from, for messages.

    Raises:
        UserError: no such folder, no images in it, or images of formats that cannot be read.
    """
    if not directory.is_dir():
        check_local(directory, field)
        raise UserError(f"there is no folder `{field}` {directory}; give one of images", field)
    manifest = read_manifest(directory) or {}
    if "shards" in manifest:
        raise UserError(
            f"`{field}` {directory} is a data set of shards; give a folder of images or of samples",
            field,
        )
    reader = SampleReader(directory, manifest if "format" in manifest else {})
    if reader.files is None:
        check_image_files(directory, field)
    elif not reader.ids():
        raise UserError(f"`{field}` {directory} holds no samples yet; generate some", field)
    return reader


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder, of samples or of shards; None if there is none.

    Raises:
        UserError: a file of that name that cannot be read.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path, _MOST_BYTES)
    return manifest if isinstance(manifest, dict) else None


def _is_class(label: object) -> bool:
    return isinstance(label, int) and label >= 0
