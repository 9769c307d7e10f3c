"""Networks that say which pictures are alike, known by name and by the hash of their weights.

Every measure but the likelihood is one of such features, and means nothing without the network's
name, the hash, and how pictures were brought to the size it looks at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_engine.cache_directories import user_cache
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import CLASSES, HIDDEN, DigitClassifier, digit_classifier
from ddpm_engine.evaluation.inception import FEATURES, OUTPUTS, InceptionNetwork, load_inception
from ddpm_engine.images.codec import with_channels

FeaturesName = Literal["inception", "digits"]


class FeatureNetwork(Protocol):
    """Pictures to features and to the logits of classes."""

    name: str
    hash: str
    """SHA-256 of the weights."""
    resize: str
    """How pictures are brought to the size that the network looks at."""
    features: int
    """D."""
    outputs: int
    """K classes."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.floating]:
        """Evaluate: uint8 `[N, H, W, C]` to float `[N, D + K]`, features before logits.

        Raises:
            UserError: pictures that the network does not look at.
        """
        ...


def feature_network(
    name: FeaturesName,
    size: int,
    device: torch.device | str = "cpu",
    *,
    weights: Path | None = None,
    cache: Path | None = None,
) -> FeatureNetwork:
    """A feature network by its name.

    Args:
        name: `"inception"`: the network of the Fréchet Inception Distance; `"digits"`: a small
            classifier of digits, for them only.
        size: side of the pictures in pixels.
        device: where it runs; digits always on the CPU.
        weights: file of Inception's weights, instead of the one that is downloaded.
        cache: folder of what is downloaded or trained; None: `default_cache`.

    Raises:
        UserError: no such network, or its weights cannot be had.
    """
    cache = cache or default_cache()
    if name == "digits":
        return DigitFeatures(digit_classifier(size, cache))
    if name != "inception":
        raise UserError(f"features are {name!r}; they must be inception or digits")
    network, digest = load_inception(weights, cache)
    return InceptionFeatures(network.to(device), digest)


def default_cache() -> Path:
    """Where features of data sets, and networks, are kept: `~/.cache/ddpm-engine/evaluation`."""
    return user_cache("evaluation")


class InceptionFeatures:
    """2048 features and 1008 unbiased logits, float32; grey pictures become three equal channels.

    Args:
        network: on the device that is to evaluate it.
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

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.floating]:
        """See `FeatureNetwork`."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self._device)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        return np.asarray(torch.cat(self._network(pixels), dim=1).cpu().numpy())


class DigitFeatures:
    """128 hidden units and 10 logits of the digit classifier, float64; colours become grey.

    Args:
        classifier: for pictures of one size.
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
            raise UserError(f"pictures have {images.shape[1:3]} pixels, not {size}×{size}")
        grey = np.stack([with_channels(image, 1) for image in images])
        hidden = self._classifier.features(grey)
        return np.concatenate([hidden, self._classifier.logits(hidden)], axis=1)
