"""Decode and encode image files: one table of formats, and the one resize.

Images may come from anywhere, so an explicit table of formats decides what is decoded at all. None
of them can execute code, and dimensions are read from the header and bounded before any pixel is
decoded. The first bytes decide which of them an image has: extensions are often wrong. Metadata
never decides whether the pixels can be read.

Every array is uint8 `[height, width, channels]` with 1 (grey) or 3 (RGB) channels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ddpm_engine.images.metadata import without_metadata
from ddpm_engine.sizes import Size, height_and_width

Pixels = NDArray[np.uint8]

T = TypeVar("T")

MAX_SIDE = 8192
"""Larger images are refused unread: a small file can claim any size."""

# Extension → Pillow's name of the format. No other format is tried, whatever the bytes.
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

_SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8\xff", "npy": b"\x93NUMPY"}
_FOREIGN = {
    b"GIF8": "a GIF", b"BM": "a BMP", b"II*\0": "a TIFF", b"MM\0*": "a TIFF",
    b"version https://git-lfs": "a placeholder of Git LFS", b"<": "a page of HTML or an SVG",
}  # fmt: skip

_EXIF_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """These bytes are not an image that may be decoded; the message says why."""


def probe(payload: bytes, extension: str) -> tuple[int, int, int]:
    """Read height, width and channels from the header, decoding nothing.

    Raises:
        DecodeError: unknown extension, unreadable header, or a side over `MAX_SIDE`.
    """
    if _format_of(payload, extension) == "npy":
        return _npy_header(payload).shape
    return _read(payload, _shape)


def decode(payload: bytes, extension: str, channels: int | None = None) -> Pixels:
    """Decode an image to uint8 `[H, W, C]`.

    Grey images have C = 1, all others C = 3. 16-bit grey keeps its high byte. Transparent images
    are composited over white, since the colour under a transparent pixel is arbitrary. The EXIF
    orientation is applied, as viewers do, where it can be read. Of animations, the first frame
    counts. Colour profiles are not applied.

    Args:
        payload: the file's bytes.
        extension: one of `EXTENSIONS`. The bytes may be of another of these formats, and are
            decoded as what they are; npy holds uint8 `[H, W]`, `[H, W, 1]` or `[H, W, 3]`.
        channels: convert to this number, as `with_channels` does; None keeps the image's own.

    Raises:
        DecodeError: anything but a whole image of a known format within `MAX_SIDE`.
    """
    if _format_of(payload, extension) == "npy":
        array = _decode_npy(payload)
    else:
        array = _read(payload, _to_array)
    return array if channels is None else with_channels(array, channels)


def decode_opacity(payload: bytes, extension: str) -> Pixels | None:
    """Decode how opaque an image is: uint8 `[H, W, 1]`, 0 transparent, 255 opaque.

    Args:
        payload: the file's bytes.
        extension: as `decode` takes it.

    Returns:
        None where it is the same everywhere, or the format has none.

    Raises:
        DecodeError: as `decode`.
    """
    if _format_of(payload, extension) == "npy":
        return None
    opacity = _read(payload, _opacity)
    return opacity if np.ptp(opacity) else None


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


def fit(array: Pixels, size: Size) -> Pixels:
    """Cut the central part of a size's proportions and resize it; that size is left untouched.

    While both sides are at least twice the size they are halved by averaging (BOX), then resized
    once with Pillow's BICUBIC, which widens its kernel when it shrinks. This is the procedure
    behind the published ImageNet reference statistics; a resize that aliases (bilinear in torch or
    OpenCV without antialiasing) changes a Fréchet distance by more than most papers' improvements.

    Raises:
        ValueError: `size` is not positive.
    """
    rows, columns = height_and_width(size)
    if rows < 1 or columns < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    height, width = array.shape[:2]
    # The largest part of the proportions rows : columns.
    kept_height = min(height, max(1, (2 * width * rows + columns) // (2 * columns)))
    kept_width = min(width, max(1, (2 * height * columns + rows) // (2 * rows)))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    kept = array[top : top + kept_height, left : left + kept_width]
    if kept.shape[:2] == (rows, columns):
        return kept
    image = _to_pillow(kept)
    while image.height >= 2 * rows and image.width >= 2 * columns:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return _from_pillow(image.resize((columns, rows), Image.Resampling.BICUBIC))


def extension_of(payload: bytes) -> str:
    """Recognise the format of an image by its first bytes.

    Raises:
        DecodeError: it is none that can be decoded.
    """
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "webp"
    for extension, signature in _SIGNATURES.items():
        if payload.startswith(signature):
            return extension
    if not payload:
        raise DecodeError("an image of no bytes")
    foreign = next((name for start, name in _FOREIGN.items() if payload.startswith(start)), None)
    if payload[4:8] == b"ftyp":
        foreign = "an AVIF, HEIC or a video"
    but = "" if foreign is None else f", but {foreign}"
    raise DecodeError(f"not an image ({', '.join(EXTENSIONS)}){but}")


def _format_of(payload: bytes, extension: str) -> str:
    if extension not in EXTENSIONS:
        raise DecodeError(f"unknown image format {extension!r}; known: {', '.join(EXTENSIONS)}")
    return extension_of(payload)


def _read(payload: bytes, read: Callable[[Image.Image], T]) -> T:
    """Open and read an image; once more without its metadata, if that may be what is damaged."""
    extension = extension_of(payload)
    # Damaged bytes make Pillow raise OSError, SyntaxError, struct.error, zlib.error and more.
    try:
        return read(_open(payload, extension))
    except Exception as error:
        bare = without_metadata(payload, extension)
        if bare != payload:
            with suppress(Exception):
                return read(_open(bare, extension))
        if isinstance(error, DecodeError):
            raise
        # This error's message has the address of an object for a name.
        reason = "unreadable header" if isinstance(error, UnidentifiedImageError) else error
        raise DecodeError(f"damaged {extension} data ({reason})") from error


def _open(payload: bytes, extension: str) -> Image.Image:
    image = Image.open(io.BytesIO(payload), formats=[_PILLOW_FORMATS[extension]])
    _check_sides(image.height, image.width)
    return image


def _check_sides(height: int, width: int) -> None:
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise DecodeError(f"{height}×{width} pixels: sides must be within 1 to {MAX_SIDE}")


def _channels(image: Image.Image) -> int:
    return 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3


def _shape(image: Image.Image) -> tuple[int, int, int]:
    transposed = _orientation(image) in (5, 6, 7, 8)
    height, width = (image.width, image.height) if transposed else (image.height, image.width)
    return height, width, _channels(image)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1, which is upright, where it cannot be read."""
    # Pillow raises SyntaxError, struct.error, UnicodeDecodeError and more, and warns of the rest.
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    return 1


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return (
        image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image
    )


def _to_array(image: Image.Image) -> Pixels:
    channels = _channels(image)
    image.load()
    transparent = image.info.get("transparency") if image.mode.startswith("I") else None
    image = _upright(image)
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        return np.where(deep == transparent, 255, deep >> 8).astype(np.uint8)[:, :, None]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    mode = "L" if channels == 1 else "RGB"
    return _from_pillow(image if image.mode == mode else image.convert(mode))


def _opacity(image: Image.Image) -> Pixels:
    image.load()
    transparent = image.info.get("transparency") if image.mode.startswith("I") else None
    image = _upright(image)
    if image.mode.startswith("I"):
        return np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)[:, :, None]
    if not image.has_transparency_data:
        return np.full((image.height, image.width, 1), 255, np.uint8)
    return _from_pillow(image.convert("RGBA").getchannel("A"))


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
