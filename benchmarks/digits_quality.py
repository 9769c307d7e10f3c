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
import tyro
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from tqdm import tqdm

from ddpm_engine.data import fit, open_source
from ddpm_engine.errors import exit_on_user_error
from ddpm_engine.evaluation.pictures import to_uint8
from ddpm_engine.pretrained import load_pretrained
from ddpm_engine.samplers import sample

SURE = 0.9


@dataclass(frozen=True)
class Options:
    """Classify pictures drawn by a model of the digits."""

    checkpoint: Path = Path("runs/digits")
    """A run directory."""
    count: int = 512
    """How many pictures to draw."""
    seed: int = 1
    """Of their noise; the demo's own grid has seed 0."""
    steps: int | None = None
    """Network evaluations a picture; default: what the run was configured with."""


def features(images: np.ndarray) -> np.ndarray:
    """Pixels as numbers in [0, 1]: uint8 `[N, H, W, C]` to float `[N, H·W·C]`."""
    return images.reshape(len(images), -1) / 255


def main() -> None:
    """Train the classifier, draw, classify, report."""
    with exit_on_user_error():
        options = tyro.cli(Options)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        pretrained = load_pretrained(options.checkpoint, device)
        config = pretrained.config
        examples = list(open_source("digits").examples)
        real = np.stack([fit(example.image, config.model.sample_size) for example in examples])
        labels = np.array([example.label for example in examples])
        seen, unseen, seen_labels, unseen_labels = train_test_split(
            features(real), labels, test_size=0.25, random_state=0, stratify=labels
        )
        classifier = MLPClassifier((128,), alpha=1e-2, max_iter=300, random_state=0)
        classifier.fit(seen, seen_labels)

        steps = options.steps or config.sampling.steps or config.diffusion.timesteps
        total = options.count * steps
        with tqdm(total=total, unit="img·step", disable=not sys.stderr.isatty()) as bar:
            drawn = sample(
                pretrained.model,
                pretrained.schedule,
                sample_ids=range(options.count),
                seed=options.seed,
                sampler=config.sampling.sampler,
                steps=steps,
                spacing=config.sampling.spacing,
                variance=config.sampling.variance,
                prediction=config.diffusion.prediction,
                clip=pretrained.clip,
                on_step=bar.update,
            )
        confidence = classifier.predict_proba(features(to_uint8(drawn)))
        report = {
            "checkpoint_step": pretrained.step,
            "count": options.count,
            "sampling_steps": steps,
            "sure_of_drawn": float((confidence.max(1) > SURE).mean()),
            "sure_of_unseen_real": float((classifier.predict_proba(unseen).max(1) > SURE).mean()),
            "accuracy_on_unseen_real": classifier.score(unseen, unseen_labels),
            "drawn_of_each_class": np.bincount(confidence.argmax(1), minlength=10).tolist(),
        }
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
