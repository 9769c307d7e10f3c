"""What metrics are computed in, and that neither decoding nor a device's pace changes them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_engine.evaluation.feature_networks import InceptionFeatures
from ddpm_engine.evaluation.fid import Moments, frechet_distance, moments
from ddpm_engine.evaluation.report import ARITHMETIC, write_report
from ddpm_engine.runtime import without_tf32

SWITCHES: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)


def allowed() -> list[bool]:
    return [switch.allow_tf32 for switch in SWITCHES]


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_off_within_and_as_before_afterwards(before: bool) -> None:
    kept = allowed()
    try:
        for switch in SWITCHES:
            switch.allow_tf32 = before
        with without_tf32():
            assert allowed() == [False, False]
        assert allowed() == [before, before]
        with suppress(ValueError), without_tf32():
            raise ValueError
        assert allowed() == [before, before]
    finally:
        for switch, value in zip(SWITCHES, kept, strict=True):
            switch.allow_tf32 = value


def test_a_report_says_what_was_computed_in_what(tmp_path: Path) -> None:
    path = write_report(tmp_path, {"inputs": 1}, {"fid": {"distance": 1.0}}, {})
    assert json.loads(path.read_text())["arithmetic"] == ARITHMETIC


def numpy_moments(features: np.ndarray) -> Moments:
    return Moments(len(features), features.mean(0), np.cov(features, rowvar=False))


def numpy_distance(a: Moments, b: Moments) -> float:
    """As it was computed before any device could."""

    def root(covariance: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(covariance)
        noise = values.max() * len(values) * np.finfo(np.float64).eps
        return np.asarray(vectors * np.sqrt(np.where(values > noise, values, 0)))

    trace = np.linalg.svd(root(a.covariance).T @ root(b.covariance), compute_uv=False).sum()
    apart = a.mean - b.mean
    return float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace)


@pytest.mark.parametrize(("count", "width"), [(400, 24), (20, 48)])
def test_the_frechet_distance_is_numpys(count: int, width: int) -> None:
    """Also of fewer images than features, whose covariances are singular."""
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(count, width)) * 3 + 100).astype(np.float32)
    b = (rng.normal(size=(count, width)) @ rng.normal(size=(width, width))).astype(np.float32)
    ours = moments(np.array_split(a, 7)), moments([b])
    theirs = numpy_moments(a.astype(np.float64)), numpy_moments(b.astype(np.float64))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-12)
        np.testing.assert_allclose(one.covariance, other.covariance, rtol=1e-9, atol=1e-9)
    assert frechet_distance(*ours) == pytest.approx(numpy_distance(*theirs), rel=1e-9)


def test_halves_are_evaluated_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, its copies stood for by tensors that are there."""

    class Means(torch.nn.Linear):
        def forward(self, pixels: torch.Tensor) -> Any:
            return pixels.float().mean((2, 3)), pixels[:, :1, 0, 0].float()

    network: Any = Means(1, 1)
    features = InceptionFeatures(network, "")
    images = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    expected = features(images)
    sizes: list[int] = []

    def uploaded(half: np.ndarray, _: object) -> torch.Tensor:
        sizes.append(len(half))
        return torch.from_numpy(half)

    monkeypatch.setattr(features, "_uploads", object())
    monkeypatch.setattr(features, "_uploaded", uploaded)
    for count, halves in ((5, [3, 2]), (1, [1])):
        sizes.clear()
        started = features.start(images[:count])
        assert sizes == halves
        assert callable(started)
        assert np.array_equal(started(), expected[:count])
