"""Steps that each sampler needs to draw digits as well as ddpm does in a thousand, and its speed.

Steps are raised until the Fréchet distance to the real digits is at most 5% above that of ddpm on
all timesteps. A seed's luck is larger than that, and samplers that begin from the same noise share
some of it: what is compared is the mean over the same seeds. What cached features cost is measured
as well.
Speeds are over that of the textbook loop, which draws the pictures of ddpm on all timesteps: that
it does is checked first. Pictures are kept on disk as they are drawn, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import aligned
from benchmarks.throughput.sampling import REFERENCE, Job, Way, check, reference_way
from benchmarks.throughput.subject import SEED, Subject
from benchmarks.throughput.timing import interleaved, rates, speed_ups, timed

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import digit_classifier, real_digits
from ddpm_engine.evaluation.frechet import frechet_distance, moments
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
    seeds: int = 1
    """Over which the distance is averaged; each is half an hour of ddpm on all timesteps."""
    spread: int = 3
    """Seeds for each number of steps up to 50, to show how far they differ."""
    steps: tuple[int, ...] = (5, 10, 15, 20, 25, 50, 100, 250)
    """Which numbers of steps are tried, rising."""
    tolerance: float = 0.05
    """Allowed above the distance of ddpm on all timesteps."""
    batch: int = 250
    """Pictures at a time; also what is lost when a run is stopped."""
    rounds: int = 3
    """Repetitions of the timing at the end."""


TIMED = 64
"""Pictures of a timed repetition: what a thousand steps allow in a minute."""


@dataclass(frozen=True)
class Method:
    """One way of drawing."""

    sampler: str
    steps: int
    cache_interval: int = 1
    """As in `sample`."""

    @property
    def name(self) -> str:
        """In tables and plots, apart from the steps."""
        cached = "" if self.cache_interval == 1 else f", cached ×{self.cache_interval}"
        return self.sampler + cached

    @property
    def file_name(self) -> str:
        """Beginning of the names of its pictures' files."""
        cached = "" if self.cache_interval == 1 else f"-cached{self.cache_interval}"
        return f"{self.sampler}-{self.steps}{cached}"


class Gallery:
    """Pictures of a subject, drawn when they are first asked for and kept on disk.

    Args:
        subject: its fastest network draws.
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

    def draw(self, method: Method, seed: int, first: int, count: int) -> torch.Tensor:
        """Pictures first … first + count − 1 of a seed, float32 `[count, C, H, W]`."""
        config = self.subject.config
        return sample(
            self.subject.fastest,
            self.subject.schedule,
            sample_ids=torch.arange(first, first + count, device=self.subject.device),
            seed=seed,
            sampler=method.sampler,
            steps=method.steps,
            cache_interval=method.cache_interval,
            variance=config.sampling.variance,
            prediction=config.diffusion.prediction,
            batch_size=count,
        )

    def pictures(self, method: Method, seed: int) -> np.ndarray:
        """All pictures of a seed, uint8 `[N, H, W, C]`."""
        parts = []
        for first in range(0, self.settings.samples, self.settings.batch):
            count = min(self.settings.batch, self.settings.samples - first)
            path = self.folder / f"{method.file_name}-{seed}-{first}-{count}.npy"
            if not path.exists():
                unfinished = path.with_suffix(".part")
                with unfinished.open("wb") as file:
                    np.save(file, to_uint8(self.draw(method, seed, first, count)))
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
    features = digit_classifier(size).features
    real = features(real_digits(size).images)
    all_real = moments([real])
    gallery = Gallery(subject, checkpoint / "equal_quality", settings)

    def point(method: Method) -> dict[str, Any]:
        seeds = max(settings.seeds, settings.spread) if method.steps <= FEW else settings.seeds
        distances = []
        for seed in range(seeds):
            started = time.monotonic()
            drawn = features(gallery.pictures(method, seed))
            distances.append(frechet_distance(moments([drawn]), all_real))
            spent = time.monotonic() - started
            progress(
                f"{method.name}, {method.steps} steps, seed {seed}: {distances[-1]:.4f} "
                f"({spent:.0f} s)"
            )
        return {
            **asdict(method),
            "name": method.name,
            "distance": mean(distances[: settings.seeds]),
            "distances": distances,
        }

    total = subject.schedule.timesteps
    same_pictures(gallery, total)
    standard = point(Method("ddpm", total))
    limit = (1 + settings.tolerance) * standard["distance"]
    points = [standard]
    enough: dict[str, dict[str, Any]] = {}
    for sampler in SAMPLERS:
        for steps in settings.steps:
            points.append(point(Method(sampler, steps)))
            if points[-1]["distance"] <= limit:
                enough[sampler] = points[-1]
                points.append(point(Method(sampler, steps, cache_interval=2)))
                break

    reference = measure_speed(gallery, points, progress)
    return {
        "machine": machine,
        "subject": subject.name,
        "settings": asdict(settings),
        "distance_of_half_the_real_digits_to_the_other": frechet_distance(
            moments([real[::2]]), moments([real[1::2]])
        ),
        "limit": limit,
        "reference": {
            "steps": total,
            "distance": standard["distance"],
            "distances": standard["distances"],
            **reference,
        },
        "points": points,
        "enough": {sampler: found["steps"] for sampler, found in enough.items()},
    }


def same_pictures(gallery: Gallery, steps: int) -> None:
    """Check that the textbook loop draws what ddpm on all timesteps draws.

    Raises:
        UserError: it does not; then its speed says nothing.
    """
    subject, count = gallery.subject, 2
    ours = Way(
        "ddpm",
        "ddpm",
        subject.fastest,
        lambda: gallery.draw(Method("ddpm", steps), SEED, 0, count),
        standard=reference_way(subject, Job(count, steps)),
    )
    if (problem := check(ours, {}, subject.device).problem) is not None:
        raise UserError(f"the engine and the textbook loop draw different pictures: {problem}")


def measure_speed(
    gallery: Gallery, points: list[dict[str, Any]], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Time the textbook loop and every point in turn; add to each its speed, and over the loop's.

    Returns:
        The speed of the textbook loop.
    """
    settings, subject = gallery.settings, gallery.subject
    progress(f"timing {len(points)} points and the reference in turn, {settings.rounds} rounds")

    def time_point(point: dict[str, Any]) -> float:
        method = Method(point["sampler"], point["steps"], point["cache_interval"])
        return timed(lambda: gallery.draw(method, SEED, 0, TIMED), subject.device)

    textbook = reference_way(subject, Job(TIMED, subject.schedule.timesteps))
    works: dict[str, Callable[[], float]] = {
        REFERENCE: lambda: timed(textbook.draw, subject.device)
    }
    keys = [f"{point['name']} {point['steps']}" for point in points]
    works |= {key: partial(time_point, point) for key, point in zip(keys, points, strict=True)}
    time_point({"sampler": "ddpm", "steps": 1, "cache_interval": 1})  # compiles
    seconds = interleaved(settings.rounds, works)

    def speed(key: str) -> dict[str, Any]:
        found = rates(seconds[key], TIMED)
        return {
            "images_per_second": found.median,
            "images_per_second_quartiles": [found.lower, found.upper],
            "speed_up": speed_ups(seconds[REFERENCE], seconds[key]).median,
        }

    for key, point in zip(keys, points, strict=True):
        point |= speed(key)
    return speed(REFERENCE)


def committed() -> dict[str, Any] | None:
    """The last full run's result, or None if there was none."""
    if not RESULT.exists():
        return None
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The steps that each sampler needs, and how fast it then is."""
    reference = found["reference"]

    def row(name: str, point: dict[str, Any]) -> list[str]:
        spread = ", ".join(f"{value:.3f}" for value in point["distances"])
        rate, faster = point["images_per_second"], point["speed_up"]
        return [name, str(point["steps"]), spread, f"{rate:.2f}", f"{faster:.1f}"]

    rows = [row(REFERENCE, reference)]
    for sampler in SAMPLERS:
        steps = found["enough"].get(sampler)
        if steps is None:
            most = max(found["settings"]["steps"])
            rows.append([sampler, f"> {most}", "–", "–", "–"])
        rows += [
            row(point["name"], point)
            for point in found["points"]
            if (point["sampler"], point["steps"]) == (sampler, steps)
        ]
    machine, settings = found["machine"], found["settings"]
    return [
        f"Equal quality: Fréchet distance, mean of the first {settings['seeds']} seeds, at most "
        f"{settings['tolerance']:.0%} above {reference['distance']:.3f}, which ddpm has on all "
        f"{reference['steps']} timesteps; {settings['samples']} pictures a seed; "
        f"{found['subject']}",
        f"{machine['command']}; {machine['date']}; {machine['device']}, load average "
        f"{machine['load_average']}, commit {machine['commit'][:12]}",
        *aligned(["method", "steps", "distance of each seed", "images/s", "×ref"], rows),
    ]
