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
    decode_opacity,
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


@pytest.mark.parametrize("named", ["png", "jpg", "jpeg", "webp", "npy"])
def test_the_content_decides_not_the_extension(named: str) -> None:
    array = random_image()
    for actual in ("png", "webp", "npy"):
        payload = encode(array, actual)
        assert extension_of(payload) == actual
        assert np.array_equal(decode(payload, named), array)
        assert probe(payload, named) == array.shape
    assert decode(encode(array, "jpg"), named).shape == array.shape


def test_what_is_no_image_is_named_as_what_it_is() -> None:
    with pytest.raises(DecodeError, match=r"unknown image format 'pyd'"):
        decode(b"cos\nsystem\n", "pyd")
    for payload, named in (
        (b"GIF89a" + bytes(20), "a GIF"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\0\0\0\x20ftypavif", "AVIF"),
        (b"hello", r"npy\)$"),
    ):
        with pytest.raises(DecodeError, match=f"not an image .*{named}"):
            extension_of(payload)
        with pytest.raises(DecodeError, match=f"not an image .*{named}"):
            decode(payload, "png")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "npy"])
def test_damaged_bytes_are_an_error_whatever_the_library_raises(extension: str) -> None:
    payload = encode(random_image(40, 40), extension)
    for damaged in (b"", payload[:10], payload[: len(payload) // 2]):
        with pytest.raises(DecodeError) as caught:
            decode(damaged, extension)
        assert "object at 0x" not in str(caught.value)


def chunk(name: bytes, content: bytes, damage: int = 0) -> bytes:
    checksum = zlib.crc32(name + content) ^ damage
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


BAD_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12"
BOMB = zlib.compress(bytes(8 << 20))


@pytest.mark.parametrize("damage", [0, 1], ids=["sound checksum", "wrong checksum"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        (b"eXIf", b"no TIFF"), (b"eXIf", BAD_EXIF), (b"eXIf", b""), (b"iCCP", b"x\0\0garbage"),
        (b"iCCP", b"x\0\0" + BOMB), (b"tEXt", b""), (b"zTXt", b"x\0\0" + BOMB),
        (b"iTXt", b"x\0\1\0\0\0" + BOMB), (b"tEXt", b"Raw profile type exif\0zz"), (b"pHYs", b""),
        (b"cHRM", b"1"), (b"gAMA", b""), (b"acTL", b"1"),
    ],
)  # fmt: skip
def test_metadata_of_a_png_never_stop_its_pixels(name: bytes, content: bytes, damage: int) -> None:
    array = random_image()
    payload = encode(array, "png")
    after_header = 8 + 12 + 13
    spoilt = payload[:after_header] + chunk(name, content, damage) + payload[after_header:]
    assert np.array_equal(decode(spoilt, "png"), array)
    assert probe(spoilt, "png") == array.shape


@pytest.mark.parametrize("content", [b"", b"no TIFF", BAD_EXIF, bytes(60000)])
def test_metadata_of_other_formats_never_stop_their_pixels(content: bytes) -> None:
    array = random_image(channels=3)
    payload = encode(array, "jpg")
    for marker, start in ((0xE1, b""), (0xE2, b"ICC_PROFILE\0"), (0xE0, b"JFIF"), (0xED, b"Photo"),
                          (0xE2, b"MPF\0"), (0xEE, b"Adobe"), (0xFE, b"")):  # fmt: skip
        spoilt = payload[:2] + segment(marker, start + content) + payload[2:]
        assert decode(spoilt, "jpg").shape == probe(spoilt, "jpg") == array.shape
    spoilt = saved(Image.fromarray(array), "WEBP", lossless=True, exif=content, xmp=content)
    assert np.array_equal(decode(spoilt, "webp"), array)


def test_a_sound_orientation_survives_other_metadata_that_do_not() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = saved(Image.new("L", (16, 8)), "PNG", exif=exif)
    spoilt = upright[:33] + chunk(b"tEXt", b"x", damage=1) + upright[33:]
    assert probe(spoilt, "png") == decode(spoilt, "png").shape == (16, 8, 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_opacity_is_told_from_colours(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    image.putpixel((1, 0), (255, 255, 255, 255))
    payload = saved(image.convert("P" if mode == "P" else mode), "PNG" if mode != "PA" else "WEBP")
    opacity = decode_opacity(payload, "png")
    assert opacity is not None
    assert opacity.tolist() == [[[0], [255]]]
    assert decode_opacity(encode(random_image(), "png"), "png") is None
    assert decode_opacity(encode(random_image(), "npy"), "npy") is None
    assert decode_opacity(saved(Image.new("RGBA", (2, 2), (1, 2, 3, 255)), "PNG"), "png") is None


def test_huge_images_are_refused_by_their_header() -> None:
    header = struct.pack(">IIBBBBB", MAX_SIDE + 1, 1, 8, 2, 0, 0, 0)
    payload = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
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


def test_fit_cuts_to_the_proportions_of_height_and_width() -> None:
    array = random_image(8, 12)
    assert np.array_equal(fit(array, (8, 12)), array)
    assert np.array_equal(fit(array, (4, 12)), array[2:6])
    assert np.array_equal(fit(array, (8, 3)), array[:, 4:7])
    assert np.array_equal(fit(array, (6, 6)), fit(array, 6))
    halves = array[:, 2:10].astype(int).reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(fit(array, (4, 4)) - halves).max() <= 1
    for size in ((1, 9), (9, 1), (3, 50), (50, 3)):
        assert fit(array, size).shape == (*size, 3)
