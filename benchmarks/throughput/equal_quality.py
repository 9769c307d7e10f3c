"""Evaluations that each way needs to draw digits as well as ddpm does in a thousand, and its speed.

Steps are raised until the Fréchet distance to the real digits is at most 5% above that of ddpm on
all timesteps. A seed's luck is larger than that, and samplers that begin from the same noise share
some of it: what is compared is the mean over the same seeds. What cached features cost is measured
as well, and distilled networks in the steps that they were made for.

Speeds are over that of the textbook loop, which draws the pictures of ddpm on all timesteps: that
it does is checked first, and so is that the textbook's few lines of DDIM draw what a distilled
network does. Diffusers' pipelines draw what the engine draws, which is checked as well, and are
timed beside it. Pictures are kept on disk as they are drawn, so that a run that was stopped goes on
where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from benchmarks.throughput.gallery import Gallery, Method, student_method
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import aligned
from benchmarks.throughput.sampling import REFERENCE, Job, Way, check, peer_way, reference_way
from benchmarks.throughput.subject import SEED, Subject
from benchmarks.throughput.timing import interleaved, rates, speed_ups, timed

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import digit_classifier, real_digits
from ddpm_engine.evaluation.fid import frechet_distance, moments
from ddpm_engine.samplers.timesteps import spaced_timesteps

RESULT = Path(__file__).resolve().parents[1] / "results" / "equal_quality.json"
SAMPLERS = ("ddpm", "ddim", "dpm++2m", "unipc")
FEW = 10
"""Steps up to which the spread over seeds is cheap enough to measure."""


@dataclass(frozen=True)
class Settings:
    """How thoroughly quality is measured."""

    samples: int = 2000
    """Pictures for each distance."""
    seeds: int = 1
    """Over which the distance is averaged; each is half an hour of ddpm on all timesteps."""
    spread: int = 3
    """Seeds for each number of steps up to 10, to show how far they differ."""
    steps: tuple[int, ...] = (5, 10, 15, 20, 25, 50, 100, 250)
    """Which numbers of steps are tried, rising."""
    tolerance: float = 0.05
    """Allowed above the distance of ddpm on all timesteps."""
    batch: int = 250
    """Pictures at a time; also what is lost when a run is stopped."""
    rounds: int = 3
    """Repetitions of the timing at the end."""


USUAL = 25
"""Steps of diffusers' pipelines where no number that was tried is enough."""
TIMED = 64
"""Pictures of a timed repetition: what a thousand steps allow in a minute."""
COMPARED = 2
"""Pictures by which two ways are compared."""


def run(
    subject: Subject,
    students: Mapping[str, Subject],
    folder: Path,
    settings: Settings,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure; returns what is written to `RESULT`.

    Args:
        subject: whose pictures in all its timesteps are the standard.
        students: distilled from it, as in `Gallery`; each draws in the steps that it was made for.
        folder: keeps the pictures.
        settings: how thoroughly.
        progress: is told what is going on.

    Raises:
        UserError: the subject does not draw digits, or a way draws other pictures than it should.
    """
    channels, size, _ = subject.unet.sample_shape
    if channels != 1:
        raise UserError(f"{subject.name} draws {channels}-channel images, no digits")
    machine = facts(subject.device)
    features = digit_classifier(size).features
    real = features(real_digits(size).images)
    all_real = moments([real])
    gallery = Gallery(subject, folder, settings.batch, students)

    def point(method: Method) -> dict[str, Any]:
        seeds = max(settings.seeds, settings.spread) if method.steps <= FEW else settings.seeds
        distances = []
        for seed in range(seeds):
            started = time.monotonic()
            drawn = features(gallery.pictures(method, seed, settings.samples))
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
    textbook = textbook_way(gallery, Method("ddpm", total))
    same_pictures(gallery, Method("ddpm", total), textbook)
    standard = point(Method("ddpm", total))
    limit = (1 + settings.tolerance) * standard["distance"]
    points = [standard]
    enough: dict[str, int] = {}
    for sampler in SAMPLERS:
        for steps in settings.steps:
            points.append(point(Method(sampler, steps)))
            if points[-1]["distance"] <= limit:
                enough[sampler] = steps
                points.append(point(Method(sampler, steps, cache_interval=2)))
                break
    for name, student in students.items():
        method = student_method(name, student)
        same_pictures(gallery, method, textbook_way(gallery, method))
        points.append(point(method))
        if points[-1]["distance"] <= limit:
            enough[method.name] = min(method.steps, enough.get(method.name, method.steps))

    theirs = [Method("ddpm", total)]
    for sampler, clip in [("ddim", True), ("dpm++2m", False)]:
        theirs.append(Method(sampler, enough.get(sampler, min(USUAL, total)), clip=clip))
    peers = peer_points(gallery, theirs, point)
    reference = measure_speed(gallery, points, peers, settings.rounds, progress)
    return {
        "machine": machine,
        "subject": subject.name,
        "students": {name: student.name for name, student in students.items()},
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
        "peers": peers,
        "enough": enough,
    }


def textbook_way(gallery: Gallery, method: Method) -> Way:
    """The same pictures in the textbook's words."""
    if method.student is None:
        return reference_way(gallery.subject, Job(COMPARED, method.steps))
    student = gallery.students[method.student]
    return Way(
        REFERENCE, method.sampler, student.unet,
        lambda: by_hand(student, COMPARED, method), textbook_noise=True,
    )  # fmt: skip


@torch.inference_mode()
def by_hand(subject: Subject, count: int, method: Method) -> torch.Tensor:
    """DDIM, for a network that predicts v (Song et al. 2021, equations 12 and 16).

    Without noise, or with so much that it is ancestral sampling with the smaller variance.
    """
    eta = {"ddim": 0.0, "ddpm": 1.0}[method.sampler]
    if subject.config.diffusion.prediction != "v":
        raise UserError(f"{subject.name} predicts {subject.config.diffusion.prediction}, not v")
    alpha_bar = torch.cat([subject.schedule.alpha_bar, torch.ones(1).double()]).float()
    timesteps = spaced_timesteps(subject.schedule.timesteps, method.steps, "trailing")
    visited = [*timesteps.tolist(), -1]
    x = torch.randn((count, *subject.unet.sample_shape))
    for t, after in pairwise(visited):
        a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        v = subject.unet(x, torch.full((count,), t))
        x0 = (a * x - s * v).clamp(-1, 1)
        noise = (x - a * x0) / s
        alpha = alpha_bar[t] / alpha_bar[after]
        fresh = eta * ((1 - alpha_bar[after]) / (1 - alpha_bar[t]) * (1 - alpha)).sqrt()
        x = alpha_bar[after].sqrt() * x0 + (1 - alpha_bar[after] - fresh**2).sqrt() * noise
        if fresh > 0:
            x += fresh * torch.randn(x.shape)
    return x


def same_pictures(gallery: Gallery, method: Method, standard: Way) -> None:
    """Check that a method draws the pictures of another way.

    Raises:
        UserError: it does not; then speeds of the two say nothing.
    """
    drawing = gallery.network(method)
    ours = Way(
        method.name, method.sampler, drawing.fastest,
        lambda: gallery.draw(method, SEED, 0, COMPARED), standard=standard,
    )  # fmt: skip
    if (problem := check(ours, {}, drawing.device).problem) is not None:
        raise UserError(
            f"the engine ({method.name}) and {standard.name} draw different pictures: {problem}"
        )


def peer_points(
    gallery: Gallery, methods: list[Method], point: Callable[[Method], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Diffusers' ways to draw what the engine draws: quality is the engine's. Empty without it."""
    found = []
    for method in methods:
        way = peer_way(gallery.subject, Job(COMPARED, method.steps), method.sampler, "trailing")
        if way is not None:
            same_pictures(gallery, method, way)
            found.append({**point(method), "name": way.name})
    return found


def measure_speed(
    gallery: Gallery,
    points: list[dict[str, Any]],
    peers: list[dict[str, Any]],
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Time the textbook loop and every point in turn; add to each its speed, and over the loop's.

    Returns:
        The speed of the textbook loop.
    """
    subject, device = gallery.subject, gallery.subject.device
    progress(f"timing {len(points) + len(peers) + 1} ways in turn, {rounds} rounds")

    def ours(point: dict[str, Any]) -> Callable[[], object]:
        method = Method(point["sampler"], point["steps"], point["cache_interval"], point["student"])
        return partial(gallery.draw, method, SEED, 0, TIMED)

    def theirs(point: dict[str, Any]) -> Callable[[], object]:
        way = peer_way(subject, Job(TIMED, point["steps"]), point["sampler"], "trailing")
        assert way is not None
        return way.draw

    textbook = reference_way(subject, Job(TIMED, subject.schedule.timesteps))
    measured = {f"{point['name']} {point['steps']}": point for point in [*points, *peers]}
    draws: dict[str, Callable[[], object]] = {REFERENCE: textbook.draw}
    draws |= {f"{point['name']} {point['steps']}": ours(point) for point in points}
    draws |= {f"{point['name']} {point['steps']}": theirs(point) for point in peers}
    gallery.draw(Method("ddpm", 1), SEED, 0, TIMED)  # compiles
    seconds = interleaved(
        rounds, {name: partial(timed, draw, device) for name, draw in draws.items()}
    )

    def speed(key: str) -> dict[str, Any]:
        found = rates(seconds[key], TIMED)
        return {
            "images_per_second": found.median,
            "images_per_second_quartiles": [found.lower, found.upper],
            "speed_up": speed_ups(seconds[REFERENCE], seconds[key]).median,
        }

    for key, point in measured.items():
        point |= speed(key)
    return speed(REFERENCE)


def committed() -> dict[str, Any] | None:
    """The last full run's result, or None if there was none."""
    if not RESULT.exists():
        return None
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The steps that each sampler needs, or the most that were tried; how fast it then is."""
    reference = found["reference"]

    def row(name: str, point: dict[str, Any]) -> list[str]:
        spread = ", ".join(f"{value:.3f}" for value in point["distances"])
        rate, faster = point["images_per_second"], point["speed_up"]
        enough = "yes" if point["distance"] <= found["limit"] else "no"
        return [name, str(point["steps"]), spread, enough, f"{rate:.2f}", f"{faster:.1f}"]

    rows = [row(REFERENCE, reference)]
    rows += [row(peer["name"], peer) for peer in found["peers"]]
    for sampler in SAMPLERS:
        tried = [
            point
            for point in found["points"]
            if point["sampler"] == sampler and point["student"] is None
            and point["steps"] < reference["steps"]
        ]  # fmt: skip
        shown = found["enough"].get(sampler, tried[-1]["steps"])
        rows += [row(point["name"], point) for point in tried if point["steps"] == shown]
    rows += [row(point["name"], point) for point in found["points"] if point["student"]]
    machine, settings = found["machine"], found["settings"]
    return [
        f"Equal quality: Fréchet distance, mean of the first {settings['seeds']} seeds, at most "
        f"{settings['tolerance']:.0%} above {reference['distance']:.3f}, which ddpm has on all "
        f"{reference['steps']} timesteps; {settings['samples']} pictures a seed; "
        f"{found['subject']}",
        f"{machine['command']}; {machine['date']}; {machine['device']}, load average "
        f"{machine['load_average']}, commit {machine['commit'][:12]}",
        *aligned(["method", "steps", "distance of each seed", "as good", "images/s", "×ref"], rows),
    ]
