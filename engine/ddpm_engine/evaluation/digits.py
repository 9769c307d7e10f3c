"""A small classifier of handwritten digits, trained in seconds when it is first needed.

Its hidden units are features for a Fréchet distance where no Inception network is available.
Distances in these features compare with each other only (and within one version of scikit-learn),
never with a published Fréchet Inception Distance.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from ddpm_engine.atomic_io import write_once
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.errors import UserError
from ddpm_engine.generation.archives import DamagedArchiveError, read_arrays
from ddpm_engine.images.codec import fit
from ddpm_engine.waiting import announced

HIDDEN = 128
CLASSES = 10
_SEED = 0
_TEST_SHARE = 0.25
_DIGITS = 1797
_BYTES_PER_PIXEL = 17
"""Of the images and of their shares of 1, whole and divided."""
_ARRAYS = ("hidden_weights", "hidden_biases", "output_weights", "output_biases")


class Digits(NamedTuple):
    """Images of digits and their classes."""

    images: NDArray[np.uint8]
    """`[N, size, size, 1]`."""
    labels: NDArray[np.int64]
    """`[N]` in 0 … 9."""


def real_digits(size: int) -> Digits:
    """Load scikit-learn's 1,797 handwritten digits, cropped and resized by `fit`."""
    examples = list(open_source("digits").examples)
    images = np.stack([fit(example.image, size) for example in examples])
    return Digits(images, np.array([example.label for example in examples]))


def seen_and_unseen(digits: Digits) -> tuple[Digits, Digits]:
    """Split into what the classifier is trained on, three quarters of each class, and the rest."""
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        digits.images, digits.labels, test_size=_TEST_SHARE, random_state=_SEED,
        stratify=digits.labels,
    )  # fmt: skip
    return Digits(seen, seen_labels), Digits(unseen, unseen_labels)


class DigitClassifier:
    """One hidden layer of 128 units with ReLU, on pixels in [0, 1].

    Args:
        arrays: float64 `hidden_weights` `[H·W, 128]`, `hidden_biases` `[128]`, `output_weights`
            `[128, 10]` and `output_biases` `[10]`.
    """

    def __init__(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        self.arrays = {name: np.ascontiguousarray(arrays[name]) for name in _ARRAYS}

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return round(len(self.arrays["hidden_weights"]) ** 0.5)

    @property
    def hash(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for array in self.arrays.values():
            digest.update(array.tobytes())
        return digest.hexdigest()

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Compute the hidden units: uint8 `[N, size, size, 1]` to float64 `[N, 128]`."""
        pixels = images.reshape(len(images), -1) / 255
        hidden = pixels @ self.arrays["hidden_weights"] + self.arrays["hidden_biases"]
        return np.asarray(hidden.clip(min=0))

    def logits(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute log-probabilities up to a constant per image: `[N, 128]` to `[N, 10]`."""
        return features @ self.arrays["output_weights"] + self.arrays["output_biases"]

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Compute the probabilities of digits: uint8 `[N, size, size, 1]` to float64 `[N, 10]`."""
        logits = self.logits(self.features(images))
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(shares / shares.sum(1, keepdims=True))

    def classify(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the most probable digit: uint8 `[N, size, size, 1]` to int64 `[N]`."""
        return np.asarray(self.logits(self.features(images)).argmax(1))


def train_digit_classifier(digits: Digits) -> DigitClassifier:
    """Train on the first part of `seen_and_unseen`, from a fixed seed; takes seconds."""
    seen, _ = seen_and_unseen(digits)
    network = MLPClassifier((HIDDEN,), alpha=1e-2, max_iter=300, random_state=_SEED)
    side = digits.images.shape[1]
    with announced(f"training the classifier of digits of {side}×{side} pixels, once"):
        network.fit(seen.images.reshape(len(seen.images), -1) / 255, seen.labels)
    parts = (network.coefs_[0], network.intercepts_[0], network.coefs_[1], network.intercepts_[1])
    return DigitClassifier(dict(zip(_ARRAYS, parts, strict=True)))


def _check_memory(size: int) -> None:
    needed = _DIGITS * size**2 * _BYTES_PER_PIXEL
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"`features` is digits, whose classifier is trained at the size of the images: of "
            f"{size}×{size} pixels it would take {needed / 1e9:.0f} GB of memory, and there are "
            f"{available / 1e9:.0f}; use features inception",
            field="features",
        )


def digit_classifier(size: int, cache: Path | None = None) -> DigitClassifier:
    """Return the classifier of digits of one size.

    Args:
        size: side of the images in pixels.
        cache: a folder that keeps it; all processes get the one that was kept first, since
            weights may differ in the last bits from machine to machine. None: train it.

    Raises:
        UserError: the cache cannot be written, what it holds is damaged, or the images are too
            large for the memory of this machine.
    """
    _check_memory(size)
    digits = real_digits(size)
    if cache is None:
        return train_digit_classifier(digits)
    provenance = [sklearn.__version__, np.__version__, HIDDEN, _SEED, _TEST_SHARE]
    key = hashlib.sha256(json.dumps(provenance).encode() + digits.images.tobytes()).hexdigest()
    path = cache / f"digits-{size}-{key[:16]}.npz"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            np.savez(content, allow_pickle=False, **train_digit_classifier(digits).arrays)
            write_once(path, content.getvalue())
        return DigitClassifier(dict(zip(_ARRAYS, read_arrays(path, *_ARRAYS), strict=True)))
    except DamagedArchiveError as error:
        raise UserError(f"cannot read {path}: {error}; remove it, and it is made again") from None
    except OSError as error:
        raise UserError(
            f"`cache` {cache} cannot be used ({error.strerror}); choose another", "cache"
        ) from None
