"""Steps that each sampler needs to draw digits as well as ddpm does in a thousand, and its speed.

Steps are raised until the Fréchet distance to the real digits, the median over some seeds, is at
most 5% above that of ddpm on all timesteps. Pictures are kept on disk as they are drawn, so that a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from benchmarks.throughput.frechet import Features, digit_features, frechet_distance, real_digits
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import aligned
from benchmarks.throughput.subject import Subject
from benchmarks.throughput.timing import interleaved, rates, speed_ups, timed

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.pictures import to_uint8
from ddpm_engine.samplers import sample

RESULT = Path(__file__).resolve().parents[1] / "results" / "equal_quality.json"
SAMPLERS = ("ddpm", "ddim", "dpm++2m", "unipc")
FEW = 50
"""Steps up to which the spread over seeds is cheap enough to measure."""


@dataclass(frozen=True)
class Settings:
    """How thoroughly quality is measured."""

    samples: int = 2000
    """Pictures for each distance."""
    seeds: int = 3
    """Distances for each number of steps up to 50; one beyond."""
    steps: tuple[int, ...] = (5, 10, 20, 25, 50, 100, 200, 500)
    """Which numbers of steps are tried, rising."""
    tolerance: float = 0.05
    """Allowed above the distance of ddpm on all timesteps."""
    batch: int = 250
    """Pictures at a time; also what is lost when a run is stopped."""
    rounds: int = 3
    """Repetitions of the timing at the end."""


TIMED = 64
"""Pictures of a timed repetition: what a thousand steps allow in a minute."""


class Gallery:
    """Pictures of a subject, drawn when they are first asked for and kept on disk.

    Args:
        subject: its compiled network draws.
        folder: where a folder of these weights is made.
        settings: how many, and how many at a time.
    """

    def __init__(self, subject: Subject, folder: Path, settings: Settings) -> None:
        self.subject, self.settings = subject, settings
        digest = hashlib.sha256()
        for name, weights in subject.weights.items():
            digest.update(name.encode() + weights.cpu().numpy().tobytes())
        self.folder = folder / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def draw(self, sampler: str, steps: int, seed: int, first: int, count: int) -> torch.Tensor:
        """Pictures first … first + count − 1 of a seed, float32 `[count, C, H, W]`."""
        config = self.subject.config
        return sample(
            self.subject.compiled,
            self.subject.schedule,
            sample_ids=torch.arange(first, first + count, device=self.subject.device),
            seed=seed,
            sampler=sampler,
            steps=steps,
            variance=config.sampling.variance,
            prediction=config.diffusion.prediction,
            batch_size=count,
        )

    def pictures(self, sampler: str, steps: int, seed: int) -> np.ndarray:
        """All pictures of a seed, uint8 `[N, H, W, C]`."""
        parts = []
        for first in range(0, self.settings.samples, self.settings.batch):
            count = min(self.settings.batch, self.settings.samples - first)
            path = self.folder / f"{sampler}-{steps}-{seed}-{first}-{count}.npy"
            if not path.exists():
                unfinished = path.with_suffix(".part")
                with unfinished.open("wb") as file:
                    np.save(file, to_uint8(self.draw(sampler, steps, seed, first, count)))
                unfinished.rename(path)
            parts.append(np.load(path))
        return np.concatenate(parts)


def run(
    subject: Subject, checkpoint: Path, settings: Settings, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measure; returns what is written to `RESULT`.

    Raises:
        UserError: the subject does not draw digits.
    """
    channels, size, _ = subject.unet.sample_shape
    if channels != 1:
        raise UserError(f"{subject.name} draws {channels}-channel images, no digits")
    machine = facts(subject.device)
    images, labels = real_digits(size)
    features = digit_features(images, labels)
    real = features(images)
    gallery = Gallery(subject, checkpoint / "equal_quality", settings)

    def point(sampler: str, steps: int) -> dict[str, Any]:
        seeds = settings.seeds if steps <= FEW else 1
        distances = []
        for seed in range(seeds):
            started = time.monotonic()
            distances.append(distance(gallery.pictures(sampler, steps, seed), features, real))
            spent = time.monotonic() - started
            progress(f"{sampler} {steps}, seed {seed}: {distances[-1]:.4f} ({spent:.0f} s)")
        return {
            "sampler": sampler,
            "steps": steps,
            "distance": median(distances),
            "distances": distances,
        }

    total = subject.schedule.timesteps
    standard = point("ddpm", total)
    limit = (1 + settings.tolerance) * standard["distance"]
    points = [standard]
    enough: dict[str, dict[str, Any]] = {}
    for sampler in SAMPLERS:
        for steps in settings.steps:
            points.append(point(sampler, steps))
            if points[-1]["distance"] <= limit:
                enough[sampler] = points[-1]
                break

    measure_speed(gallery, points, progress)
    return {
        "machine": machine,
        "subject": subject.name,
        "settings": asdict(settings),
        "distance_of_half_the_real_digits_to_the_other": frechet_distance(real[::2], real[1::2]),
        "limit": limit,
        "points": points,
        "enough": {sampler: found["steps"] for sampler, found in enough.items()},
    }


def distance(pictures: np.ndarray, features: Features, real: np.ndarray) -> float:
    """Of drawn pictures to real features."""
    return frechet_distance(features(pictures), real)


def measure_speed(
    gallery: Gallery, points: list[dict[str, Any]], progress: Callable[[str], None]
) -> None:
    """Time every point in turn and add its images a second, and the ratio to the first point's."""
    settings, device = gallery.settings, gallery.subject.device
    progress(f"timing {len(points)} points in turn, {settings.rounds} rounds")

    def work(point: dict[str, Any]) -> float:
        sampler, steps = point["sampler"], point["steps"]
        return timed(lambda: gallery.draw(sampler, steps, 0, 0, TIMED), device)

    keys = [f"{point['sampler']} {point['steps']}" for point in points]
    work({"sampler": "ddpm", "steps": 1})  # compiles
    works = {key: partial(work, point) for key, point in zip(keys, points, strict=True)}
    seconds = interleaved(settings.rounds, works)
    for key, point in zip(keys, points, strict=True):
        speed = rates(seconds[key], TIMED)
        point["images_per_second"] = speed.median
        point["images_per_second_quartiles"] = [speed.lower, speed.upper]
        point["speed_up"] = speed_ups(seconds[keys[0]], seconds[key]).median


def committed() -> dict[str, Any] | None:
    """The last full run's result, or None if there was none."""
    if not RESULT.exists():
        return None
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The steps that each sampler needs, and how fast it then is."""
    standard = found["points"][0]
    rows = []
    for sampler in SAMPLERS:
        steps = found["enough"].get(sampler)
        if steps is None:
            most = max(found["settings"]["steps"])
            rows.append([sampler, f"> {most}", "–", "–", "–"])
            continue
        point = next(p for p in found["points"] if (p["sampler"], p["steps"]) == (sampler, steps))
        spread = ", ".join(f"{value:.3f}" for value in point["distances"])
        rows.append(
            [
                sampler, str(steps), spread, f"{point['images_per_second']:.2f}",
                f"{point['speed_up']:.1f}",
            ]
        )  # fmt: skip
    machine, settings = found["machine"], found["settings"]
    name = f"ddpm-{standard['steps']}"
    return [
        f"Equal quality: Fréchet distance at most {settings['tolerance']:.0%} above "
        f"{name}'s {standard['distance']:.3f} ({standard['images_per_second']:.2f} images/s); "
        f"{settings['samples']} pictures, {found['subject']}",
        f"{machine['command']}; {machine['date']}; {machine['device']}, load average "
        f"{machine['load_average']}, commit {machine['commit'][:12]}",
        *aligned(["sampler", "steps", "distance of each seed", "images/s", f"×{name}"], rows),
    ]
