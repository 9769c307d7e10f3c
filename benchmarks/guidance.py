"""What guidance buys and what it costs: `python benchmarks/guidance.py --checkpoint RUN`.

The same noise and the same classes are drawn at several guidance scales by a class-conditional
model of the digits. At each scale are reported

    accuracy     the share of pictures that a classifier of real digits takes for the class asked
    variety      the variance of that classifier's features within a class (the sum over features,
                 the mean over classes), as a share of that of real digits
    recall       the share of real digits that lie among the drawn ones (Kynkäänniemi et al. 2019)
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
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import write_json
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_user_error, parse_options
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import (
    DigitClassifier,
    Digits,
    digit_classifier,
    real_digits,
    seen_and_unseen,
)
from ddpm_engine.evaluation.fid import frechet_distance, moments
from ddpm_engine.evaluation.precision_recall import precision_recall
from ddpm_engine.samplers.config import SamplerName
from ddpm_engine.samplers.sampler import Sampler


@dataclass(frozen=True)
class Options:
    """Accuracy and variety of classes against the guidance scale."""

    checkpoint: Path = Path("runs/digits-classes")
    """A run directory of a class-conditional model of the digits."""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """Guidance scales, ascending; 1 is no guidance."""
    count: Positive = 1000
    """Pictures at each scale, of all classes in turn."""
    seed: int = 1
    """Of their noise; the demo's own pictures have seed 0."""
    sampler: SamplerName | None = None
    """Which one; default: the run's."""
    steps: PositiveOrNone = None
    """Steps a picture; default: the run's."""
    batch_size: Positive = 128
    """Pictures at a time."""
    json: Path | None = None
    """Write everything into this file."""
    plot: Path | None = None
    """Draw the curves into this file."""


def drawn_pictures(
    pretrained: LoadedModel, options: Options, scale: float, bar: tqdm[Any]
) -> np.ndarray:
    """Samples 0 … N − 1 of the seed, of all classes in turn: uint8 `[N, H, W, 1]`."""
    chosen: dict[str, Any] = {"sampler": options.sampler, "steps": options.steps}
    given = {name: value for name, value in chosen.items() if value is not None}
    request = pretrained.request(seed=options.seed, guidance=scale, **given)
    return Sampler(pretrained, request).images(
        range(options.count), batch_size=options.batch_size, on_step=bar.update
    )


def spread(features: np.ndarray, labels: np.ndarray) -> float:
    """Variance of features within a class: their sum, and then the mean over classes."""
    each = [features[labels == label].var(0, ddof=1).sum() for label in np.unique(labels)]
    return float(np.mean(each))


def measure(
    pictures: np.ndarray, labels: np.ndarray, classifier: DigitClassifier, real: Digits
) -> dict[str, Any]:
    """What is reported at one scale."""
    features, theirs = classifier.features(pictures), classifier.features(real.images)
    right = classifier.classify(pictures) == labels
    return {
        "accuracy": float(right.mean()),
        "accuracy_by_class": [float(right[labels == c].mean()) for c in np.unique(labels)],
        "variety": spread(features, labels) / spread(theirs, real.labels),
        "recall": precision_recall(torch.from_numpy(features), torch.from_numpy(theirs)).recall,
        "distance": frechet_distance(moments([features]), moments([theirs])),
    }


def plot(points: Sequence[dict[str, Any]], accuracy_of_real: float, path: Path) -> None:
    """Accuracy above, variety and recall in the middle, distance below."""
    figure = Figure(figsize=(6.4, 6.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    scales = [point["scale"] for point in points]

    def line(axes: Any, name: str, colour: str, mark: str) -> None:
        values = [point[name] for point in points]
        axes.plot(scales, values, mark + "-", color=colour, label=name)

    line(panels[0], "accuracy", "#0072B2", "o")
    panels[0].axhline(accuracy_of_real, color="#000000", linestyle=":", label="real digits, unseen")
    panels[0].set_ylabel("share classified as asked")
    line(panels[1], "variety", "#D55E00", "s")
    line(panels[1], "recall", "#009E73", "^")
    panels[1].set_ylabel("share")
    line(panels[2], "distance", "#000000", "D")
    panels[2].set(ylabel="Fréchet distance", xlabel="guidance scale")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Draw at each scale, measure, report."""
    with exit_on_user_error():
        options = parse_options(Options)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        pretrained = load_model(options.checkpoint, device)
        classes = pretrained.network.conditioning.null_class
        if classes != 10:
            raise UserError(f"--checkpoint {options.checkpoint} is no model of ten digits")
        size = pretrained.network.sample_shape[-1]
        classifier, real = digit_classifier(size), real_digits(size)
        labels = torch.arange(options.count, device=device) % classes
        steps = options.steps or pretrained.config.sampling.steps or pretrained.schedule.timesteps
        points = []
        with tqdm(
            total=len(options.scales) * options.count * steps, unit="img·step",
            disable=not sys.stderr.isatty(),
        ) as bar:  # fmt: skip
            for scale in options.scales:
                pictures = drawn_pictures(pretrained, options, scale, bar)
                found = measure(pictures, labels.cpu().numpy(), classifier, real)
                points.append({"scale": scale, **found})
                print(
                    f"scale {scale:<4g}  accuracy {found['accuracy']:.1%}  "
                    f"variety {found['variety']:.2f}  recall {found['recall']:.2f}  "
                    f"distance {found['distance']:.3f}",
                    flush=True,
                )
        unseen = seen_and_unseen(real)[1]
        accuracy_of_real = float((classifier.classify(unseen.images) == unseen.labels).mean())
        print(f"real digits that the classifier never saw: {accuracy_of_real:.1%}")
        report = {
            "machine": facts(device),
            "checkpoint": f"{options.checkpoint}, step {pretrained.step}",
            "settings": {
                "count": options.count,
                "seed": options.seed,
                "sampler": options.sampler or pretrained.config.sampling.sampler,
                "steps": steps,
            },
            "accuracy_of_real": accuracy_of_real,
            "points": points,
        }
        if options.json is not None:
            write_json(options.json, report)
        if options.plot is not None:
            plot(points, accuracy_of_real, options.plot)


if __name__ == "__main__":
    main()
