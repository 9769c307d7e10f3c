"""Decode and encode image files: one table of formats, and the one resize.

Shards may come from anywhere, so an explicit table of extensions decides how to decode. None of the
formats can execute code, and dimensions are read from the header and bounded before any pixel is
decoded.

Every array is uint8 `[height, width, channels]` with 1 (grey) or 3 (RGB) channels.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]

MAX_SIDE = 8192
"""Larger images are refused unread: a small file can claim any size."""

# Extension → Pillow's name of the format, the only one that is tried, whatever the bytes.
_PILLOW_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}

EXTENSIONS = (*_PILLOW_FORMATS, "npy")
"""Extensions that can be decoded, in order of preference where a sample has several."""

_ENCODE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 6},
    # 4:4:4 at 95: chroma subsampling is visible to a Fréchet distance.
    "jpg": {"quality": 95, "subsampling": 0},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"lossless": True},
}

_EXIF_ORIENTATION = 0x0112
_TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)


class DecodeError(ValueError):
    """These bytes are not an image that may be decoded; the message says why."""


def probe(payload: bytes, extension: str) -> tuple[int, int, int]:
    """Read height, width and channels from the header, decoding nothing.

    Raises:
        DecodeError: unknown extension, unreadable header, or a side over `MAX_SIDE`.
    """
    if extension == "npy":
        return _npy_header(payload).shape
    image = _open(payload, extension)
    try:
        transposed = image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSING_ORIENTATIONS
    except Exception as error:
        raise DecodeError(f"damaged EXIF data ({error})") from error
    height, width = (image.width, image.height) if transposed else (image.height, image.width)
    return height, width, _channels(image)


def decode(payload: bytes, extension: str, channels: int | None = None) -> Pixels:
    """Decode an image to uint8 `[H, W, C]`.

    Grey images have C = 1, all others C = 3. 16-bit grey keeps its high byte. Transparent images
    are composited over white, since the colour under a transparent pixel is arbitrary. The EXIF
    orientation is applied, as viewers do.

    Args:
        payload: the file's bytes.
        extension: one of `EXTENSIONS`; npy holds uint8 `[H, W]`, `[H, W, 1]` or `[H, W, 3]`.
        channels: convert to this number, as `with_channels` does; None keeps the image's own.

    Raises:
        DecodeError: anything but a whole image of that format within `MAX_SIDE`.
    """
    if extension == "npy":
        array = _decode_npy(payload)
    else:
        image = _open(payload, extension)
        # Damaged bytes make Pillow raise OSError, SyntaxError, struct.error, zlib.error and more.
        try:
            array = _to_array(image)
        except Exception as error:
            raise DecodeError(f"damaged {extension} data ({error})") from error
    return array if channels is None else with_channels(array, channels)


def encode(array: Pixels, extension: str) -> bytes:
    """Encode uint8 `[H, W, C]`; equal arrays give equal bytes, for given library versions.

    png, npy and webp are lossless; jpg is quality 95 without chroma subsampling.

    Raises:
        ValueError: an unknown extension, or not an image array.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(f"expected uint8 [H, W, 1 or 3], got {array.dtype} {list(array.shape)}")
    stream = io.BytesIO()
    if extension == "npy":
        npy.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    elif extension in _PILLOW_FORMATS:
        options = _ENCODE_OPTIONS[extension]
        _to_pillow(array).save(stream, format=_PILLOW_FORMATS[extension], **options)
    else:
        raise ValueError(f"cannot encode {extension!r}; known: {', '.join(EXTENSIONS)}")
    return stream.getvalue()


def with_channels(array: Pixels, channels: int) -> Pixels:
    """Convert between grey and RGB: luma (ITU-R 601) one way, three equal channels the other.

    Raises:
        ValueError: `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if array.shape[2] == channels:
        return array
    if channels == 3:
        return np.repeat(array, 3, axis=2)
    return np.asarray(_to_pillow(array).convert("L"))[:, :, None]


def fit(array: Pixels, size: int) -> Pixels:
    """Cut the central square and resize it to `size` × `size`; that size is left untouched.

    While the side is at least twice `size` it is halved by averaging (BOX), then resized once with
    Pillow's BICUBIC, which widens its kernel when it shrinks. This is the procedure behind the
    published ImageNet reference statistics; a resize that aliases (bilinear in torch or OpenCV
    without antialiasing) changes a Fréchet distance by more than most papers' improvements.

    Raises:
        ValueError: `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = array[top : top + side, left : left + side]
    if side == size:
        return square
    image = _to_pillow(square)
    while image.width >= 2 * size:
        half = image.width // 2
        image = image.resize((half, half), Image.Resampling.BOX)
    return _from_pillow(image.resize((size, size), Image.Resampling.BICUBIC))


def extension_of(payload: bytes) -> str:
    """Recognise the format of an image by its first bytes.

    Raises:
        DecodeError: it is none that can be decoded.
    """
    try:
        found = Image.open(
            io.BytesIO(payload), formats=sorted(set(_PILLOW_FORMATS.values()))
        ).format
    except Exception as error:
        raise DecodeError(f"not a {', '.join(_PILLOW_FORMATS)} image") from error
    return next(name for name, known in _PILLOW_FORMATS.items() if known == found)


def _open(payload: bytes, extension: str) -> Image.Image:
    if extension not in _PILLOW_FORMATS:
        raise DecodeError(f"unknown image format {extension!r}; known: {', '.join(EXTENSIONS)}")
    if not payload:
        raise DecodeError("an image of no bytes")
    try:
        image = Image.open(io.BytesIO(payload), formats=[_PILLOW_FORMATS[extension]])
    except Exception as error:
        raise DecodeError(f"not a {extension} image ({error})") from error
    _check_sides(image.height, image.width)
    return image


def _check_sides(height: int, width: int) -> None:
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise DecodeError(f"{height}×{width} pixels: sides must be within 1 to {MAX_SIDE}")


def _channels(image: Image.Image) -> int:
    return 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3


def _to_array(image: Image.Image) -> Pixels:
    channels = _channels(image)
    ImageOps.exif_transpose(image, in_place=True)  # not in place, it copies where nothing turns
    if image.mode.startswith("I"):
        return (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)[:, :, None]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    mode = "L" if channels == 1 else "RGB"
    return _from_pillow(image if image.mode == mode else image.convert(mode))


def _to_pillow(array: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array))


def _from_pillow(image: Image.Image) -> Pixels:
    # A copy: Pillow's buffer is read-only, and torch warns about wrapping such an array.
    array = np.array(image, dtype=np.uint8)
    return array if array.ndim == 3 else array[:, :, None]


class _NpyHeader(NamedTuple):
    start: int
    """Where the array's bytes begin."""
    shape: tuple[int, int, int]
    order: Literal["C", "F"]


def _npy_header(payload: bytes) -> _NpyHeader:
    """Parse an npy header and check it against the bytes that follow."""
    # Magic, version and the length of the rest, in 2 bytes or since version 2.0 in 4.
    fixed = 10 if payload[6:7] == b"\x01" else 12
    header = _parse_npy_header(payload[: fixed + int.from_bytes(payload[8:fixed], "little")])
    height, width, channels = header.shape
    _check_sides(height, width)
    if len(payload) - header.start != height * width * channels:
        raise DecodeError(
            f"npy array of shape {list(header.shape)} needs {height * width * channels} bytes, "
            f"{len(payload) - header.start} follow"
        )
    return header


@lru_cache(maxsize=64)
def _parse_npy_header(header: bytes) -> _NpyHeader:
    """Parse a header; cached, since that takes longer than copying, and sets have few headers."""
    stream = io.BytesIO(header)
    try:
        version = npy.read_magic(stream)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[
            version
        ]
        shape, columns_first, dtype = read_header(stream)
    except Exception as error:
        raise DecodeError(f"not an npy array ({error})") from error
    if dtype != np.uint8:
        raise DecodeError(f"npy array of {dtype}: images must be uint8")
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise DecodeError(f"npy array of shape {list(shape)}: must be [H, W], [H, W, 1 or 3]")
    return _NpyHeader(stream.tell(), shape, "F" if columns_first else "C")


def _decode_npy(payload: bytes) -> Pixels:
    start, shape, order = _npy_header(payload)
    pixels = np.frombuffer(payload, np.uint8, offset=start).reshape(shape, order=order)
    return np.array(pixels, order="C")
