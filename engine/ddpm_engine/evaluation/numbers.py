"""A reader of two-digit numbers: which number does an image show?

A support vector machine reads either half. It is trained on three quarters of scikit-learn's
handwritten digits, as they are and shifted by an eighth of their height, and what it gets right of
pairs of the others is its accuracy. Features for a Fréchet distance are the hidden units of the
classifier of `evaluation.digits`, the left half's before the right half's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import Digits, real_digits, seen_and_unseen

_SOFTNESS = 10.0
_SEED = 0


class Pairs(NamedTuple):
    """Images of two digits side by side and the numbers they show."""

    images: NDArray[np.uint8]
    """`[N, size, 2 · size, 1]`."""
    numbers: NDArray[np.int64]
    """`[N]` in 0 … 99."""


class NumberReader:
    """Reads both digits of images of one size.

    Args:
        machine: trained on halves, float64 `[N, size²]` in [0, 1], and on their digits.
        size: height of the images in pixels, half of their width.
    """

    def __init__(self, machine: SVC, size: int) -> None:
        self._machine, self.size = machine, size

    def read(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the number that each image shows: uint8 `[N, size, 2 · size, 1]` to int64 `[N]`.

        Raises:
            UserError: images of another size, or not grey.
        """
        if not len(images):
            return np.empty(0, np.int64)
        halves = halves_of(images)
        if halves.shape[1] != self.size:
            raise UserError(
                f"images are {images.shape[1]}×{images.shape[2]}; this reader takes "
                f"{self.size}×{2 * self.size}"
            )
        digits = self._machine.predict(_pixels(halves)).reshape(2, -1)
        return np.asarray(10 * digits[0] + digits[1], dtype=np.int64)

    def right(
        self, images: NDArray[np.uint8], numbers: Sequence[int] | NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Say of which images both digits are read as asked for.

        Args:
            images: uint8 `[N, size, 2 · size, 1]`.
            numbers: asked for, `[N]`.

        Returns:
            bool `[N]`.

        Raises:
            UserError: as `read`.
        """
        return np.asarray(self.read(images) == np.asarray(numbers))


@cache
def number_reader(size: int) -> NumberReader:
    """Train the reader of images of `size` × 2 `size` pixels; takes seconds, always the same."""
    seen, _ = seen_and_unseen(real_digits(size))
    shifted = [seen.images, *_shifts(seen.images, max(1, size // 8))]
    machine = SVC(C=_SOFTNESS, gamma="scale")
    machine.fit(_pixels(np.concatenate(shifted)), np.tile(seen.labels, len(shifted)))
    return NumberReader(machine, size)


def seen_pairs(size: int, count: int) -> Pairs:
    """Put digits together that the reader was trained on; arguments as in `unseen_pairs`."""
    seen, _ = seen_and_unseen(real_digits(size))
    return _paired(seen, count)


def unseen_pairs(size: int, count: int) -> Pairs:
    """Put digits together that the reader was not trained on.

    Args:
        size: height of the images in pixels.
        count: number of pairs, each of two digits at random.
    """
    _, unseen = seen_and_unseen(real_digits(size))
    return _paired(unseen, count)


def halves_of(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut images in two: all left halves, then all right halves.

    Args:
        images: uint8 `[N, H, 2 H, 1]`.

    Returns:
        uint8 `[2 N, H, H, 1]`.

    Raises:
        UserError: images that are not grey, or not twice as wide as high.
    """
    if images.ndim != 4 or images.shape[3] != 1 or images.shape[2] != 2 * images.shape[1]:
        raise UserError(
            f"images of numbers are grey and twice as wide as high; these are "
            f"{list(images.shape[1:])}"
        )
    return np.concatenate(np.split(images, 2, axis=2))


def _paired(digits: Digits, count: int) -> Pairs:
    # A legacy generator, since numpy promises its values for good.
    left, right = np.random.RandomState(_SEED).randint(len(digits.images), size=(2, count))
    images = np.concatenate([digits.images[left], digits.images[right]], axis=2)
    return Pairs(images, np.asarray(10 * digits.labels[left] + digits.labels[right], np.int64))


def _pixels(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.asarray(images.reshape(len(images), -1) / 255)


def _shifts(images: NDArray[np.uint8], by: int) -> list[NDArray[np.uint8]]:
    """Images moved up, down, left and right, black where they were."""
    padded = np.pad(images, ((0, 0), (by, by), (by, by), (0, 0)))
    size = images.shape[1]
    return [
        padded[:, top : top + size, left : left + size]
        for top, left in ((0, by), (2 * by, by), (by, 0), (by, 2 * by))
    ]
