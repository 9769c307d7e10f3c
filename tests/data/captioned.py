"""Small sets of shards with captions and embeddings, and encoders that need no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests.data.sets import PIXELS

from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.source import Example, Source
from ddpm_engine.networks.text.encoder import EncodedText


class WordEncoder:
    """A token for each word: an embedding that is drawn by the word."""

    def __init__(self, channels: int = 6, pooled_channels: int = 3, scale: float = 1.0) -> None:
        self.place = f"words of {channels} channels"
        self.fingerprint = hashlib.sha256(self.place.encode()).hexdigest()
        self.channels, self.pooled_channels = channels, pooled_channels
        self.encoded: list[str] = []
        """Captions in the order in which they were encoded."""
        self._scale = scale

    def encode(self, captions: Sequence[str], length: int | None = None) -> EncodedText:
        self.encoded += captions
        rows = [[self._word(word, self.channels) for word in c.split()] for c in captions]
        length = length or max(map(len, rows))
        tokens = torch.zeros(len(rows), length, self.channels)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.stack(row)[:length]
        mask = torch.tensor([[place < len(row) for place in range(length)] for row in rows])
        pooled = torch.stack([self._word(caption, self.pooled_channels) for caption in captions])
        return EncodedText(tokens, mask, pooled)

    def _word(self, word: str, channels: int) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        values = np.random.default_rng(seed).standard_normal(channels)
        return torch.tensor(values * self._scale, dtype=torch.float32)


class MeanEmbedder:
    """Means of the channels and of the halves of an image."""

    name = "means"
    fingerprint = "0" * 64
    channels = 4

    def embed(self, images: NDArray[Any]) -> NDArray[np.float32]:
        halves = images.reshape(len(images), 4, -1).astype(np.float32)
        means: NDArray[np.float32] = halves.mean(2) / 255
        return means


CAPTIONS = ("a cat", "a photo of a cat on a mat", "😀 ein Kater")


def captions_of(number: int) -> tuple[str, ...]:
    return tuple(f"{caption} {number % 5}" for caption in CAPTIONS[: 1 + number % 3])


def source(count: int = 12, captions: bool = True) -> Source:
    examples = [
        Example(f"k{i}", PIXELS[i], i % 3, captions_of(i) if captions else ()) for i in range(count)
    ]
    return Source("memory", examples, ("a", "b", "c"), revision="1")


def pack(folder: Path, encoder: WordEncoder | None = None, embedder: bool = False) -> Path:
    """Pack twelve captioned images into three shards."""
    write_shards(
        source(),
        folder,
        per_shard=5,
        text_encoder=encoder,
        image_embedder=MeanEmbedder() if embedder else None,
    )
    return folder
