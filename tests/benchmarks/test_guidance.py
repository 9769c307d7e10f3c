"""What the benchmark of guidance measures, on digits whose measures are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks import guidance
from benchmarks.throughput.digits import DigitMetrics
from PIL import Image

from ddpm_engine.evaluation.digits import CLASSES, HIDDEN, DigitClassifier, Digits
from ddpm_engine.evaluation.feature_networks import DigitFeatures


@pytest.fixture
def classifier() -> DigitClassifier:
    """Its first ten hidden units are the first ten pixels, and so are its logits."""
    return DigitClassifier(
        {
            "hidden_weights": np.eye(16, HIDDEN),
            "hidden_biases": np.zeros(HIDDEN),
            "output_weights": np.eye(HIDDEN, CLASSES),
            "output_biases": np.zeros(CLASSES),
        }
    )


def metrics(classifier: DigitClassifier, real: Digits) -> DigitMetrics:
    return DigitMetrics(DigitFeatures(classifier), real)


def digits(brightness: int) -> Digits:
    """Images of 4×4 where pixel c of an image of class c is the brightest."""
    labels = np.arange(200) % CLASSES
    images = np.random.default_rng(0).integers(0, brightness, (200, 16), dtype=np.uint8)
    images[np.arange(200), labels] += 100
    return Digits(images.reshape(200, 4, 4, 1), labels)


def test_real_digits_have_full_accuracy_and_variety(classifier: DigitClassifier) -> None:
    real = digits(100)
    found = guidance.measure(real.images, real.labels, metrics(classifier, real))
    assert found["accuracy"] == 1
    assert found["accuracy_by_class"] == [1.0] * CLASSES
    assert found["variety"] == pytest.approx(1)
    assert found["recall"] == 1
    assert found["distance"] == pytest.approx(0, abs=1e-9)


def test_less_variety_and_wrong_classes_are_seen(classifier: DigitClassifier) -> None:
    real, alike = digits(100), digits(10)
    found = guidance.measure(alike.images, alike.labels, metrics(classifier, real))
    # Uniform in [0, 10) instead of [0, 100): a hundredth of the variance, nearly.
    assert found["variety"] == pytest.approx(99 / 9999, rel=0.1)
    assert found["recall"] < 0.5
    assert found["distance"] > 0.1
    shifted = guidance.measure(
        alike.images, (alike.labels + 1) % CLASSES, metrics(classifier, real)
    )
    assert shifted["accuracy"] == 0


def test_the_variance_of_a_class_is_not_that_between_classes() -> None:
    features = np.array([[0.0, 1.0], [2.0, 1.0], [50.0, 0.0], [50.0, 6.0]])
    assert guidance.spread(features, np.array([0, 0, 1, 1])) == pytest.approx((2 + 18) / 2)


def test_curves_are_plotted(tmp_path: Path) -> None:
    point = {"accuracy": 0.9, "variety": 1.0, "recall": 0.8, "distance": 0.5}
    points = [{"scale": scale, **point} for scale in (1.0, 2.0)]
    guidance.plot(points, 0.98, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size > (400, 400)
