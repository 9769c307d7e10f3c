"""Benefit and cost of guidance: `python benchmarks/guidance.py --checkpoint RUN`.

A class-conditional model of the digits samples the same noise and classes at several guidance
scales. At each scale are reported

    accuracy     the share of samples that a classifier of real digits assigns to their class
    variety      the variance of that classifier's features within a class (the sum over features,
                 the mean over classes), as a share of that of real digits
    recall       the share of real digits within the manifold of the samples (Kynkäänniemi et al.
                 2019)
    distance     the Fréchet distance to real digits in those features

As the scale rises, accuracy should rise, and variety and recall fall (Ho & Salimans 2022).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import numpy as np
import torch
from benchmarks.throughput.digits import DigitMetrics, in_turn, load
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import write_json

from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_error, parse_options
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import CLASSES, seen_and_unseen
from ddpm_engine.evaluation.metrics import classified_as_conditioned, compute
from ddpm_engine.evaluation.precision_recall import precision_recall
from ddpm_engine.plots.style import COLOURS, MARKS, saved
from ddpm_engine.runtime import local_device
from ddpm_engine.samplers.config import SamplerName


@dataclass(frozen=True)
class Options:
    """Accuracy and variety of classes against the guidance scale."""

    checkpoint: Path = Path("runs/digits-classes")
    """Run directory of a class-conditional model of the digits."""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """Guidance scales, ascending; 1 is no guidance."""
    count: Positive = 1000
    """Samples at each scale, of all classes in turn."""
    seed: int = 1
    """Seed of their noise; the demo's own samples have seed 0."""
    sampler: SamplerName | None = None
    """Name of the sampler; default: the run's."""
    steps: PositiveOrNone = None
    """Steps per sample; default: the run's."""
    batch_size: Positive = 128
    """Samples at a time."""
    json: Path | None = None
    """File for everything, as JSON."""
    plot: Path | None = None
    """File for a plot of the curves."""


def spread(features: np.ndarray, labels: np.ndarray) -> float:
    """Variance of features within a class: their sum, then the mean over classes."""
    each = [features[labels == label].var(0, ddof=1).sum() for label in np.unique(labels)]
    return float(np.mean(each))


def measure(images: np.ndarray, labels: np.ndarray, digits: DigitMetrics) -> dict[str, Any]:
    """What is reported at one scale."""
    generated, real = digits.features(images, labels.tolist()), digits.real
    right = classified_as_conditioned(generated)
    a, b = generated.features(), real.features()
    return {
        "accuracy": float(right.mean()),
        "accuracy_by_class": [float(right[labels == c].mean()) for c in np.unique(labels)],
        "variety": spread(a, labels) / spread(b, digits.digits.labels),
        "recall": precision_recall(torch.from_numpy(a), torch.from_numpy(b)).recall,
        "distance": compute(generated, real, ["fid"])["fid"]["distance"],
    }


def plot(points: Sequence[dict[str, Any]], accuracy_of_real: float, path: Path) -> None:
    """Accuracy above, variety and recall in the middle, distance below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scales = [point["scale"] for point in points]
    lines = [("accuracy", 0), ("variety", 1), ("recall", 1), ("distance", 2)]
    with saved(path, 6.4, 6.6, 3) as (_, axes):
        panels = axes[:, 0]
        for k, (name, panel) in enumerate(lines):
            values = [point[name] for point in points]
            panels[panel].plot(scales, values, MARKS[k] + "-", color=COLOURS[k], label=name)
        panels[0].axhline(
            accuracy_of_real, color="#000000", linestyle=":", label="real digits, unseen"
        )
        panels[0].set_ylabel("share")
        panels[1].set_ylabel("share")
        panels[2].set(ylabel="Fréchet distance", xlabel="guidance scale")
        for panel in panels:
            panel.grid(alpha=0.3)
            panel.legend()


def main() -> None:
    """Sample at each scale, measure, report."""
    with exit_on_error(Options):
        options = parse_options(Options)
        device = local_device()
        model = load(options.checkpoint, device)
        if model.spec.null_class != CLASSES:
            raise UserError(
                f"`checkpoint` {options.checkpoint} is no model of ten digits", field="checkpoint"
            )
        digits = DigitMetrics.of_size(model.shape[-1])
        labels = np.array(in_turn(options.count))
        chosen: dict[str, Any] = {"sampler": options.sampler, "steps": options.steps}
        given = {name: value for name, value in chosen.items() if value is not None}
        points = []
        for scale in options.scales:
            samples = model.sample(
                options.count, batch_size=options.batch_size, seed=options.seed, guidance=scale,
                classes="all", **given,
            )  # fmt: skip
            found = measure(model.codec.decode(samples.tensor), labels, digits)
            points.append({"scale": scale, **found})
            print(
                f"scale {scale:<4g}  accuracy {found['accuracy']:.1%}  "
                f"variety {found['variety']:.2f}  recall {found['recall']:.2f}  "
                f"distance {found['distance']:.3f}",
                flush=True,
            )
        unseen = seen_and_unseen(digits.digits)[1]
        of_unseen = digits.features(unseen.images, unseen.labels.tolist())
        accuracy_of_real = float(classified_as_conditioned(of_unseen).mean())
        print(f"real digits that the classifier never saw: {accuracy_of_real:.1%}")
        if options.json is not None:
            settings = {
                "count": options.count,
                "seed": options.seed,
                "sampler": options.sampler or model.sampling.sampler,
                "steps": options.steps or model.sampling.steps or model.schedule.timesteps,
            }
            report = {
                "machine": facts(device),
                "checkpoint": f"{options.checkpoint}, step {model.step}",
                "settings": settings,
                "accuracy_of_real": accuracy_of_real,
                "points": points,
            }
            write_json(options.json, report)
        if options.plot is not None:
            plot(points, accuracy_of_real, options.plot)


if __name__ == "__main__":
    main()
