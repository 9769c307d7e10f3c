"""Images to look at: uint8 pixels, grids, and PNG and GIF files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm_engine.atomic_io import atomic_write

_SHORTEST_SIDE = 64
_GIF_COLOURS = 64
_NO_DITHER = Image.Dither.NONE


def to_levels(images: Tensor) -> Tensor:
    """Map images from [-1, 1] to 0 … 255, rounding to the nearest and clipping.

    Args:
        images: float `[B, C, H, W]`.

    Returns:
        uint8 `[B, H, W, C]`, contiguous, on the same device.
    """
    scaled = (images.detach().float() + 1) * 127.5
    levels = scaled.round().clamp(0, 255).byte()
    return levels.permute(0, 2, 3, 1).contiguous()


def to_uint8(images: Tensor) -> np.ndarray:
    """Return what `to_levels` does, in the host's memory."""
    return to_levels(images).cpu().numpy()


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1) -> Image.Image:
    """Tile images; small ones are upscaled by an integer factor, without interpolation.

    Args:
        images: uint8 `[B, H, W, C]`, C 1 or 3.
        columns: images per row; None: as square as possible.
        gap: pixels between images, before upscaling.
    """
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8
    )
    for i, image in enumerate(images):
        top = (i // columns) * (height + gap) + gap
        left = (i % columns) * (width + gap) + gap
        sheet[top : top + height, left : left + width] = image
    tiled = _to_pillow(sheet)
    factor = max(1, _SHORTEST_SIDE // min(height, width))
    return tiled.resize((tiled.width * factor, tiled.height * factor), Image.Resampling.BOX)


def class_grid(images: np.ndarray, labels: Sequence[int]) -> Image.Image:
    """Tile images with one row per class, in ascending order of classes.

    Args:
        images: uint8 `[B, H, W, C]`, C 1 or 3.
        labels: class of each image. A row with fewer images than the longest ends in white.
    """
    classes, counts = np.unique(labels, return_counts=True)
    rows = np.full((len(classes), counts.max(), *images.shape[1:]), 255, np.uint8)
    for row, label, count in zip(rows, classes, counts, strict=True):
        row[:count] = images[np.asarray(labels) == label]
    return grid(rows.reshape(-1, *images.shape[1:]), columns=rows.shape[1])


def save_png(image: Image.Image | np.ndarray, path: Path) -> None:
    """Write a PNG file, whole or not at all.

    Args:
        image: an array is uint8 `[H, W, C]`, C 1 or 3.
        path: of the PNG.
    """
    if isinstance(image, np.ndarray):
        image = _to_pillow(image)
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", optimize=True)
    with atomic_write(path) as file:
        file.write(encoded.getvalue())


def save_gif(frames: Sequence[np.ndarray], path: Path, milliseconds: int = 120) -> None:
    """Write an endless animation that pauses on its last frame, whole or not at all.

    All frames share one palette of 64 colours, so that what does not move does not flicker and
    takes no space.

    Args:
        frames: uint8 `[H, W, 3]` each, at least one.
        path: of the GIF.
        milliseconds: duration of a frame; the last one takes twelve times as long.
    """
    # A few frames have all the colours, and the palette is found in seconds.
    few = [frames[i] for i in np.linspace(0, len(frames) - 1, min(6, len(frames))).astype(int)]
    palette = Image.fromarray(np.concatenate(few)).quantize(_GIF_COLOURS, Image.Quantize.FASTOCTREE)
    first, *others = (
        Image.fromarray(frame).quantize(palette=palette, dither=_NO_DITHER) for frame in frames
    )
    durations = [milliseconds] * len(others) + [12 * milliseconds]
    encoded = io.BytesIO()
    first.save(
        encoded, format="GIF", save_all=True, append_images=others, duration=durations, loop=0,
        optimize=True,
    )  # fmt: skip
    with atomic_write(path) as file:
        file.write(encoded.getvalue())


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
