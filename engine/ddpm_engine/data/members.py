"""What a sample of a shard may hold beside or in place of its image, parsed without trusting it.

    txt                 captions, one a line, UTF-8
    text.safetensors    their embeddings: tokens.0 float16 [L, D] and pooled.0 float16 [P] of the
                        first caption, tokens.1 and pooled.1 of the next, ..., without padding
    embedding.npy       the image's embedding: float32 [D]
    moments.npy         in place of an image, means and log-variances of its latents: float16
                        [1 or 2, 2 C, h, w], the second those of the mirrored image

Every `ValueError` says what is wrong with the sample, for a message that names it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

MAX_CAPTIONS = 1 << 20
"""Bytes of all captions of a sample."""
MAX_TEXT = 1 << 28
"""Bytes of the embeddings of all captions of a sample."""
MAX_EMBEDDING = 1 << 20
"""Bytes of the embedding of an image."""
MAX_MOMENTS = 1 << 28
"""Bytes of the moments of the latents of an image."""

EXTENSIONS_BESIDE = {
    "captions": "txt",
    "text": "text.safetensors",
    "embedding": "embedding.npy",
    "moments": "moments.npy",
}
"""Extension of each member, by the name that an index has for it."""

BOUNDS = {
    "captions": MAX_CAPTIONS,
    "text": MAX_TEXT,
    "embedding": MAX_EMBEDDING,
    "moments": MAX_MOMENTS,
}
"""Bytes of each member, by the same name."""


TEXT_LENGTH_MULTIPLE = 8
"""What the length of padded captions is a multiple of, unless it is chosen."""


_NPY_HEADER = 128  # bytes, for one short axis


class EncodedCaption(NamedTuple):
    """A caption as a text encoder gives it."""

    tokens: NDArray[np.float16]
    """`[L, D]`, one row for each token, without padding."""
    pooled: NDArray[np.float16]
    """`[P]`, an embedding of the whole."""


def padded_length(longest: int) -> int:
    """Round the number of tokens of the longest caption up to the length that all are padded to."""
    return -(-longest // TEXT_LENGTH_MULTIPLE) * TEXT_LENGTH_MULTIPLE


def check_caption(caption: str) -> str:
    """Return a caption without spaces around it.

    Raises:
        ValueError: it is empty, or has a NUL or more than one line.
    """
    stripped = caption.strip()
    if not stripped:
        raise ValueError("a caption is empty")
    if "\0" in stripped:
        raise ValueError("a caption has a NUL byte")
    if "\n" in stripped or "\r" in stripped:
        raise ValueError("a caption has more than one line")
    return stripped


def parse_captions(payload: bytes) -> tuple[str, ...]:
    """Parse captions, one a line; lines without any are passed over.

    Raises:
        ValueError: more than `MAX_CAPTIONS` bytes, not UTF-8, a NUL, or no caption.
    """
    if len(payload) > MAX_CAPTIONS:
        raise ValueError(f"captions of {len(payload)} bytes, more than {MAX_CAPTIONS}")
    try:
        text = payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"captions are not UTF-8 (byte {error.start})") from error
    # Not by splitlines: what else ends a line to Unicode may stand within a caption.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    captions = tuple(check_caption(line) for line in lines if line.strip())
    if not captions:
        raise ValueError("there is no caption, only an empty file")
    return captions


def encode_captions(captions: Sequence[str]) -> bytes:
    """Return what `parse_captions` parses.

    Raises:
        ValueError: as `parse_captions` and `check_caption`.
    """
    try:
        payload = "".join(f"{check_caption(caption)}\n" for caption in captions).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a caption has half of a surrogate pair, which is no character") from error
    parse_captions(payload)
    return payload


def encode_text(captions: Sequence[EncodedCaption], fingerprint: str) -> bytes:
    """Return what `StoredText` parses; equal embeddings give equal bytes.

    Args:
        captions: at least one.
        fingerprint: of their encoder, kept as metadata.
    """
    tensors: dict[str, NDArray[np.float16]] = {}
    for number, caption in enumerate(captions):
        tensors[f"tokens.{number}"] = np.ascontiguousarray(caption.tokens, np.float16)
        tensors[f"pooled.{number}"] = np.ascontiguousarray(caption.pooled, np.float16)
    return save(tensors, metadata={"encoder": fingerprint})


class StoredText(Sequence[EncodedCaption]):
    """Embeddings of a sample's captions, each looked at when it is asked for.

    Args:
        payload: from `encode_text`.

    Raises:
        ValueError: it is not what the head of this module describes.
    """

    def __init__(self, payload: bytes) -> None:
        try:
            self._tensors: dict[str, dict[str, Any]] = dict(deserialize(payload))
        except (SafetensorError, OverflowError) as error:
            raise ValueError(f"embeddings of captions cannot be read ({error})") from error
        if not self._tensors or len(self._tensors) % 2:
            raise ValueError("embeddings of captions are incomplete")

    def __len__(self) -> int:
        return len(self._tensors) // 2

    @overload
    def __getitem__(self, number: int) -> EncodedCaption: ...
    @overload
    def __getitem__(self, number: slice) -> list[EncodedCaption]: ...
    def __getitem__(self, number: int | slice) -> EncodedCaption | list[EncodedCaption]:
        """Return the embeddings of one caption or of several.

        Raises:
            ValueError: they are not what the head of this module describes, or are not finite.
        """
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        tokens = _half(self._tensors, f"tokens.{number}", 2)
        return EncodedCaption(tokens, _half(self._tensors, f"pooled.{number}", 1))


def _half(tensors: dict[str, dict[str, Any]], name: str, dimensions: int) -> NDArray[np.float16]:
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"embeddings of captions have no {name}")
    shape = tensor["shape"]
    if tensor["dtype"] not in ("F16", "float16") or len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{name} is {tensor['dtype']} {shape}, not float16 of {dimensions} axes")
    values = np.frombuffer(tensor["data"], "<f2").reshape(shape)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} is not finite")
    return values


def encode_embedding(embedding: NDArray[np.float32]) -> bytes:
    """Return what `parse_embedding` parses: float32 `[D]` as an npy file."""
    return _npy(np.ascontiguousarray(embedding, "<f4"))


def parse_embedding(payload: bytes) -> NDArray[np.float32]:
    """Parse the embedding of an image: float32 `[D]`.

    Raises:
        ValueError: it is not one, or not finite.
    """
    channels = max(1, (len(payload) - _NPY_HEADER) // 4)
    embedding = _parse(payload, "the image's embedding", "<f4", (channels,), 1)
    return _finite(embedding, "the image's embedding")


def encode_moments(moments: NDArray[np.float16]) -> bytes:
    """Return what `parse_moments` parses: float16 `[1 or 2, 2 C, h, w]` as an npy file."""
    return _npy(np.ascontiguousarray(moments, "<f2"))


def parse_moments(payload: bytes, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Parse the moments of latents.

    Args:
        payload: from `encode_moments`.
        shape: `(1 or 2, 2 C, h, w)` that the set's manifest asks for.

    Returns:
        float16 `[1 or 2, 2 C, h, w]`, read-only.

    Raises:
        ValueError: they are none, of another shape, or not finite.
    """
    moments = _parse(payload, "the latents' moments", "<f2", shape, len(shape))
    if moments.shape != shape:
        raise ValueError(
            f"the latents' moments are {list(moments.shape)}, not {list(shape)} as the set's"
        )
    return _finite(moments, "the latents' moments")


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    npy.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _parse(
    payload: bytes, what: str, dtype: str, shape: tuple[int, ...], axes: int
) -> NDArray[Any]:
    """Parse an npy file.

    Args:
        payload: the file.
        what: it holds, for messages.
        dtype: that it must have.
        shape: that it is likely to have.
        axes: that it must have.
    """
    # Parsing a header as Python takes longer than all the rest; that of this engine is known.
    header, size = _header_of(dtype, shape)
    if payload.startswith(header) and len(payload) - len(header) == size:
        return np.frombuffer(payload, dtype, offset=len(header)).reshape(shape)
    stream = io.BytesIO(payload)
    try:
        npy.read_magic(stream)
        found, by_columns, kind = npy.read_array_header_1_0(stream)
    except Exception as error:  # the header is evaluated as a literal, which fails in many ways
        raise ValueError(f"{what}: no npy file ({error})") from error
    values = payload[stream.tell() :]
    wanted = np.dtype(dtype)
    size = math.prod(found) * wanted.itemsize
    unordered = by_columns and len(found) > 1
    if kind != wanted or len(found) != axes or len(values) != size or not values or unordered:
        raise ValueError(f"{what}: {kind} {list(found)}, not {wanted} of {axes} axes")
    return np.frombuffer(values, dtype).reshape(found)


@lru_cache(maxsize=16)
def _header_of(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, int]:
    """Return the header of an npy file, and the number of bytes that follow it."""
    array = np.empty(shape, dtype)
    return _npy(array)[: -array.nbytes], array.nbytes


def _finite(values: NDArray[Any], what: str) -> NDArray[Any]:
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"{what}: empty or not finite")
    return values
