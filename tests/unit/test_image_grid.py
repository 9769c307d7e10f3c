"""From tensors to images, grids of images, and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.images.grid import class_grid, grid, save_png, to_uint8


def test_levels_round_clip_and_channels_go_last() -> None:
    levels = torch.arange(256)
    exact = (levels / 127.5 - 1).reshape(1, 1, 16, 16)
    assert to_uint8(exact).ravel().tolist() == levels.tolist()
    near = exact + 0.49 / 127.5
    assert to_uint8(near).ravel()[:-1].tolist() == levels[:-1].tolist()
    assert to_uint8(torch.tensor([[[[-9.0, 9.0]]]])).ravel().tolist() == [0, 255]
    images = torch.zeros(2, 3, 4, 5)
    images[1, 2] = 1
    channels_last = to_uint8(images)
    assert channels_last.shape == (2, 4, 5, 3)
    assert channels_last[1, 0, 0].tolist() == [128, 128, 255]


def test_a_grid_holds_every_image_in_reading_order() -> None:
    images = np.stack([np.full((64, 64, 1), 10 * i, np.uint8) for i in range(5)])
    sheet = np.asarray(grid(images, columns=3, gap=2))
    assert sheet.shape == (2 * 66 + 2, 3 * 66 + 2)
    levels = [int(sheet[2 + 66 * (i // 3) + 5, 2 + 66 * (i % 3) + 5]) for i in range(6)]
    assert levels == [0, 10, 20, 30, 40, 255]


def test_low_resolution_images_are_scaled_pixel_by_pixel() -> None:
    image = np.array([[0, 100], [200, 50]], np.uint8)[None, :, :, None]
    sheet = np.asarray(grid(image, gap=0))
    assert sheet.shape == (64, 64)
    assert set(np.unique(sheet).tolist()) == {0, 50, 100, 200}


def test_png_round_trip(tmp_path: Path) -> None:
    for channels in (1, 3):
        image = np.arange(16 * channels, dtype=np.uint8).reshape(4, 4, channels)
        save_png(image, tmp_path / "x.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), image.squeeze())
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.png"]


def test_a_class_grid_has_a_row_for_each_class() -> None:
    images = np.stack([np.full((64, 64, 1), 10 * i, np.uint8) for i in range(5)])
    sheet = np.asarray(class_grid(images, [7, 2, 7, 2, 7]))
    assert sheet.shape == (2 * 65 + 1, 3 * 65 + 1)
    levels = [
        [int(sheet[65 * row + 9, 65 * column + 9]) for column in range(3)] for row in range(2)
    ]
    assert levels == [[10, 30, 255], [0, 20, 40]]


def test_every_pixel_value_survives_encoding_and_decoding() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    encoded = PixelCodec().encode(images)
    assert encoded.aminmax() == PixelCodec.clip_range
    decoded = PixelCodec().decode(encoded)
    assert np.array_equal(decoded[0, :, :, 0], images[0, 0])
