"""The index of a shard: one row per sample, parsed without trusting it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ddpm_engine.data.members import EXTENSIONS_BESIDE
from ddpm_engine.data.shards.manifest import Shard

MAX_KEY = 255
"""Bytes of a key in an index, where it only names the sample; longer keys lose their start."""
MAX_HEADER = 1 << 12
"""Bytes of an index's npy header."""

BESIDE = tuple(EXTENSIONS_BESIDE)
"""Names of the columns for members beside image and label, in their order."""

Index = NDArray[np.void]

_PLACE = [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")]


def index_dtype(key_bytes: int, beside: Sequence[str] = ()) -> np.dtype[np.void]:
    """Row of an index.

    A label of -1 means no label. Shards of images and labels alone have no further columns, as in
    earlier versions; a member at offset 0 is one that its sample lacks, as that of latents lacks an
    image.

    Args:
        key_bytes: length of the longest key.
        beside: those of `BESIDE` that any sample of the shard has.
    """
    fields: list[tuple[str, object]] = [
        ("key", f"S{max(1, key_bytes)}"),
        *_PLACE,
        ("extension", "S4"),
        ("label", "<i4"),
    ]
    return np.dtype(fields + [(name, _PLACE) for name in BESIDE if name in beside])


def parse_index(content: bytes, shard: Shard, classes: int) -> Index:
    """Parse the bytes of an index, which may come from an untrusted source.

    Args:
        content: bytes of an npy file.
        shard: what the index must describe.
        classes: labels must be below it.

    Returns:
        Rows of `index_dtype`, one per sample.

    Raises:
        ValueError: they are not an index of this shard; the message continues the file's name.
    """
    stream = io.BytesIO(content)
    try:
        npy.read_magic(stream)
        shape, _, dtype = npy.read_array_header_1_0(stream)
    except Exception as error:  # the header is evaluated as a literal, which fails in many ways
        raise ValueError(f"is not an npy file ({error})") from error
    names = dtype.names or ()
    if "key" not in names or dtype != index_dtype(dtype["key"].itemsize, names):
        raise ValueError("has other rows than this engine's")
    if shape != (shard.samples,) or len(content) - stream.tell() != shard.samples * dtype.itemsize:
        raise ValueError(f"has {list(shape)} rows for {shard.samples} samples")
    index = np.frombuffer(content, dtype, offset=stream.tell())
    for places in (index, *(index[name] for name in BESIDE if name in names)):
        # Subtracted, not added: the sum of two unsigned numbers could wrap.
        if np.any(places["offset"] > shard.bytes) or np.any(
            places["size"] > shard.bytes - places["offset"]
        ):
            raise ValueError("points outside its shard")
    labels = index["label"]
    if len(labels) and not -1 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"has labels up to {labels.max()}, the manifest names {classes} classes")
    return index
