"""Grids of images with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_engine.plots.captioned import captioned_grid


def plotted(path: Path, captions: list[str], **options: Any) -> np.ndarray:
    images = np.full((4, 16, 32, 1), 128, np.uint8)
    captioned_grid(images, captions, path, **options)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def area(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(image - colour) <= 2).all(-1).sum())


WORDS = ["one", "two", "three", "four"]


def test_every_image_is_shown(tmp_path: Path) -> None:
    one_row = plotted(tmp_path / "a.png", WORDS, columns=4)
    two_rows = plotted(tmp_path / "b.png", WORDS, columns=3)
    grey = (128, 128, 128)
    assert area(one_row, grey) > 4 * 100 * 50
    assert area(two_rows, grey) > 4 * 100 * 50
    assert one_row.shape[1] > two_rows.shape[1]


def test_captions_are_shown(tmp_path: Path) -> None:
    empty = plotted(tmp_path / "a.png", [""] * 4)
    assert area(plotted(tmp_path / "b.png", WORDS), (0, 0, 0)) > area(empty, (0, 0, 0))


def test_wrong_ones_are_coloured(tmp_path: Path) -> None:
    orange = (0xD5, 0x5E, 0x00)
    wrong = np.array([False, True, False, False])
    assert area(plotted(tmp_path / "a.png", WORDS), orange) == 0
    assert area(plotted(tmp_path / "b.png", WORDS, wrong=wrong), orange) > 500


def test_captions_are_shown_as_they_are(tmp_path: Path) -> None:
    strange = ["$\\frac{1$", "a" * 500, "x^2_ & <b>", "line\nbreak " * 50]
    assert area(plotted(tmp_path / "a.png", strange), (128, 128, 128)) > 4 * 100 * 40
