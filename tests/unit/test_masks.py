"""Masks as image editors save them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_engine.errors import UserError
from ddpm_engine.generation.input_images import read_mask

SIZE = 8
PAINTED = np.zeros((SIZE, SIZE), bool)
PAINTED[:, 2:4] = True


def strokes(mode: str, stroke: tuple[int, ...], rest: tuple[int, ...]) -> Image.Image:
    image = Image.new(mode, (SIZE, SIZE), rest)
    image.paste(stroke, (2, 0, 4, SIZE))
    return image


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    "image",
    [
        strokes("RGBA", (*WHITE, 255), (*WHITE, 0)),
        strokes("RGBA", (*WHITE, 255), (*BLACK, 0)),
        strokes("RGBA", (*BLACK, 255), (*WHITE, 0)),
        strokes("RGBA", (200, 30, 30, 200), (*BLACK, 20)),
        strokes("LA", (255, 255), (255, 0)),
        strokes("RGBA", (*WHITE, 255), (*WHITE, 0)).quantize(4, Image.Quantize.FASTOCTREE),
    ],
    ids=["white", "on black", "black", "half", "grey", "palette"],
)
@pytest.mark.parametrize("extension", ["png", "webp"])
def test_strokes_on_transparency_are_where_to_paint(
    image: Image.Image, extension: str, tmp_path: Path
) -> None:
    path = tmp_path / f"mask.{extension}"
    (image if extension == "png" else image.convert("RGBA")).save(path, lossless=True)
    assert np.array_equal(~read_mask(path, SIZE)[0, 0].numpy(), PAINTED)


@pytest.mark.parametrize(
    "image",
    [
        strokes("L", (255,), (0,)),
        strokes("RGB", WHITE, BLACK),
        strokes("RGBA", (*WHITE, 255), (*BLACK, 255)),
        strokes("L", (255,), (0,)).convert("1"),
        Image.fromarray(PAINTED.astype(np.uint16) * 65535),
    ],
    ids=["L", "RGB", "opaque", "1", "16 bits"],
)
def test_white_is_where_to_paint_in_an_opaque_mask(image: Image.Image, tmp_path: Path) -> None:
    image.save(tmp_path / "mask.png")
    assert np.array_equal(~read_mask(tmp_path / "mask.png", SIZE)[0, 0].numpy(), PAINTED)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mask.png", b"GIF89a", "cannot read image .*mask.png: .*a GIF"),
        ("mask.gif", b"GIF89a", "is not an image file"),
        ("mask.png", None, "is no file"),
    ],
)
def test_a_mask_that_cannot_be_read_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_mask(tmp_path / name, SIZE)
