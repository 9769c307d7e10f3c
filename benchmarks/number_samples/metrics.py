"""What the benchmarks of text to image share: prompts for numbers, and measures of the samples.

Distances are in the hidden units of the small classifier of digits, those of both halves, and
compare with each other only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.data.packing.sources.numbers import captions_of, in_words
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.evaluation.digits import digit_classifier
from ddpm_engine.evaluation.feature_networks import NumberFeatures
from ddpm_engine.evaluation.fid import Moments, frechet_distance, moments
from ddpm_engine.evaluation.numbers import number_reader, unseen_pairs
from ddpm_engine.samplers.samples import Samples

_UNSEEN = 10_000

Phrase = Callable[[int], str]

CAPTIONS: dict[str, Phrase] = {
    "forty-two": in_words,
    "the number forty-two": lambda number: captions_of(number)[1],
    "the number 42": lambda number: captions_of(number)[2],
    "four, then two": lambda number: captions_of(number)[3],
}
"""How the captions of training say a number, by what they are for 42."""

_MISSPELT = {
    "twenty": "twentie", "thirty": "thirdy", "forty": "fourty", "fifty": "fivty",
    "sixty": "sixtie", "seventy": "sevnty", "eighty": "eigthy", "ninety": "ninty",
}  # fmt: skip


def _misspelt(number: int) -> str:
    tens, _, units = in_words(number).partition("-")
    return f"{_MISSPELT[tens]} {units}"


def _turned_round(number: int) -> str:
    tens, _, units = in_words(number).partition("-")
    return f"{units}-and-{tens}"


OTHER_WORDS: dict[str, Phrase] = {
    "42": str,
    "forty two": lambda number: in_words(number).replace("-", " "),
    "Forty-two!": lambda number: f"{in_words(number).capitalize()}!",
    "a drawing of forty-two": lambda number: f"a drawing of {in_words(number)}",
    "fourty two": _misspelt,
    "two-and-forty": _turned_round,
}
"""Other ways to say a number of two words, by what they are for 42."""


class Sampleable(Protocol):
    """A model, or a chain of models, that makes images of prompts."""

    def sample(
        self,
        ids: Sequence[str],
        *,
        batch_size: int = 64,
        progress: bool | None = None,
        **options: Any,
    ) -> Samples:
        """Generate a sample of each prompt."""
        ...


class NumberMetrics:
    """Measures of images of numbers.

    Args:
        size: height of the images in pixels.
    """

    def __init__(self, size: int) -> None:
        self.reader = number_reader(size)
        self._network = NumberFeatures(digit_classifier(size))

    @cached_property
    def of_real(self) -> float:
        """Share that the reader gets right of pairs of real digits that it never saw."""
        unseen = unseen_pairs(self.reader.size, _UNSEEN)
        return float(self.reader.right(unseen.images, unseen.numbers).mean())

    def accuracy(self, images: NDArray[np.uint8], numbers: Sequence[int]) -> float:
        """Share of uint8 `[N, H, W, 1]` that show both digits of these numbers, `[N]`."""
        return float(self.reader.right(images, numbers).mean())

    def distance(self, images: NDArray[np.uint8]) -> float:
        """Fréchet distance of uint8 `[N, H, W, 1]` to real images of all numbers."""
        return frechet_distance(self._moments(images), self._real)

    @cached_property
    def _real(self) -> Moments:
        examples = [
            example
            for source in ("numbers", "numbers:held-out")
            for example in open_source(source).examples
        ]
        return self._moments(np.stack([example.image for example in examples]))

    def _moments(self, images: NDArray[np.uint8]) -> Moments:
        return moments([self._network(images)[:, : self._network.features]])


def in_turn(numbers: Sequence[int], count: int) -> list[int]:
    """Return the numbers in turn, `count` in all."""
    return [numbers[k % len(numbers)] for k in range(count)]


def of_two_words(numbers: Sequence[int]) -> list[int]:
    """Return those that are said in two words, as forty-two."""
    return [number for number in numbers if "-" in in_words(number)]


def images_of(
    model: Sampleable, phrase: Phrase, numbers: Sequence[int], seed: int, **options: Any
) -> NDArray[np.uint8]:
    """Generate images of numbers: uint8 `[N, H, W, 1]`.

    Args:
        model: generates them.
        phrase: says a number.
        numbers: N.
        seed: of the noise.
        options: of the request; those that are None are left to the model.
    """
    given = {name: value for name, value in options.items() if value is not None}
    samples = model.sample([phrase(number) for number in numbers], seed=seed, **given)
    return samples.model.codec.decode(samples.tensor)
