"""Image embeddings: what a prior generates from text, and a decoder makes images of.

The features of any feature network are a space of such embeddings (Ramesh et al. 2022 take CLIP's).
A diffusion starts from noise of unit variance, so each feature is shifted and scaled by statistics
of images that the network was trained on, where these are known.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import real_digits, seen_and_unseen
from ddpm_engine.evaluation.feature_networks import FeatureNetwork, FeaturesName, feature_network
from ddpm_engine.evaluation.numbers import seen_pairs
from ddpm_engine.images.folder import in_words
from ddpm_engine.sizes import Size, as_text, height_and_width

EMBEDDINGS: tuple[FeaturesName, ...] = ("digits", "inception", "numbers")
"""Names of the embeddings there are."""

_FLOOR = 0.1
"""Least scale of a feature, as a share of the root mean square of all: one that hardly varies is
not blown up to noise."""
_PAIRS = 4000


class FeatureEmbedder:
    """Features of a feature network, shifted and scaled one by one, as packing takes them.

    Args:
        network: computes the features, D of them.
        mean: `[D]`, subtracted; zeros for none.
        scale: `[D]`, positive, what is divided by; ones for none.
    """

    def __init__(
        self, network: FeatureNetwork, mean: NDArray[np.float64], scale: NDArray[np.float64]
    ) -> None:
        self.name, self.channels = network.name, network.features
        digest = hashlib.sha256(f"{network.hash} {network.resize}".encode())
        for array in (mean, scale):
            # Rounded, since sums may differ in the last bits from machine to machine.
            digest.update(np.asarray(array, np.float16).tobytes())
        self.fingerprint = digest.hexdigest()
        self._network, self._mean, self._scale = network, mean, scale

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed images: uint8 `[N, H, W, C]` to float32 `[N, D]`.

        Raises:
            UserError: images of a size that the network does not take.
        """
        features = self._network(images)[:, : self.channels]
        return np.asarray((features - self._mean) / self._scale, dtype=np.float32)


def image_embedder(
    name: str, size: Size, device: torch.device | str = "cpu", cache: Path | None = None
) -> FeatureEmbedder:
    """Return an embedder by its name.

    Args:
        name: of `EMBEDDINGS`.
        size: of the images that it embeds.
        device: where it runs; digits and numbers always on the CPU.
        cache: folder for networks that are downloaded or trained; None: that of evaluations.

    Raises:
        UserError: an unknown name, a size that the network does not take, or its weights are not
            available.
    """
    height, width = height_and_width(size)
    if name == "inception":
        network = feature_network("inception", height, device, cache=cache)
        return FeatureEmbedder(network, np.zeros(network.features), np.ones(network.features))
    if name not in EMBEDDINGS:
        raise UserError(
            f"`image_features` is {name!r}; there are {in_words(EMBEDDINGS)}", "image_features"
        )
    wide = {"digits": height, "numbers": 2 * height}[name]
    if width != wide:
        raise UserError(
            f"`image_features` is {name}, of images of {height}×{wide} pixels; these have "
            f"{as_text(size)}",
            "image_features",
        )
    if name == "digits":
        network = feature_network("digits", height, device, cache=cache)
        images = seen_and_unseen(real_digits(height))[0].images
    else:
        network = feature_network("numbers", height, device, cache=cache)
        images = seen_pairs(height, _PAIRS).images
    features = network(images)[:, : network.features]
    spread = features.std(0)
    floor = _FLOOR * np.sqrt(np.square(spread).mean())
    return FeatureEmbedder(network, features.mean(0), np.maximum(spread, floor))
