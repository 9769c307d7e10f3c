"""Images with their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.plots.style import COLOURS, saved, show_image

_WIDTH = 1.5
_LETTERS = 22
_LINE = 0.14
_MOST_LINES = 4


def captioned_grid(
    images: NDArray[np.uint8],
    captions: Sequence[str],
    path: Path,
    columns: int = 6,
    wrong: NDArray[np.bool_] | None = None,
    title: str | None = None,
) -> None:
    """Write a grid of images, each below its caption, as a PNG.

    Args:
        images: uint8 `[N, H, W, C]`, N > 0.
        captions: N; long ones are wrapped, and cut after four lines.
        path: of the PNG.
        columns: images in a row.
        wrong: bool `[N]`, images whose captions and frames are coloured; None: none.
        title: above the whole.
    """
    count, height, width = images.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    wrapped = [_wrapped(caption) for caption in captions]
    lines = max(text.count("\n") + 1 for text in wrapped)
    tall = _WIDTH * height / width + _LINE * (lines + 1)
    above = 0.0 if title is None else 0.4
    with saved(path, _WIDTH * columns, tall * rows + above, rows, columns) as (figure, axes):
        for place, axis in enumerate(axes.flat):
            if place >= count:
                axis.set_axis_off()
                continue
            show_image(axis, images[place])
            marked = wrong is not None and bool(wrong[place])
            # Text as it is: a caption may hold a dollar, which would begin a formula.
            axis.set_title(
                wrapped[place], fontsize=9, color=COLOURS[1] if marked else "black",
                parse_math=False,
            )  # fmt: skip
            if marked:
                for spine in axis.spines.values():
                    spine.set(color=COLOURS[1], linewidth=2)
        if title is not None:
            figure.suptitle(title)


def _wrapped(caption: str) -> str:
    lines = textwrap.wrap(
        caption, _LETTERS, max_lines=_MOST_LINES, placeholder=" …", break_on_hyphens=False
    )
    return "\n".join(lines)
