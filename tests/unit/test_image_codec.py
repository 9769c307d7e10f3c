from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_engine.images.codec import (
    MAX_SIDE,
    DecodeError,
    decode,
    encode,
    extension_of,
    fit,
    probe,
    with_channels,
)


def random_image(height: int = 5, width: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("extension", ["png", "webp", "npy"])
def test_lossless_formats_return_the_same_pixels(extension: str, channels: int) -> None:
    array = random_image(channels=channels)
    payload = encode(array, extension)
    assert np.array_equal(decode(payload, extension, channels), array)
    assert payload == encode(array.copy(), extension)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_returns_nearly_the_same_pixels(channels: int) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8).reshape(1, 64, 1)
    array = np.broadcast_to(ramp, (32, 64, channels)).copy()
    decoded = decode(encode(array, "jpg"), "jpeg")
    assert decoded.shape == array.shape
    assert np.abs(decoded.astype(int) - array).max() <= 4


@pytest.mark.parametrize("extension", ["png", "jpg", "npy"])
def test_probe_agrees_with_decoding(extension: str) -> None:
    payload = encode(random_image(), extension)
    assert probe(payload, extension) == decode(payload, extension).shape == (5, 7, 3)


def test_channels_are_converted_on_request() -> None:
    grey, colour = random_image(channels=1), random_image(channels=3)
    assert np.array_equal(with_channels(grey, 3), np.concatenate([grey] * 3, axis=2))
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(with_channels(colour, 1)[..., 0] - luma).max() <= 0.51
    assert np.array_equal(with_channels(with_channels(grey, 3), 1), grey)
    with pytest.raises(ValueError, match="not 2"):
        with_channels(grey, 2)


def test_transparency_is_composited_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    decoded = decode(saved(image, "PNG"), "png")
    assert decoded.tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_palettes_are_colour_and_deep_grey_keeps_its_high_byte() -> None:
    palette = Image.fromarray(random_image()).quantize(8)
    assert decode(saved(palette, "PNG"), "png").shape == (5, 7, 3)
    deep = Image.fromarray(np.array([[0x12FF, 0xAB00]], dtype=np.uint16))
    assert decode(saved(deep, "PNG"), "png").tolist() == [[[0x12], [0xAB]]]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: rotate by 90° clockwise to view.
    image = Image.new("L", (16, 8))
    payload = saved(image, "JPEG", exif=exif)
    assert probe(payload, "jpg") == decode(payload, "jpg").shape == (16, 8, 1)


def test_the_extension_decides_not_the_content() -> None:
    with pytest.raises(DecodeError, match="not a jpg image"):
        decode(encode(random_image(), "png"), "jpg")
    with pytest.raises(DecodeError, match=r"unknown image format 'pyd'"):
        decode(b"cos\nsystem\n", "pyd")
    assert extension_of(encode(random_image(), "webp")) == "webp"
    with pytest.raises(DecodeError):
        extension_of(b"GIF89a" + bytes(20))


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "npy"])
def test_damaged_bytes_are_an_error_whatever_the_library_raises(extension: str) -> None:
    payload = encode(random_image(40, 40), extension)
    for damaged in (b"", payload[:10], payload[: len(payload) // 2]):
        with pytest.raises(DecodeError):
            decode(damaged, extension)


def test_huge_images_are_refused_by_their_header() -> None:
    header = struct.pack(">IIBBBBB", MAX_SIDE + 1, 1, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    payload = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    payload += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT" + bytes(4)
    with pytest.raises(DecodeError, match=str(MAX_SIDE)):
        decode(payload, "png")
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 20, 3)}
    )
    with pytest.raises(DecodeError, match=str(MAX_SIDE)):
        decode(array.getvalue(), "npy")


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def test_npy_that_is_no_image_is_refused() -> None:
    pickled = np.array([[{"a": 1}]], dtype=object)
    kinds = (np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8))
    for array in (*kinds, pickled):
        with pytest.raises(DecodeError, match="npy array"):
            decode(npy(array), "npy")


def test_npy_may_be_grey_without_channels_and_in_column_order() -> None:
    array = random_image(channels=1)[..., 0]
    assert np.array_equal(decode(npy(np.asfortranarray(array)), "npy"), array[..., None])


def test_fit_crops_the_centre_and_resizes_without_aliasing() -> None:
    array = random_image(8, 12)
    assert np.array_equal(fit(array, 8), array[:, 2:10])
    flat = np.full((100, 70, 3), 77, np.uint8)
    assert np.array_equal(fit(flat, 16), np.full((16, 16, 3), 77, np.uint8))
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255  # Twice the finest frequency of the result: must average to grey.
    assert np.abs(fit(stripes, 16).astype(int) - 127).max() <= 2
    assert fit(random_image(4, 4), 9).shape == (9, 9, 3)
