"""Pictures for people: grids of samples and the plots of the process."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm_engine.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHORTEST_SIDE = 64


def to_uint8(images: Tensor) -> np.ndarray:
    """Map images from [-1, 1] to 0 … 255, rounding to the nearest and clipping.

    Args:
        images: float `[B, C, H, W]`.

    Returns:
        uint8 `[B, H, W, C]`.
    """
    scaled = (images.detach().float() + 1) * 127.5
    levels = scaled.round().clamp(0, 255).byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1) -> Image.Image:
    """Tile pictures, small ones enlarged pixel by pixel so that they can be seen.

    Args:
        images: uint8 `[B, H, W, C]`, C 1 or 3.
        columns: pictures a row; None: as square as it gets.
        gap: pixels between pictures, before enlarging.
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
    picture = Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
    factor = max(1, _SHORTEST_SIDE // min(height, width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BOX)


def class_grid(images: np.ndarray, labels: Sequence[int]) -> Image.Image:
    """Tile pictures with one row a class, in ascending order of classes.

    Args:
        images: uint8 `[B, H, W, C]`, C 1 or 3.
        labels: the class of each. A row with fewer pictures than the longest ends in white.
    """
    classes, counts = np.unique(labels, return_counts=True)
    rows = np.full((len(classes), counts.max(), *images.shape[1:]), 255, np.uint8)
    for row, label, count in zip(rows, classes, counts, strict=True):
        row[:count] = images[np.asarray(labels) == label]
    return grid(rows.reshape(-1, *images.shape[1:]), columns=rows.shape[1])


def save_png(picture: Image.Image | np.ndarray, path: Path) -> None:
    """Write a picture, whole or not at all; arrays are uint8 `[H, W, C]`."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    with atomic_write(path) as file:
        file.write(encoded.getvalue())


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot, which holds global state and may look for a display.
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save_figure(figure: Figure, path: Path) -> None:
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    with atomic_write(path) as file:
        file.write(encoded.getvalue())


def _show(axes: object, image: np.ndarray) -> None:
    axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)  # type: ignore[attr-defined]
    axes.set_xticks([])  # type: ignore[attr-defined]
    axes.set_yticks([])  # type: ignore[attr-defined]


def strip(
    rows: Sequence[tuple[str, np.ndarray]], titles: Sequence[str], caption: str, path: Path
) -> None:
    """Write labelled rows of pictures side by side.

    Args:
        rows: a label and uint8 `[N, H, W, C]` each.
        titles: N titles above the columns.
        caption: above the whole.
        path: of the PNG.
    """
    figure, axes = _figure(0.95 * len(titles) + 0.9, 1.05 * len(rows) + 0.7, len(rows), len(titles))
    for row, (label, images) in enumerate(rows):
        axes[row, 0].set_ylabel(label)
        for column, image in enumerate(images):
            _show(axes[row, column], image)
    for column, title in enumerate(titles):
        axes[0, column].set_title(title, fontsize=9)
    figure.suptitle(caption, fontsize=11)
    _save_figure(figure, path)


def side_by_side(left: np.ndarray, right: np.ndarray, titles: tuple[str, str], path: Path) -> None:
    """Write two grids next to each other; both uint8 `[B, H, W, C]`."""
    figure, axes = _figure(10, 5.3, 1, 2)
    for column, images in enumerate((left, right)):
        picture = np.asarray(grid(images))
        _show(axes[0, column], picture[..., None] if picture.ndim == 2 else picture)
        axes[0, column].set_title(titles[column])
    _save_figure(figure, path)


def loss_curve(steps: Sequence[int], losses: Sequence[float], path: Path) -> None:
    """Plot the training loss, on logarithmic axes."""
    figure, axes = _figure(6.4, 3.6, 1, 1)
    axes[0, 0].plot(steps, losses, linewidth=1.2)
    axes[0, 0].set(xscale="log", yscale="log", xlabel="optimizer step", ylabel="loss")
    axes[0, 0].grid(alpha=0.3, which="both")
    _save_figure(figure, path)
