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
from ddpm_engine.generation.sample_reader import open_samples
from ddpm_engine.images.codec import EXTENSIONS, DecodeError, decode, fit
from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.locations import check_local


class InputImages:
    """An image file, or the image files of a folder in the order of their names.

    Sample k goes with file k, and again from the first after the last. Each is cut to its central
    square and resized to the network's size, in its channels.

    Args:
        path: of the file or folder; png, jpg, webp or npy.
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
        candidates = sorted(path.iterdir()) if path.is_dir() else [path]
        self.files = [file for file in candidates if _extension(file) in EXTENSIONS]
        if not self.files:
            raise UserError(f"`{name}` {path} holds no images ({', '.join(EXTENSIONS)})", name)
        self.shape = shape

    def of(self, ids: Sequence[int]) -> Tensor:
        """Return the images that go with samples: float32 `[N, C, H, W]` in [-1, 1].

        Raises:
            UserError: a file that cannot be read.
        """
        channels, size, _ = self.shape
        files = [self.files[k % len(self.files)] for k in ids]
        read = {file: _read(file, size, channels) for file in sorted(set(files))}
        return _tensor(np.stack([read[file] for file in files]))

    @property
    def sha256(self) -> str:
        """Hash of all files' content, in order, which the samples depend on."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()


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
        except (DecodeError, OSError) as error:
            raise UserError(f"cannot read samples in {folder}: {error}") from error
        channels, height, width = self.shape
        if images.shape[1:] != (height, width, channels):
            raise UserError(
                f"samples in {folder} are {images.shape[1]}×{images.shape[2]} with "
                f"{images.shape[3]} channels; this network upscales {height}×{width} with "
                f"{channels}"
            )
        return _tensor(images)

    @property
    def sha256(self) -> str:
        """Hash of the settings that they were generated with, which determine them."""
        settings = {k: v for k, v in self.samples.settings.items() if k != "format"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_low_resolution(path: Path, shape: tuple[int, int, int]) -> SamplesAsInput | InputImages:
    """Open low-resolution images: the samples of a set, or the images in files.

    Args:
        path: folder that `SampleDir` wrote, or whatever `InputImages` takes.
        shape: (C, side, side) of the low-resolution images.

    Raises:
        UserError: as both.
    """
    if (path / MANIFEST).is_file():
        return SamplesAsInput(path, shape)
    return InputImages(path, shape, "low_resolution")


def read_mask(path: Path, size: int) -> Tensor:
    """Read where an image is kept: bool `[1, 1, size, size]`, True where the mask's file is dark.

    The file is cut and resized as images are; white is where to paint, as in other software.

    Raises:
        UserError: a file that cannot be read, or a mask that leaves nothing to paint or to keep.
    """
    if not path.is_file() or _extension(path) not in EXTENSIONS:
        raise UserError(f"`mask` {path} is not an image file ({', '.join(EXTENSIONS)})", "mask")
    known = torch.from_numpy(_read(path, size, channels=1) < 128)
    if known.all() or not known.any():
        raise UserError(
            f"`mask` {path} is {'black' if known.all() else 'white'} all over; make white what is "
            "to be painted, and black what is to stay",
            "mask",
        )
    return known.permute(2, 0, 1)[None]


def _tensor(images: np.ndarray) -> Tensor:
    """uint8 `[N, H, W, C]` → float32 `[N, C, H, W]` in [-1, 1]."""
    return PixelCodec().encode(torch.from_numpy(images).permute(0, 3, 1, 2))


def _read(file: Path, size: int, channels: int) -> np.ndarray:
    try:
        return fit(decode(file.read_bytes(), _extension(file), channels), size)
    except (DecodeError, OSError) as error:
        raise UserError(f"cannot read image {file}: {error}; repair or move it") from error


def _extension(file: Path) -> str:
    return file.suffix[1:].lower()
