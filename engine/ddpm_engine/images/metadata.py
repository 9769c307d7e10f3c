"""Take the metadata out of image files whose metadata cannot be read."""

from __future__ import annotations

import zlib

# Header, palette, transparency and pixels.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_EXIF = b"eXIf"
_PNG_SIGNATURE = 8

_JPEG_SCAN, _JPEG_ADOBE, _JPEG_COMMENT = 0xDA, 0xEE, 0xFE
_JPEG_APPLICATION = range(0xE0, 0xF0)
_EXIF = b"Exif\0\0"


def without_metadata(payload: bytes, extension: str) -> bytes:
    """Return a file without what is not needed to show its pixels upright.

    Args:
        payload: a PNG or a JPEG; other formats are returned as they are.
        extension: which of them it is.
    """
    if extension == "png":
        return _bare_png(payload)
    if extension in ("jpg", "jpeg"):
        return _bare_jpeg(payload)
    return payload


def _bare_png(payload: bytes) -> bytes:
    kept, start = [payload[:_PNG_SIGNATURE]], _PNG_SIGNATURE
    while start < len(payload):
        # Length, name, data and checksum.
        end = start + 12 + int.from_bytes(payload[start : start + 4], "big")
        name, checksum = payload[start + 4 : start + 8], payload[end - 4 : end]
        is_sound = int.from_bytes(checksum, "big") == zlib.crc32(payload[start + 4 : end - 4])
        if name in _PNG_CHUNKS or (name == _PNG_EXIF and is_sound):
            kept.append(payload[start:end])
        start = end
    return b"".join(kept)


def _bare_jpeg(payload: bytes) -> bytes:
    kept, start = [payload[:2]], 2
    while payload[start : start + 1] == b"\xff" and start + 4 <= len(payload):
        marker = payload[start + 1]
        if marker == _JPEG_SCAN:
            break
        # The length counts its own two bytes.
        end = start + 2 + max(2, int.from_bytes(payload[start + 2 : start + 4], "big"))
        data = payload[start + 4 : end]
        # Adobe's segment says which colours the numbers mean.
        is_needed = data.startswith(_EXIF) or (marker == _JPEG_ADOBE and len(data) >= 12)
        if is_needed or marker not in (*_JPEG_APPLICATION, _JPEG_COMMENT):
            kept.append(payload[start:end])
        start = end
    return b"".join([*kept, payload[start:]])
