"""Feature networks, identified by name and by the hash of their weights.

Every metric but the likelihood compares such features, and means nothing without the network's
name, the hash, and how images were resized for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_engine.cache_directories import user_cache
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import CLASSES, HIDDEN, DigitClassifier, digit_classifier
from ddpm_engine.evaluation.inception import FEATURES, OUTPUTS, InceptionNetwork, load_inception
from ddpm_engine.evaluation.numbers import halves_of
from ddpm_engine.images.codec import with_channels
from ddpm_engine.images.transfer import Pending, to_host

FeaturesName = Literal["inception", "digits", "numbers"]


class FeatureNetwork(Protocol):
    """Images to features and logits of classes."""

    name: str
    hash: str
    """SHA-256 of the weights."""
    resize: str
    """How images are resized for the network."""
    features: int
    """D, the number of features."""
    outputs: int
    """K, the number of classes."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.floating]:
        """Evaluate: uint8 `[N, H, W, C]` to float `[N, D + K]`, features before logits.

        Raises:
            UserError: images of a size that the network does not take.
        """
        ...

    def start(self, images: NDArray[np.uint8]) -> NDArray[np.floating] | Pending:
        """Evaluate likewise, on a GPU without waiting for it."""
        ...


def feature_network(
    name: FeaturesName,
    size: int,
    device: torch.device | str = "cpu",
    *,
    weights: Path | None = None,
    cache: Path | None = None,
) -> FeatureNetwork:
    """Return a feature network by its name.

    Args:
        name: `"inception"`: the network of the Fréchet Inception Distance; `"digits"`: a small
            classifier of digits, for them only; `"numbers"`: of two digits side by side.
        size: height of the images in pixels.
        device: where it runs; digits and numbers always on the CPU.
        weights: file of Inception's weights, instead of downloading them.
        cache: folder for what is downloaded or trained; None: `default_cache`.

    Raises:
        UserError: unknown network, or its weights are not available.
    """
    cache = cache or default_cache()
    if name == "digits":
        return DigitFeatures(digit_classifier(size, cache))
    if name == "numbers":
        return NumberFeatures(digit_classifier(size, cache))
    if name != "inception":
        raise UserError(
            f"`features` is {name!r}; it must be inception, digits or numbers", field="features"
        )
    network, digest = load_inception(weights, cache)
    return InceptionFeatures(network.to(device), digest)


def default_cache() -> Path:
    """Return the folder of features and networks: `~/.cache/ddpm-engine/evaluation`."""
    return user_cache("evaluation")


class InceptionFeatures:
    """2048 features and 1008 unbiased logits, float32; grey images become three equal channels.

    Args:
        network: on the device that evaluates it.
        hash: of its weights.
    """

    name = "inception"
    resize = (
        "from the pictures' size to 299 by TensorFlow 1's bilinear resize, of float32 values, "
        "without smoothing or rounding"
    )
    features = FEATURES
    outputs = OUTPUTS

    def __init__(self, network: InceptionNetwork, hash: str) -> None:
        self.hash = hash
        self._network = network
        self._device = next(network.parameters()).device
        self._uploads = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.floating]:
        """See `FeatureNetwork`."""
        return np.asarray(self._evaluate(torch.from_numpy(images).to(self._device)).cpu().numpy())

    @torch.inference_mode()
    def start(self, images: NDArray[np.uint8]) -> NDArray[np.floating] | Pending:
        """See `FeatureNetwork`. The second half is copied while the first is evaluated."""
        if self._uploads is None:
            return self(images)
        halves = [
            to_host(self._evaluate(self._uploaded(half, self._uploads)))
            for half in np.array_split(images, min(2, len(images)))
        ]
        return lambda: np.concatenate([half() for half in halves])

    def _uploaded(self, images: NDArray[np.uint8], uploads: torch.cuda.Stream) -> Tensor:
        with torch.cuda.stream(uploads):
            copied = torch.from_numpy(images).pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(uploads)
        copied.record_stream(computing)
        return copied

    def _evaluate(self, images: Tensor) -> Tensor:
        """The features and logits of uint8 images `[N, H, W, C]`."""
        pixels = images.permute(0, 3, 1, 2)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        return torch.cat(self._network(pixels), dim=1)


class DigitFeatures:
    """128 hidden units and 10 logits of the digit classifier, float64; colours become grey.

    Args:
        classifier: for images of one size.
    """

    name = "digits"
    resize = "none: the classifier is trained at the pictures' size"
    features = HIDDEN
    outputs = CLASSES

    def __init__(self, classifier: DigitClassifier) -> None:
        self.hash = classifier.hash
        self._classifier = classifier

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.floating]:
        """See `FeatureNetwork`."""
        size = self._classifier.size
        if images.shape[1:3] != (size, size):
            raise UserError(f"images have {images.shape[1:3]} pixels, not {size}×{size}")
        grey = np.stack([with_channels(image, 1) for image in images])
        hidden = self._classifier.features(grey)
        return np.concatenate([hidden, self._classifier.logits(hidden)], axis=1)

    def start(self, images: NDArray[np.uint8]) -> NDArray[np.floating]:
        """See `FeatureNetwork`; the network is no GPU's."""
        return self(images)


class NumberFeatures:
    """Hidden units of both digits of a number, and logits of the numbers from 10 to 99, float64.

    Colours become grey. The left half's features come before the right half's.

    Args:
        classifier: for digits as high as the images.
    """

    name = "numbers"
    resize = "none: the classifier is trained at the images' height"
    features = 2 * HIDDEN
    outputs = CLASSES * (CLASSES - 1)

    def __init__(self, classifier: DigitClassifier) -> None:
        self.hash = classifier.hash
        self._classifier = classifier

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.floating]:
        """See `FeatureNetwork`."""
        size = self._classifier.size
        if images.shape[1:3] != (size, 2 * size):
            raise UserError(f"images have {images.shape[1:3]} pixels, not {size}×{2 * size}")
        halves = halves_of(np.stack([with_channels(image, 1) for image in images]))
        hidden = self._classifier.features(halves)
        tens, units = np.split(self._classifier.logits(hidden), 2)
        # No number of two digits begins with 0.
        logits = tens[:, 1:, None] + units[:, None, :]
        left, right = np.split(hidden, 2)
        return np.concatenate([left, right, logits.reshape(len(images), -1)], axis=1)

    def start(self, images: NDArray[np.uint8]) -> NDArray[np.floating]:
        """See `FeatureNetwork`; the network is no GPU's."""
        return self(images)
