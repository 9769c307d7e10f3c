"""Images from files to begin with or to fill in, and masks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.data.images import EXTENSIONS, DecodeError, decode, fit
from ddpm_engine.errors import UserError


class ReferenceImages:
    """An image file, or the image files of a folder in the order of their names.

    Picture k goes with file k, and again from the first after the last. Each is cut to its central
    square and resized to the network's size, in its channels.

    Args:
        path: of the file or folder; png, jpg, webp or npy.
        shape: (C, H, W) of the network.
        flag: that named them, for messages.

    Raises:
        UserError: nothing there, or no images.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], flag: str = "--images") -> None:
        if not path.exists():
            raise UserError(f"there is no {flag} {path}; give an image file or a folder of them")
        candidates = sorted(path.iterdir()) if path.is_dir() else [path]
        self.files = [file for file in candidates if _extension(file) in EXTENSIONS]
        if not self.files:
            raise UserError(f"{flag} {path} holds no images ({', '.join(EXTENSIONS)})")
        self.shape = shape

    def of(self, ids: Sequence[int]) -> Tensor:
        """The images that go with pictures: float32 `[N, C, H, W]` in [-1, 1].

        Raises:
            UserError: a file that cannot be read.
        """
        channels, size, _ = self.shape
        files = [self.files[k % len(self.files)] for k in ids]
        read = {file: _read(file, size, channels) for file in sorted(set(files))}
        levels = torch.from_numpy(np.stack([read[file] for file in files]))
        return levels.permute(0, 3, 1, 2).float() / 127.5 - 1

    @property
    def sha256(self) -> str:
        """Of all files' content, in order: what the pictures depend on."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()


def read_mask(path: Path, size: int) -> Tensor:
    """Where a picture is known: bool `[1, 1, size, size]`, True where the mask's file is dark.

    The file is cut and resized as images are; white is where to paint, as in other software.

    Raises:
        UserError: a file that cannot be read, or a mask that leaves nothing to paint or to keep.
    """
    if not path.is_file() or _extension(path) not in EXTENSIONS:
        raise UserError(f"--mask {path} is not an image file ({', '.join(EXTENSIONS)})")
    known = torch.from_numpy(_read(path, size, channels=1) < 128)
    if known.all() or not known.any():
        raise UserError(
            f"--mask {path} is {'black' if known.all() else 'white'} all over; make white what is "
            "to be painted, and black what is to stay"
        )
    return known.permute(2, 0, 1)[None]


def _read(file: Path, size: int, channels: int) -> np.ndarray:
    try:
        return fit(decode(file.read_bytes(), _extension(file), channels), size)
    except (DecodeError, OSError) as error:
        raise UserError(f"cannot read image {file}: {error}; repair or remove it") from error


def _extension(file: Path) -> str:
    return file.suffix[1:].lower()
