"""How far drawn digits are from real ones, as one number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from ddpm_engine.data import fit, open_source

Features = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 `[N, H, W, C]` → features float64 `[N, D]`."""


def real_digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits, uint8 `[N, size, size, 1]`, and their classes."""
    examples = list(open_source("digits").examples)
    images = np.stack([fit(example.image, size) for example in examples])
    return images, np.array([example.label for example in examples])


def digit_features(images: np.ndarray, labels: np.ndarray) -> Features:
    """The 128 hidden units of a small classifier of the real digits.

    As in `digits_quality.py`: pixels in [0, 1], one hidden layer with ReLU, trained on three
    quarters of the digits from a fixed seed. The distance is comparable within one version of
    scikit-learn only, and with no published Fréchet Inception Distance.
    """
    pixels = images.reshape(len(images), -1) / 255
    seen, _, seen_labels, _ = train_test_split(
        pixels, labels, test_size=0.25, random_state=0, stratify=labels
    )
    classifier = MLPClassifier((128,), alpha=1e-2, max_iter=300, random_state=0)
    classifier.fit(seen, seen_labels)
    weights, biases = classifier.coefs_[0], classifier.intercepts_[0]

    def features(pictures: np.ndarray) -> np.ndarray:
        hidden: np.ndarray = pictures.reshape(len(pictures), -1) / 255 @ weights + biases
        return hidden.clip(min=0)

    return features


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between the normal distributions with the means and covariances of two sets of features.

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Heusel et al. 2017, equation 6).

    Args:
        a: `[N, D]`.
        b: `[M, D]`.
    """
    mean = a.mean(0) - b.mean(0)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    # (Σ_a Σ_b)^½ has the trace of (Σ_a^½ Σ_b Σ_a^½)^½, which is symmetric.
    product = np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(product).sum()
    return float(mean @ mean + trace)
