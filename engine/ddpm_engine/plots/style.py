"""Shared by all figures: colours, sizes, and writing to files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ddpm_engine.images.grid import save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
"""Resolution of still figures, in pixels per inch."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, distinguishable with any kind of colour blindness."""
MARKS = ("o", "s", "^", "D", "v", "P", "X")
"""One marker per colour, for figures printed in grey."""
SCALE = "viridis"
"""For values on a scale: its lightness rises with them."""

_SETTINGS: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "figure.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


@contextmanager
def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, dpi: int = DPI
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Yield an empty figure, and apply the style within the block.

    Args:
        width: in inches.
        height: likewise.
        rows: of axes.
        columns: of axes.
        dpi: pixels per inch.

    Yields:
        The figure, and its axes as an array of objects `[rows, columns]`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        # Not pyplot, which holds figures and may look for a display.
        figure = Figure(figsize=(width, height), layout="constrained", dpi=dpi)
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False)


@contextmanager
def saved(
    path: Path, width: float, height: float, rows: int = 1, columns: int = 1, palette: bool = False
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Yield a `canvas` and write it atomically as a PNG when the block ends.

    Args:
        path: of the PNG.
        width: in inches.
        height: in inches.
        rows: of axes.
        columns: of axes.
        palette: write 256 colours, which makes a figure of many marks a third as large. Not for
            photographs.

    Yields:
        The figure, and its axes as an array of objects `[rows, columns]`.

    Raises:
        OSError: as the operating system reports it.
    """
    with canvas(width, height, rows, columns) as (figure, axes):
        yield figure, axes
        image = Image.fromarray(pixels_of(figure))
    save_png(image.quantize(256, Image.Quantize.FASTOCTREE) if palette else image, path)


def pixels_of(figure: Figure) -> np.ndarray:
    """Render a figure to uint8 `[H, W, 3]`, for example as a frame of an animation."""
    figure.canvas.draw()
    rendered = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    return rendered[..., :3].copy()


def show_image(axes: Axes, image: np.ndarray) -> None:
    """Show uint8 `[H, W]` or `[H, W, C]`, pixel by pixel, without ticks."""
    axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    without_ticks(axes)


def without_ticks(axes: Axes) -> None:
    """Leave only the frame, thin and whole."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.5)
