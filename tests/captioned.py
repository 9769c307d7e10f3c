"""Digits with captions, and a text encoder, small enough to train with in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.data.packing.sources.source import Example, Source

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHANNELS = 16
"""Of the embeddings of `tiny_encoder`."""
FEATURES = 5
"""Channels of the embeddings of `Means`."""


def tiny_encoder(folder: Path, seed: int = 0) -> str:
    """Save a BERT of random weights that knows the captions' words; return its place."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "then", "digit", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=CHANNELS, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


def pairs_of_digits(count: int) -> Source:
    """Two digits beside each other, 8×16, with their first digit as label and three captions."""
    digits = open_source("digits").examples[: count + 1]

    def pair(number: int) -> Example:
        left, right = digits[number], digits[number + 1]
        tens, units = (WORDS[one.label or 0] for one in (left, right))
        return Example(
            f"{number:08d}",
            np.concatenate([left.image, right.image], axis=1),
            left.label,
            (f"{tens} then {units}", f"digit {tens} then digit {units}", f"{tens} {units}"),
        )

    return Source("pairs", [pair(number) for number in range(count)], WORDS, "1")


class Means:
    """Image embeddings: means of columns of pixels."""

    name = "means"
    fingerprint = "0" * 64
    channels = FEATURES

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        columns = images.astype(np.float32).mean((1, 3)) / 127.5 - 1
        return np.ascontiguousarray(columns[:, :FEATURES])
