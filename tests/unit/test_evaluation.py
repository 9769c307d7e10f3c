"""Metrics of images, against closed forms, plain versions and peers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from sklearn.neural_network import MLPClassifier

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import digit_classifier, real_digits, seen_and_unseen
from ddpm_engine.evaluation.fid import Moments, frechet_distance, moments
from ddpm_engine.evaluation.inception_score import inception_score
from ddpm_engine.evaluation.kid import kernel_distance, squared_mmd
from ddpm_engine.evaluation.precision_recall import blocks, precision_recall
from ddpm_engine.evaluation.subsets import GENERATED, REAL, evenly_spaced, shuffled

Array = NDArray[np.float64]


def normal(count: int, features: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, features))


def whitened(samples: Array) -> Array:
    """With exactly zero mean and unit covariance."""
    samples = samples - samples.mean(0)
    root = np.linalg.cholesky(np.cov(samples, rowvar=False))
    return np.asarray(samples @ np.linalg.inv(root).T)


# Fréchet distance


def test_moments_are_numpys_in_any_batches() -> None:
    features = normal(1000, 7) * 3 + 1e4
    for cuts in [(), (1,), (2, 500, 500, 999)]:
        found = moments(np.split(features, cuts))
        assert found.count == 1000
        np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-14)
        np.testing.assert_allclose(
            found.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9
        )


def test_moments_and_distances_without_meaning_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2 images, and there are 1"):
        moments([normal(1, 3)])
    with pytest.raises(UserError, match="not a finite number"):
        moments([normal(4, 3), np.full((1, 3), np.nan)])
    with pytest.raises(ValueError, match="features of 3 and of 4 numbers"):
        frechet_distance(moments([normal(9, 3)]), moments([normal(9, 4)]))


def test_frechet_distance_of_normals_with_a_known_one() -> None:
    a = whitened(normal(4000, 3))
    assert frechet_distance(moments([a]), moments([a])) == pytest.approx(0, abs=1e-9)
    # Deviations 1 and (2, 1, 3), means apart by (1, 0, 2): 1 + 4 + (1 + 0 + 4).
    b = moments([a * [2, 1, 3] + [1, 0, 2]])
    assert frechet_distance(moments([a]), b) == pytest.approx(10)
    assert frechet_distance(b, moments([a])) == pytest.approx(10)


@pytest.mark.parametrize("rank", [16, 5])
def test_frechet_distance_is_that_of_scipys_matrix_root(rank: int) -> None:
    # Of rank 5: fewer images than features.
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(16, rank)), rng.normal(size=(16, rank))
    a = Moments(100, rng.normal(size=16), one @ one.T)
    b = Moments(100, rng.normal(size=16), other @ other.T)
    # Covariances that do not commute, and the formula written out.
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    apart = a.mean - b.mean
    expected = apart @ apart + np.trace(a.covariance + b.covariance - 2 * np.real(root))
    tolerance = 1e-10 if rank == 16 else 1e-5  # scipy's own error, of a singular matrix
    assert frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)
    # The nuclear norm of what both have in common, which is exact at any rank.
    shared = np.linalg.norm(one.T @ other, "nuc")
    exact = apart @ apart + (one**2).sum() + (other**2).sum() - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-12)


# Kernel distance


def test_squared_mmd_is_the_double_loop() -> None:
    a, b = normal(7, 3, seed=1), normal(5, 3, seed=2) + 0.5

    def kernel(x: Array, y: Array) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = [kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j]
    within_b = [kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j]
    between = [kernel(x, y) for x in a for y in b]
    expected = math.fsum(within_a) / 42 + math.fsum(within_b) / 20 - 2 * math.fsum(between) / 35
    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_normals_is_without_bias_at_any_number() -> None:
    # E k(x, y) for independent x ~ N(m, I), y ~ N(n, I) in one dimension, by moments of xy:
    # E (1 + xy)³ = 1 + 3 mn + 3 (1 + m²)(1 + n²) + (m³ + 3m)(n³ + 3n).
    def expected(m: float, n: float) -> float:
        return 1 + 3 * m * n + 3 * (1 + m**2) * (1 + n**2) + (m**3 + 3 * m) * (n**3 + 3 * n)

    apart = expected(0, 0) + expected(0.5, 0.5) - 2 * expected(0, 0.5)
    for count in (400, 11000):
        found = kernel_distance(normal(count, 1, seed=3), normal(count, 1, seed=4) + 0.5)
        assert found.mean == pytest.approx(apart, abs=4 * found.error)
        same = kernel_distance(normal(count, 1, seed=3), normal(count, 1, seed=4))
        assert same.mean == pytest.approx(0, abs=4 * same.error)
    assert (found.blocks, found.block_size) == (11, 1000)
    assert found.error < 0.1 * apart


def test_kernel_distance_uses_blocks_of_everything() -> None:
    # Sorted by class: blocks in this order would differ, the distance of each is of the whole.
    classes = np.repeat(np.eye(4), 250, axis=0) * 5
    found = kernel_distance(classes, classes + 1e-9)
    assert abs(found.mean) < 4 * found.error
    assert found.blocks == 10
    with pytest.raises(UserError, match="19 samples with 1000 real images; it needs at least 20"):
        kernel_distance(classes[:19], classes)


# Inception Score


def test_inception_score_between_its_bounds() -> None:
    sure = np.repeat(np.eye(5), 200, axis=0) * 100
    assert inception_score(sure).mean == pytest.approx(5, rel=0.05)
    assert inception_score(np.zeros((100, 5))).mean == pytest.approx(1, rel=1e-12)
    one = np.tile(np.eye(5)[0] * 100, (100, 1))
    assert inception_score(one).mean == pytest.approx(1, rel=1e-12)
    with pytest.raises(UserError, match="10 splits of 19"):
        inception_score(np.zeros((19, 5)))


def test_inception_score_is_the_formula_of_each_split() -> None:
    logits = normal(57, 4) * 3
    scores = []
    for rows in np.array_split(shuffled(57, GENERATED), 10):
        p = np.exp(logits[rows]) / np.exp(logits[rows]).sum(1, keepdims=True)
        divergences = [
            sum(p[i, k] * math.log(p[i, k] / p[:, k].mean()) for k in range(4))
            for i in range(len(p))
        ]
        scores.append(math.exp(np.mean(divergences)))
    found = inception_score(logits)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.deviation == pytest.approx(np.std(scores), rel=1e-10)
    # A constant added to an image's logits changes nothing.
    moved = inception_score(logits + normal(57, 1, seed=5))
    assert moved.mean == pytest.approx(found.mean, rel=1e-12)


# Precision and recall


def naive(generated: Array, real: Array, k: int) -> tuple[float, float]:
    """One point after another, as the paper's algorithm 1 says it."""

    def share(points: Array, centres: Array) -> float:
        reach = []
        for i, centre in enumerate(centres):
            others = np.delete(centres, i, axis=0)
            reach.append(np.sort(np.linalg.norm(others - centre, axis=1))[k - 1])
        inside = [
            any(np.linalg.norm(point - c) <= r for c, r in zip(centres, reach, strict=True))
            for point in points
        ]
        return float(np.mean(inside))

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_precision_and_recall_are_the_naive_ones_in_any_blocks(block: int) -> None:
    real, generated = normal(60, 3, seed=1), normal(50, 3, seed=2) * 0.5 + 0.3
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    found = precision_recall(
        torch.from_numpy(generated), torch.from_numpy(real), block=block, on_block=count
    )
    assert (found.precision, found.recall) == pytest.approx(naive(generated, real, 3))
    assert 0.2 < found.recall < found.precision
    assert calls == blocks(50, 60, block)


def test_precision_falls_with_quality_and_recall_with_variety() -> None:
    real = torch.from_numpy(normal(500, 2, seed=1))
    few_modes = torch.from_numpy(normal(500, 2, seed=2) * 0.1)
    noise = torch.from_numpy(normal(500, 2, seed=3) * 10)
    kept, spoiled = precision_recall(few_modes, real), precision_recall(noise, real)
    assert kept.precision > 0.95
    assert kept.recall < 0.2
    assert spoiled.precision < 0.2
    assert spoiled.recall > 0.9
    with pytest.raises(UserError, match="more than 3 images on each side"):
        precision_recall(real[:3], real)


# Orders


def test_orders_are_permutations_and_sides_differ() -> None:
    one, other = shuffled(1000, REAL), shuffled(1000, GENERATED)
    assert sorted(one.tolist()) == sorted(other.tolist()) == list(range(1000))
    assert (one != other).mean() > 0.9
    assert shuffled(5, REAL).tolist() == [4, 1, 0, 2, 3]  # the same for ever
    # Uncorrelated with the order of the images.
    assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.1


def test_evenly_spaced_reaches_over_the_whole() -> None:
    assert evenly_spaced(10, 10).tolist() == list(range(10))
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert len(set(evenly_spaced(1797, 1000).tolist())) == 1000


# Digits


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_the_classifier_generalizes(kept: Path) -> None:
    classifier = digit_classifier(8, kept)
    _, unseen = seen_and_unseen(real_digits(8))
    assert (classifier.classify(unseen.images) == unseen.labels).mean() > 0.95
    shares = classifier.probabilities(unseen.images)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-12)
    assert (shares.argmax(1) == classifier.classify(unseen.images)).all()
    assert classifier.features(unseen.images).shape == (450, 128)
    assert classifier.size == 8


def test_the_classifier_is_scikit_learns_and_is_kept(kept: Path) -> None:
    seen, unseen = seen_and_unseen(real_digits(8))
    network = MLPClassifier((128,), alpha=1e-2, max_iter=300, random_state=0)
    network.fit(seen.images.reshape(len(seen.images), -1) / 255, seen.labels)
    expected = network.predict_proba(unseen.images.reshape(len(unseen.images), -1) / 255)
    classifier = digit_classifier(8, kept)
    np.testing.assert_allclose(classifier.probabilities(unseen.images), expected, atol=1e-12)
    (file,) = kept.iterdir()
    before = file.stat().st_mtime_ns
    assert digit_classifier(8, kept).hash == classifier.hash
    assert file.stat().st_mtime_ns == before
