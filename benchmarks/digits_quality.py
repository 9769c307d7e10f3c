"""How good are the digits? `python benchmarks/digits_quality.py --checkpoint runs/digits`.

A small classifier is trained on three quarters of the real digits. Reported are the share of drawn
pictures that it is sure of, next to the share of real digits it has never seen, and how many
pictures of each class were drawn. A model that draws noise, or one digit only, shows at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_user_error, parse_options
from ddpm_engine.evaluation.digits import digit_classifier, real_digits, seen_and_unseen
from ddpm_engine.samplers.sampler import Sampler

SURE = 0.9


@dataclass(frozen=True)
class Options:
    """Classify pictures drawn by a model of the digits."""

    checkpoint: Path = Path("runs/digits")
    """A run directory."""
    count: Positive = 512
    """How many pictures to draw."""
    seed: int = 1
    """Of their noise; the demo's own grid has seed 0."""
    steps: PositiveOrNone = None
    """Network evaluations a picture; default: what the run was configured with."""


def main() -> None:
    """Train the classifier, draw, classify, report."""
    with exit_on_user_error():
        options = parse_options(Options)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        pretrained = load_model(options.checkpoint, device)
        config = pretrained.config
        size = config.model.sample_size
        classifier = digit_classifier(size)
        _, unseen = seen_and_unseen(real_digits(size))
        of_unseen = classifier.probabilities(unseen.images)

        steps = options.steps or config.sampling.steps or config.diffusion.timesteps
        total = options.count * steps
        # Of no class, so that it shows which ones the model prefers.
        request = pretrained.request(seed=options.seed, steps=steps, classes="none")
        with tqdm(total=total, unit="img·step", disable=not sys.stderr.isatty()) as bar:
            images = Sampler(pretrained, request).images(range(options.count), on_step=bar.update)
        confidence = classifier.probabilities(images)
        report = {
            "checkpoint_step": pretrained.step,
            "count": options.count,
            "sampling_steps": steps,
            "sure_of_drawn": float((confidence.max(1) > SURE).mean()),
            "sure_of_unseen_real": float((of_unseen.max(1) > SURE).mean()),
            "accuracy_on_unseen_real": float((of_unseen.argmax(1) == unseen.labels).mean()),
            "drawn_of_each_class": np.bincount(confidence.argmax(1), minlength=10).tolist(),
        }
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
