"""Labelled rows of images, as PNG and as GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_engine.images.grid import grid, save_gif
from ddpm_engine.plots.style import canvas, pixels_of, saved, show_image

Rows = Sequence[tuple[str, np.ndarray]]
"""Pairs of a label and images, uint8 `[N, H, W, C]`, with the same N in each row."""


def strip(rows: Rows, titles: Sequence[str], caption: str, path: Path) -> None:
    """Write labelled rows of images as a PNG.

    Args:
        rows: from top to bottom.
        titles: N titles above the columns.
        caption: above the whole.
        path: of the PNG.
    """
    width, height = 0.95 * len(titles) + 0.9, 1.02 * len(rows) + 0.62
    with saved(path, width, height, len(rows), len(titles)) as (figure, axes):
        _fill(axes, rows)
        for column, title in enumerate(titles):
            axes[0, column].set_title(title, fontsize=9)
        figure.suptitle(caption)


def moving_strip(
    frames: Sequence[Rows], titles: Sequence[str], path: Path, milliseconds: int = 120
) -> None:
    """Write changing rows of images as a GIF that holds on the last frame.

    Args:
        frames: the rows at each moment, with the same labels and shapes.
        titles: above each.
        path: of the GIF.
        milliseconds: duration of a frame.
    """
    rows = frames[0]
    count = len(rows[0][1])
    width, height = 0.8 * count + 0.4, 0.8 * len(rows) + 0.4
    rendered = []
    with canvas(width, height, len(rows), count, dpi=90) as (figure, axes):
        _fill(axes, rows)
        for rows, title in zip(frames, titles, strict=True):
            for row, (_, images) in enumerate(rows):
                for column, image in enumerate(images):
                    axes[row, column].images[0].set_data(image.squeeze())
            figure.suptitle(title)
            rendered.append(pixels_of(figure))
    save_gif(rendered, path, milliseconds)


def side_by_side(left: np.ndarray, right: np.ndarray, titles: tuple[str, str], path: Path) -> None:
    """Write two grids next to each other; both uint8 `[B, H, W, C]`."""
    with saved(path, 8, 4.3, 1, 2) as (_, axes):
        for column, images in enumerate((left, right)):
            show_image(axes[0, column], np.asarray(grid(images)))
            axes[0, column].set_title(titles[column])


def _fill(axes: np.ndarray, rows: Rows) -> None:
    for row, (label, images) in enumerate(rows):
        axes[row, 0].set_ylabel(label)
        for column, image in enumerate(images):
            show_image(axes[row, column], image)
