"""Steps that each sampler needs to generate digits as well as ddpm in a thousand, and its speed.

Steps are raised until the Fréchet distance to the real digits is at most 5% above that of ddpm on
all timesteps. Seeds differ by more than that, and samplers that start from the same noise share
some of it: what is compared is the mean over the same seeds. The cost of cached features is
measured as well, and so are distilled networks in the steps that they were made for.

Speeds are over that of the textbook loop, which computes the samples of ddpm on all timesteps: this
is checked first, and so is that a few textbook lines of DDIM compute what a distilled network does.
Diffusers' pipelines compute what the engine computes, which is checked as well, and are timed
beside it. Samples are kept on disk, so that an interrupted run is resumed.
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
from benchmarks.throughput.digits import DigitMetrics, kept_samples
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import aligned
from benchmarks.throughput.sampling import REFERENCE, Job, Way, check, peer_way, reference_way
from benchmarks.throughput.subject import SEED, Subject, subject_of
from benchmarks.throughput.timing import interleaved, rates, speed_ups, timed

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.fid import frechet_distance, moments
from ddpm_engine.samplers.sampler import Sampler
from ddpm_engine.samplers.timesteps import spaced_timesteps

RESULT = Path(__file__).resolve().parents[1] / "results" / "equal_quality.json"
SAMPLERS = ("ddpm", "ddim", "dpm++2m", "unipc")
FEW = 10
"""Steps up to which the spread over seeds is cheap enough to measure."""
USUAL = 25
"""Steps of diffusers' pipelines where no number that was tried is enough."""
TIMED = 64
"""Samples of a timed repetition: what a thousand steps allow in a minute."""
COMPARED = 2
"""Samples by which two ways are compared."""


@dataclass(frozen=True)
class Settings:
    """How thoroughly quality is measured."""

    samples: int = 2000
    """Samples for each distance."""
    seeds: int = 1
    """Seeds the distance is averaged over; each is half an hour of ddpm on all timesteps."""
    spread: int = 3
    """Seeds for each number of steps up to 10, to show how far they differ."""
    steps: tuple[int, ...] = (5, 10, 15, 20, 25, 50, 100, 250)
    """Numbers of steps to try, rising."""
    tolerance: float = 0.05
    """Allowed relative excess over the distance of ddpm on all timesteps."""
    batch: int = 250
    """Samples at a time; also what is lost when a run is interrupted."""
    rounds: int = 3
    """Repetitions of the timing at the end."""


@dataclass(frozen=True)
class Method:
    """One way of sampling."""

    sampler: str
    steps: int
    cache_interval: int = 1
    student: str | None = None
    """Name of the distilled network; None: the teacher."""
    clip: bool = True
    """Whether estimates of x_0 are clipped."""

    @property
    def name(self) -> str:
        """In tables and plots, apart from the steps."""
        if self.student is not None:
            return "distilled, " + self.student.partition(" ")[0]
        return self.sampler + (
            "" if self.cache_interval == 1 else f", cached ×{self.cache_interval}"
        )

    def options(self) -> dict[str, Any]:
        """As `DiffusionModel.request` takes them; a distilled network knows its own only."""
        if self.student is not None:
            return {}
        unclipped = {} if self.clip else {"clip_x0": False}
        return {
            "sampler": self.sampler, "steps": self.steps, "spacing": "trailing", "eta": 0.0,
            "cache_interval": self.cache_interval, **unclipped,
        }  # fmt: skip


@dataclass(frozen=True)
class Study:
    """The networks that are compared, and their samples."""

    model: LoadedModel
    students: Mapping[str, LoadedModel]
    """Distilled from it, by method and steps: `progressive 4`."""
    folder: Path
    """Keeps the samples."""
    settings: Settings

    def network(self, method: Method) -> LoadedModel:
        """The network of a method."""
        return self.model if method.student is None else self.students[method.student]

    def kept(self, method: Method, seed: int) -> Any:
        """Samples of a seed, generated once: uint8 `[samples, H, W, C]`."""
        settings = self.settings
        return kept_samples(
            self.network(method), self.folder, settings.samples, settings.batch, seed=seed,
            **method.options(),
        )  # fmt: skip

    def sampling(self, method: Method, count: int) -> Callable[[], torch.Tensor]:
        """A function that computes the first samples of the benchmarks' seed."""
        model = self.network(method)
        sampler = Sampler(model, model.request(seed=SEED, **method.options()))
        return lambda: sampler.sample(range(count), batch_size=count)


def student_method(name: str, student: LoadedModel) -> Method:
    """How a distilled network samples."""
    sampling = student.sampling
    return Method(sampling.sampler, sampling.steps or student.schedule.timesteps, student=name)


def run(study: Study, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure; returns what is written to `RESULT`.

    Raises:
        UserError: the model does not generate digits, or a way computes other samples than it
            should.
    """
    model, students, settings = study.model, study.students, study.settings
    subject = subject_of(model)
    channels, size, _ = model.shape
    if channels != 1:
        raise UserError(f"{subject.name} generates {channels}-channel images, not digits")
    machine = facts(model.device)
    digits = DigitMetrics.of_size(size)

    def point(method: Method) -> dict[str, Any]:
        seeds = max(settings.seeds, settings.spread) if method.steps <= FEW else settings.seeds
        distances = []
        for seed in range(seeds):
            started = time.monotonic()
            distances.append(digits.distance(study.kept(method, seed)))
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

    total = model.schedule.timesteps
    check_equal(study, Method("ddpm", total), textbook_way(study, Method("ddpm", total)))
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
        check_equal(study, method, textbook_way(study, method))
        points.append(point(method))
        if points[-1]["distance"] <= limit:
            enough[method.name] = min(method.steps, enough.get(method.name, method.steps))

    peers = []
    for sampler, clip in [("ddpm", True), ("ddim", True), ("dpm++2m", False)]:
        steps = total if sampler == "ddpm" else enough.get(sampler, min(USUAL, total))
        method = Method(sampler, steps, clip=clip)
        way = peer_way(subject, Job(COMPARED, steps), sampler, "trailing")
        if way is not None:
            # The samples are the engine's, and so is their quality.
            check_equal(study, method, way)
            peers.append({**point(method), "name": way.name})
    reference = measure_speed(study, subject, points, peers, progress)
    rows = digits.real.features()
    return {
        "machine": machine,
        "subject": subject.name,
        "students": {name: subject_of(student).name for name, student in students.items()},
        "settings": asdict(settings),
        "distance_of_half_the_real_digits_to_the_other": frechet_distance(
            moments([rows[::2]]), moments([rows[1::2]])
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


def textbook_way(study: Study, method: Method) -> Way:
    """The same samples by textbook code."""
    subject = subject_of(study.network(method))
    if method.student is None:
        return reference_way(subject, Job(COMPARED, method.steps))
    return Way(
        REFERENCE, method.sampler, subject.unet,
        lambda: ddim_by_hand(subject, COMPARED, method), textbook_noise=True,
    )  # fmt: skip


@torch.inference_mode()
def ddim_by_hand(subject: Subject, count: int, method: Method) -> torch.Tensor:
    """DDIM for a network that predicts v (Song et al. 2021, equations 12 and 16).

    Without noise, or with as much as makes it ancestral sampling with the smaller variance.
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


def check_equal(study: Study, method: Method, standard: Way) -> None:
    """Check that a method computes the samples of another way.

    Raises:
        UserError: it does not; then speeds of the two say nothing.
    """
    model = study.network(method)
    ours = Way(
        method.name, method.sampler, model.network, study.sampling(method, COMPARED),
        standard=standard,
    )  # fmt: skip
    if (problem := check(ours, {}, model.device).problem) is not None:
        raise UserError(
            f"the engine ({method.name}) and {standard.name} compute different samples: {problem}"
        )


def measure_speed(
    study: Study,
    subject: Subject,
    points: list[dict[str, Any]],
    peers: list[dict[str, Any]],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Time the textbook loop and every point in turn; add its speed to each.

    Returns:
        The speed of the textbook loop.
    """
    device, rounds = study.model.device, study.settings.rounds
    progress(f"timing {len(points) + len(peers) + 1} ways in turn, {rounds} rounds")

    def ours(point: dict[str, Any]) -> Callable[[], object]:
        method = Method(point["sampler"], point["steps"], point["cache_interval"], point["student"])
        return study.sampling(method, TIMED)

    def theirs(point: dict[str, Any]) -> Callable[[], object]:
        way = peer_way(subject, Job(TIMED, point["steps"]), point["sampler"], "trailing")
        assert way is not None
        return way.sample

    textbook = reference_way(subject, Job(TIMED, subject.schedule.timesteps))
    measured = {f"{point['name']} {point['steps']}": point for point in [*points, *peers]}
    works: dict[str, Callable[[], object]] = {REFERENCE: textbook.sample}
    works |= {f"{point['name']} {point['steps']}": ours(point) for point in points}
    works |= {f"{point['name']} {point['steps']}": theirs(point) for point in peers}
    study.sampling(Method("ddpm", 1), TIMED)()  # compiles
    seconds = interleaved(
        rounds, {name: partial(timed, work, device) for name, work in works.items()}
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
        last = found["enough"].get(sampler, tried[-1]["steps"])
        rows += [row(point["name"], point) for point in tried if point["steps"] == last]
    rows += [row(point["name"], point) for point in found["points"] if point["student"]]
    machine, settings = found["machine"], found["settings"]
    return [
        f"Equal quality: Fréchet distance, mean of the first {settings['seeds']} seeds, at most "
        f"{settings['tolerance']:.0%} above {reference['distance']:.3f}, that of ddpm on all "
        f"{reference['steps']} timesteps; {settings['samples']} samples per seed; "
        f"{found['subject']}",
        f"{machine['command']}; {machine['date']}; {machine['device']}, load average "
        f"{machine['load_average']}, commit {machine['commit'][:12]}",
        *aligned(["method", "steps", "distance of each seed", "as good", "images/s", "×ref"], rows),
    ]
