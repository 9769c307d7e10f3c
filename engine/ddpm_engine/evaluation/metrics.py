"""Compare the features of generated samples with those of real images.

Everything here is a pure function of features; where they come from is the caller's business.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.fid import FEWEST as FEWEST_FOR_FID
from ddpm_engine.evaluation.fid import Moments, frechet_distance, moments, refuse_not_finite
from ddpm_engine.evaluation.inception_score import FEWEST as FEWEST_FOR_IS
from ddpm_engine.evaluation.inception_score import inception_score
from ddpm_engine.evaluation.kid import FEWEST as FEWEST_FOR_KID
from ddpm_engine.evaluation.kid import kernel_distance
from ddpm_engine.evaluation.precision_recall import FEWEST as FEWEST_FOR_RECALL
from ddpm_engine.evaluation.precision_recall import blocks, precision_recall
from ddpm_engine.evaluation.subsets import evenly_spaced

METRICS = ("fid", "kid", "is", "precision-recall", "accuracy")

_FEWEST: dict[str, tuple[int, int]] = {
    "fid": (FEWEST_FOR_FID, FEWEST_FOR_FID),
    "kid": (FEWEST_FOR_KID, FEWEST_FOR_KID),
    "is": (FEWEST_FOR_IS, 0),
    "precision-recall": (FEWEST_FOR_RECALL, FEWEST_FOR_RECALL),
    "accuracy": (1, 0),
}
"""Samples and real images that each metric needs."""


@dataclass(frozen=True, eq=False)
class Features:
    """Output of a feature network for a set of images."""

    blocks: Callable[[], Iterable[NDArray[np.floating]]]
    """Yields the rows `[n, D + K]` block by block: D features, then K logits. Of real images the
    logits may be missing."""
    width: int
    """D."""
    labels: Sequence[int | None] | None = None
    """The class each image was conditioned on, if any."""
    known_moments: Moments | None = None
    """Moments of the features, if they are known."""

    @classmethod
    def of(
        cls, rows: NDArray[np.floating], width: int, labels: Sequence[int | None] | None = None
    ) -> Features:
        """Take rows `[N, D + K]` that are in memory as one block."""
        return cls(lambda: [rows], width, labels)

    def moments(self, device: torch.device | str = "cpu") -> Moments:
        """Return mean and covariance of the features, computed on a device if they are unknown."""
        return self.known_moments or moments(self._features(), device)

    def features(self) -> NDArray[np.floating]:
        """All features: `[N, D]`."""
        return np.concatenate(list(self._features()))

    def logits(self) -> NDArray[np.floating]:
        """All logits: `[N, K]`."""
        return np.concatenate([rows[:, self.width :] for rows in self._finite()])

    def _features(self) -> Iterator[NDArray[np.floating]]:
        return (rows[:, : self.width] for rows in self._finite())

    def _finite(self) -> Iterator[NDArray[np.floating]]:
        for rows in self.blocks():
            refuse_not_finite(rows)
            yield rows


def check_counts(metrics: Collection[str], samples: int, real: int) -> None:
    """Refuse metrics that there are too few images for.

    Args:
        metrics: of `METRICS`.
        samples: number of samples.
        real: number of real images.

    Raises:
        UserError: names every such metric.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise UserError(f"`metrics` has {unknown[0]!r}; there are {', '.join(METRICS)}", "metrics")
    few = [
        f"{name} needs at least {least} {what}, and there are {count}"
        for name in METRICS
        if name in metrics
        for least, count, what in zip(
            _FEWEST[name], (samples, real), ("samples", "real images"), strict=True
        )
        if count < least
    ]
    if few:
        raise UserError(
            f"{'; '.join(few)}: give more, or leave the metric out of `metrics`", "metrics"
        )


def check_labels(labels: Sequence[int | None]) -> None:
    """Refuse accuracy of samples that are of no class.

    Raises:
        UserError: one has none.
    """
    if unlabelled := sum(label is None for label in labels):
        raise UserError(
            f"`metrics` has accuracy, which needs the class of each sample, and {unlabelled} have "
            "none",
            field="metrics",
        )


def compute(
    generated: Features,
    real: Features,
    metrics: Collection[str],
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Compute metrics: JSON values by metric.

    Args:
        generated: of the samples.
        real: of the images they are compared with, by the same network.
        metrics: of `METRICS`.
        device: where moments and distances between features are computed.

    Raises:
        UserError: as `compute_one`.
    """
    return {name: compute_one(name, generated, real, device) for name in METRICS if name in metrics}


def compute_one(
    metric: str, generated: Features, real: Features, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Compute one metric: JSON values; arguments as in `compute`.

    Raises:
        UserError: too few images for the metric, no labels where it needs them, or features that
            are not finite.
    """
    if metric == "fid":
        sides = generated.moments(device), real.moments(device)
        return {"distance": frechet_distance(*sides, device)}
    if metric == "kid":
        return kernel_distance(generated.features(), real.features())._asdict()
    if metric == "is":
        return inception_score(generated.logits())._asdict()
    if metric == "precision-recall":
        return _precision_recall(generated, real, device)
    if metric == "accuracy":
        return {"share": float(classified_as_conditioned(generated).mean())}
    raise UserError(f"`metrics` has {metric!r}; there are {', '.join(METRICS)}", "metrics")


def classified_as_conditioned(generated: Features) -> NDArray[np.bool_]:
    """Which samples the network assigns to the class they were conditioned on: bool `[N]`.

    Raises:
        UserError: a sample has no class.
    """
    logits = generated.logits()
    labels = generated.labels or [None] * len(logits)
    check_labels(labels)
    return np.asarray(logits.argmax(1) == np.asarray(labels))


def _precision_recall(
    generated: Features, real: Features, device: torch.device | str
) -> dict[str, Any]:
    """As many of either side, evenly spaced, as the smaller has."""
    sides = [generated.features(), real.features()]
    count = min(map(len, sides))
    a, b = (torch.from_numpy(rows[evenly_spaced(len(rows), count)]).to(device) for rows in sides)
    with tqdm(
        total=blocks(count, count), desc="precision-recall", unit="block",
        disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        found = precision_recall(a, b, on_block=bar.update)
    return {**found._asdict(), "count": count}
