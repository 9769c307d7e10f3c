"""Images to begin with, to inpaint or to upscale, and masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.data.classes import ClassNames, match_classes
from ddpm_engine.errors import UserError
from ddpm_engine.generation.id_store import MANIFEST
from ddpm_engine.generation.sample_reader import (
    SampleReader,
    open_images,
    open_samples,
    read_manifest,
)
from ddpm_engine.images.codec import (
    EXTENSIONS,
    DecodeError,
    decode,
    decode_opacity,
    fit,
    with_channels,
)
from ddpm_engine.images.damaged import reason_of, unreadable
from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.images.folder import extension_in
from ddpm_engine.locations import check_local
from ddpm_engine.sizes import Size, size_of


class InputImages:
    """An image file, the image files of a folder in the order of their names, or samples by id.

    Sample k goes with image k, and again from the first after the last. Each is cut to its central
    part of the network's proportions and resized to its size, in its channels.

    Args:
        path: of the file (png, jpg, webp or npy), or of the folder, as `open_images` takes it.
        shape: (C, H, W) of the network.
        name: field that the path is from, for messages.

    Raises:
        UserError: nothing there, or no images.
    """

    classes: tuple[int, ...] | None = None
    """Images from files are of no class."""

    def __init__(self, path: Path, shape: tuple[int, int, int], name: str = "images") -> None:
        if not path.exists():
            check_local(path, name)
            raise UserError(
                f"there is no `{name}` {path}; give an image file or a folder of them", name
            )
        if path.is_dir():
            self._reader = open_images(path, name)
        else:
            _check_is_image(path, name)
            self._reader = SampleReader(path, {})
        self._ids = sorted(self._reader.ids())
        self.shape = shape

    def of(self, ids: Sequence[int]) -> Tensor:
        """Return the images that go with samples: float32 `[N, C, H, W]` in [-1, 1].

        Raises:
            UserError: a file that cannot be read; the message names all that cannot.
        """
        channels, *size = self.shape
        read = {
            k: fit(with_channels(self._reader.image(k), channels), size_of(*size))
            for k in self._used(ids)
        }
        return _tensor(np.stack([read[self._ids[k % len(self._ids)]] for k in ids]))

    def check(self, ids: Sequence[int]) -> None:
        """Read the images that go with samples, which may be many, and forget them.

        Raises:
            UserError: as `of`.
        """
        for k in self._used(ids):
            self._reader.image(k)

    @property
    def sha256(self) -> str:
        """Hash of all files' content, in order, which the samples depend on."""
        return self._reader.fingerprint

    def _used(self, ids: Sequence[int]) -> list[int]:
        return sorted({self._ids[k % len(self._ids)] for k in ids})


class SamplesAsInput:
    """The samples of one set, to generate those of another from: sample k goes with sample k.

    Args:
        path: of a folder that `SampleDir` wrote, finished or not.
        shape: (C, H, W) that they must have.

    Raises:
        UserError: no such set.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.samples = open_samples(path)
        self.shape = shape
        classes = self.samples.settings.get("classes")
        self.classes: tuple[int, ...] | None = None if classes is None else tuple(classes)

    def renumber_classes(self, known: ClassNames | None, null_class: int | None) -> None:
        """Number their classes as the model that upscales them does, which has names of its own.

        Args:
            known: names of that model's classes; None: it has only numbers.
            null_class: of that model, one beyond its classes; None: it has no classes.

        Raises:
            UserError: it does not have their classes.
        """
        names = self.samples.classes
        if names is None or null_class is None or self.classes is None:
            return
        numbers = match_classes(known, null_class, names, str(self.samples.directory))
        # A number beyond the names means no class.
        self.classes = tuple(
            numbers[label] if label < len(numbers) else null_class for label in self.classes
        )

    def of(self, ids: Sequence[int]) -> Tensor:
        """Return the samples of these ids: float32 `[N, C, H, W]` in [-1, 1].

        Raises:
            UserError: one is not there, or of another shape.
        """
        folder = self.samples.directory
        try:
            images = self.samples.read(ids)
        except KeyError as missing:
            raise UserError(
                f"{folder} has no sample {missing} (yet); generate it, or name those that are "
                "there by `ids`"
            ) from None
        channels, height, width = self.shape
        if images.shape[1:] != (height, width, channels):
            raise UserError(
                f"samples in {folder} are {images.shape[1]}×{images.shape[2]} with "
                f"{images.shape[3]} channels; this network upscales {height}×{width} with "
                f"{channels}"
            )
        return _tensor(images)

    def check(self, ids: Sequence[int]) -> None:
        """Read those of these samples that are there already, and forget them.

        Raises:
            UserError: one cannot be read; the message names all that cannot.
        """
        there = self.samples.ids()
        for k in ids:
            if k in there:
                self.samples.image(k)

    @property
    def sha256(self) -> str:
        """Hash of the settings that they were generated with, which determine them."""
        settings = {k: v for k, v in self.samples.settings.items() if k != "format"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_low_resolution(path: Path, shape: tuple[int, int, int]) -> SamplesAsInput | InputImages:
    """Open low-resolution images: the samples of a set, or the images in files.

    Args:
        path: folder that `SampleDir` wrote, or whatever `InputImages` takes.
        shape: (C, H, W) of the low-resolution images.

    Raises:
        UserError: as both.
    """
    manifest = read_manifest(path)
    if (path / MANIFEST).is_file() and (manifest is None or "format" in manifest):
        return SamplesAsInput(path, shape)
    return InputImages(path, shape, "low_resolution")


def read_mask(path: Path, size: Size) -> Tensor:
    """Read where an image is kept: bool `[1, 1, H, W]`, False where to paint.

    Where to paint, the mask's file is white; or opaque, if parts of it are transparent, whatever
    its colours: strokes on a layer of their own. The file is cut and resized as images are.

    Raises:
        UserError: a file that cannot be read, or a mask that leaves nothing to paint or to keep.
    """
    if not path.is_file():
        raise UserError(f"`mask` {path} is no file; give an image", "mask")
    _check_is_image(path, "mask")
    try:
        payload, extension = path.read_bytes(), extension_in(path.name)
        opacity = decode_opacity(payload, extension)
        painted = decode(payload, extension, channels=1) if opacity is None else opacity
    except (DecodeError, OSError) as error:
        raise unreadable({str(path): reason_of(error)}) from error
    known = torch.from_numpy(fit(painted, size) < 128)
    if known.all() or not known.any():
        raise UserError(
            f"`mask` {path} is {'black' if known.all() else 'white'} all over; make white what is "
            "to be painted, and black what is to stay",
            "mask",
        )
    return known.permute(2, 0, 1)[None]


def _check_is_image(path: Path, name: str) -> None:
    if extension_in(path.name) not in EXTENSIONS:
        raise UserError(f"`{name}` {path} is not an image file ({', '.join(EXTENSIONS)})", name)


def _tensor(images: np.ndarray) -> Tensor:
    """uint8 `[N, H, W, C]` → float32 `[N, C, H, W]` in [-1, 1]."""
    return PixelCodec().encode(torch.from_numpy(images).permute(0, 3, 1, 2))
