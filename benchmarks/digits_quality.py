"""Quality of generated digits: `python benchmarks/digits_quality.py --checkpoint runs/digits`.

A small classifier is trained on three quarters of the real digits. Reported are the share of
samples that it is confident about, next to the share of real digits it has never seen, and the
number of samples of each class. A model that generates noise, or one digit only, shows at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import numpy as np
from benchmarks.throughput.digits import load

from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_error, parse_options
from ddpm_engine.evaluation.digits import digit_classifier, real_digits, seen_and_unseen
from ddpm_engine.runtime import local_device

CONFIDENT = 0.9


@dataclass(frozen=True)
class Options:
    """Classify the samples of a model of the digits."""

    checkpoint: Path = Path("runs/digits")
    """Run directory."""
    count: Positive = 512
    """Number of samples."""
    seed: int = 1
    """Seed of their noise; the demo's own grid has seed 0."""
    steps: PositiveOrNone = None
    """Steps per sample; default: the run's."""


def main() -> None:
    """Train the classifier, sample, classify, report."""
    with exit_on_error(Options):
        options = parse_options(Options)
        model = load(options.checkpoint, local_device())
        size = model.shape[-1]
        classifier = digit_classifier(size)
        _, unseen = seen_and_unseen(real_digits(size))
        of_unseen = classifier.probabilities(unseen.images)
        steps = options.steps or model.sampling.steps or model.schedule.timesteps
        # Unconditional, to see which classes the model prefers.
        samples = model.sample(options.count, seed=options.seed, steps=steps, classes="none")
        confidence = classifier.probabilities(model.codec.decode(samples.tensor))
        report = {
            "checkpoint_step": model.step,
            "count": options.count,
            "sampling_steps": steps,
            "confident_samples": float((confidence.max(1) > CONFIDENT).mean()),
            "confident_unseen_real": float((of_unseen.max(1) > CONFIDENT).mean()),
            "accuracy_on_unseen_real": float((of_unseen.argmax(1) == unseen.labels).mean()),
            "samples_by_class": np.bincount(confidence.argmax(1), minlength=10).tolist(),
        }
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
