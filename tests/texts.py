"""A text encoder and a network conditioned on text, as small as ones can be."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec

CHANNELS, POOLED = 6, 4


class Encoded(NamedTuple):
    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class WordEncoder:
    """Embed each word by its hash; a text's length is its number of words and one more.

    Args:
        length: that all texts are padded to; None: the longest of a call.
    """

    def __init__(self, length: int | None = None) -> None:
        self.length = length
        self.encoded: list[str] = []

    def encode(self, captions: Sequence[str]) -> Encoded:
        self.encoded += captions
        texts = [[*caption.split(), "end"] for caption in captions]
        length = self.length or max(map(len, texts))
        tokens = torch.zeros(len(texts), length, CHANNELS)
        mask = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, words in enumerate(texts):
            for position, word in enumerate(words):
                tokens[row, position] = values_of(f"{position} {word}", CHANNELS)
                mask[row, position] = True
        pooled = torch.stack([values_of(caption, POOLED) for caption in captions])
        return Encoded(tokens, mask, pooled)


def values_of(text: str, count: int) -> Tensor:
    digest = hashlib.sha256(text.encode()).digest()[:count]
    return torch.tensor([byte / 128 - 1 for byte in digest])


class TextNetwork(nn.Module):
    """Shift an image by what the text, the vector and the low-resolution image say."""

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 8, 8),
        text: int | None = CHANNELS,
        vector: int | None = None,
        low_resolution: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.sample_shape = shape
        self.conditioning = ConditioningSpec(
            text=text,
            vector=vector,
            low_resolution=low_resolution,
        )
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6), requires_grad=False)
        self.precomputed: list[int] = []
        self.batches: list[int] = []

    def precompute(self, conditioning: Conditioning) -> Conditioning:
        if conditioning.text is None:
            return conditioning
        self.precomputed.append(len(conditioning.text))
        projections = conditioning.text * self.weight
        return replace(conditioning, text=None, text_projections=projections)

    def forward(self, x: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        self.batches.append(len(x))
        shift = torch.zeros(len(x), 1)
        if self.conditioning.text is not None:
            if conditioning.text_projections is None:
                conditioning = self.precompute(conditioning)
            projections, mask = conditioning.text_projections, conditioning.text_mask
            assert projections is not None
            assert mask is not None
            assert mask.any(1).all()
            weights = torch.arange(1, 1 + mask.shape[1]) * mask
            shift = shift + (weights[..., None] * projections).sum(dim=(1, 2))[:, None]
        if self.conditioning.vector is not None:
            assert conditioning.vector is not None
            shift = shift + conditioning.vector.sum(1, keepdim=True)
        by_channel = shift * torch.linspace(0.1, 0.2, x.shape[1])
        out = (0.9 * x + 0.1 * x.flip(3)).sin() + by_channel[:, :, None, None]
        if self.conditioning.low_resolution is not None:
            assert conditioning.low_resolution is not None
            out = out - 0.3 * conditioning.low_resolution
        return out
