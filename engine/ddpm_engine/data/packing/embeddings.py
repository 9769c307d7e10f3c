"""Embeddings that are computed once, when a source is packed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_engine.data.members import EncodedCaption
from ddpm_engine.errors import UserError
from ddpm_engine.networks.text.encoder import EncodedText

_KEPT_BYTES = 1 << 28


class CaptionEncoder(Protocol):
    """What packing needs of a text encoder, such as a `TextEncoder`.

    A caption must have the same embeddings whatever it is encoded with.
    """

    place: str
    fingerprint: str
    channels: int
    pooled_channels: int

    def encode(self, captions: Sequence[str], length: int | None = None) -> EncodedText:
        """As `TextEncoder.encode`."""
        ...


class ImageEmbedder(Protocol):
    """What computes embeddings of images."""

    name: str
    """As the user writes it."""
    fingerprint: str
    """Equal for equal embeddings of equal images."""
    channels: int
    """Width of an embedding."""

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed images: uint8 `[N, H, W, C]` to float32 `[N, D]`."""
        ...


class CaptionEmbeddings:
    """Embeddings of captions in half precision; those of each distinct caption are computed once.

    Of very many captions, the least recently used are computed again, to the same values.

    Args:
        encoder: that computes them.
    """

    def __init__(self, encoder: CaptionEncoder) -> None:
        self.encoder = encoder
        self._kept: OrderedDict[str, EncodedCaption] = OrderedDict()
        self._bytes = 0

    def of(self, caption: str) -> EncodedCaption:
        """Return the embeddings of a caption: `[L, D]` without padding, and `[P]`.

        Raises:
            UserError: they are not finite in half precision.
        """
        kept = self._kept.get(caption)
        if kept is not None:
            self._kept.move_to_end(caption)
            return kept
        encoded = self.encoder.encode([caption])
        count = int(encoded.mask[0].sum())
        embeddings = EncodedCaption(
            _half(encoded.tokens[0, :count], self.encoder.place),
            _half(encoded.pooled[0], self.encoder.place),
        )
        self._kept[caption] = embeddings
        self._bytes += _size(embeddings)
        while self._bytes > _KEPT_BYTES:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return embeddings


def embed_images(embedder: ImageEmbedder, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embed images: uint8 `[N, H, W, C]` to float32 `[N, D]`.

    Raises:
        UserError: the embeddings are not of the width that the embedder says, or not finite.
    """
    embeddings = np.asarray(embedder.embed(images), np.float32)
    if embeddings.shape != (len(images), embedder.channels):
        raise UserError(
            f"image features {embedder.name} give {list(embeddings.shape)} for {len(images)} "
            f"images, not [{len(images)}, {embedder.channels}]; correct their `channels`"
        )
    if not np.isfinite(embeddings).all():
        raise UserError(f"image features {embedder.name} are not finite; choose others")
    return embeddings


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread of torch, so that results are the same in any number of processes.

    That number of threads is safe in a forked process too, where others would wait for ever.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _half(values: torch.Tensor, place: str) -> NDArray[np.float16]:
    half: NDArray[np.float16] = values.to("cpu", torch.float16).numpy()
    if not np.isfinite(half).all():
        raise UserError(
            f"embeddings by the text encoder {place} exceed the range of half precision: encode "
            "captions in training, or choose another encoder"
        )
    return half


def _size(embeddings: EncodedCaption) -> int:
    return embeddings.tokens.nbytes + embeddings.pooled.nbytes
