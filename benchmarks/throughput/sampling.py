"""The ways of sampling that are compared, and whether they compute the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from benchmarks.reference.ddpm import GaussianDiffusion
from benchmarks.throughput.subject import SEED, Subject, counted_noise
from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.config import Spacing
from ddpm_engine.samplers.sampler import Sampler

SamplerName = Literal["ddpm", "ddim", "dpm++2m"]
REFERENCE = "reference"
TOLERANCE = 1e-3
"""Largest difference of any value at any step, relative to the largest value if beyond one."""

SPACINGS: dict[str, Spacing] = {"ddpm": "leading", "ddim": "leading", "dpm++2m": "trailing"}
"""Diffusers' defaults, except for the last, whose default visits a timestep twice."""


@dataclass(frozen=True)
class Job:
    """How much is sampled."""

    batch: int
    """Samples, all at once."""
    steps: int
    """Network evaluations per sample."""
    cache_interval: int = 2
    """Of the cached way."""


@dataclass(frozen=True)
class Way:
    """One way of computing the samples 0 … batch − 1."""

    name: str
    sampler: str
    network: nn.Module
    sample: Callable[[], Tensor]
    """Returns float32 `[B, C, H, W]` around [-1, 1]."""
    textbook_noise: bool = False
    """Whether it calls `torch.randn`."""
    standard: Way | None = field(default=None, repr=False)
    """What must compute the same; None: nothing independent is available."""

    @property
    def label(self) -> str:
        """Both names."""
        return f"{self.sampler}: {self.name}"


class CachedByHand:
    """A network that keeps its deep features for some evaluations: the engine's cache, plainly."""

    caches_features = False

    def __init__(self, network: UNet, interval: int) -> None:
        self.network, self.interval = network, interval
        self.evaluations = 0
        self.features: Tensor | None = None

    def __call__(self, x: Tensor, timesteps: Tensor, conditioning: Any = None) -> Tensor:
        """Evaluate in full once per interval."""
        prediction: Tensor
        if self.evaluations % self.interval == 0:
            prediction, self.features = self.network(x, timesteps, return_features=True)
        else:
            prediction = self.network(x, timesteps, features=self.features)
        self.evaluations += 1
        return prediction


def ways_of(subject: Subject, job: Job, sampler: str, reference: Way) -> list[Way]:
    """The ways of one sampler; the first is the standard of the others."""

    def engine(name: str, network: UNet, standard: Way | None, cache_interval: int = 1) -> Way:
        def sample() -> Tensor:
            return sampled_by_engine(subject, job, sampler, network, cache_interval)

        return Way(name, sampler, network, sample, standard=standard)

    ways = [reference] if sampler == "ddpm" else []
    if (peer := peer_way(subject, job, sampler)) is not None:
        ways.append(Way(**{**vars(peer), "standard": ways[0] if ways else None}))
    standard = ways[0] if ways else None
    ways.append(engine("engine, eager", subject.unet, standard))
    standard = standard or ways[-1]
    ways.append(engine("engine, compiled", subject.compiled, standard))

    def sample_cached() -> Tensor:
        network = CachedByHand(subject.unet, job.cache_interval)
        return sampled_by_engine(subject, job, sampler, network)

    by_hand = Way("cached by hand", sampler, subject.unet, sample_cached)
    interval = job.cache_interval
    ways.append(engine(f"engine, cached ×{interval}", subject.fastest, by_hand, interval))
    return ways


def reference_way(subject: Subject, job: Job) -> Way:
    """Algorithm 2, textbook fashion, on the engine's eager network.

    Raises:
        UserError: the network does not predict the noise, or learned its variance.
    """
    variance, prediction = subject.config.sampling.variance, subject.config.diffusion.prediction
    if prediction != "eps":
        raise UserError(
            f"the network of {subject.name} predicts {prediction}; the textbook loop needs a "
            "network that predicts the noise (eps)"
        )
    if variance == "learned_range":
        raise UserError("the textbook loop has fixed variances only, and this run learned its own")
    diffusion = GaussianDiffusion(
        subject.unet, subject.schedule.betas, job.steps, variance, subject.device
    )
    channels, height, width = subject.unet.sample_shape
    shape = (job.batch, channels, height, width)
    return Way(
        REFERENCE, "ddpm", subject.unet, lambda: diffusion.sample(shape), textbook_noise=True
    )


def peer_way(
    subject: Subject, job: Job, sampler: str, spacing: Spacing | None = None
) -> Way | None:
    """Diffusers' pipeline, by default with its own spacing; None if it is not installed."""
    try:
        import diffusers
    except ImportError:
        return None
    options: dict[str, Any] = {
        "num_train_timesteps": subject.schedule.timesteps,
        "trained_betas": subject.schedule.betas.numpy(),
        "timestep_spacing": spacing or SPACINGS[sampler],
    }
    call: dict[str, Any] = {}
    if sampler == "ddpm":
        variance = subject.config.sampling.variance
        scheduler = diffusers.DDPMScheduler(variance_type=variance, **options)
        make, name = diffusers.DDPMPipeline, "DDPMPipeline"
    elif sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**options)
        make, name = diffusers.DDIMPipeline, "DDIMPipeline"
        # Otherwise it mixes a clipped x_0 with the noise that belongs to the unclipped one.
        call["use_clipped_model_output"] = True
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=2, **options)
        make, name = diffusers.DDPMPipeline, "DPMSolver++"
    pipeline = make(subject.twin, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> Tensor:
        images: Tensor = pipeline(
            batch_size=job.batch, num_inference_steps=job.steps, output_type="pt", **call
        ).images
        return 2 * images - 1

    return Way(f"diffusers {name}", sampler, subject.twin, sample, textbook_noise=True)


def sampled_by_engine(
    subject: Subject, job: Job, sampler: str, network: Any, cache_interval: int = 1
) -> Tensor:
    """The engine's samples."""
    model = subject.model(network)
    request = model.request(
        seed=SEED, sampler=sampler, steps=job.steps, spacing=SPACINGS[sampler], eta=0.0,
        # The peer of dpm++2m clips by a quantile of each sample or not at all; so: not at all.
        clip_x0=sampler != "dpm++2m", cache_interval=cache_interval,
    )  # fmt: skip
    return Sampler(model, request).sample(range(job.batch), batch_size=job.batch)


def all_ways(subject: Subject, job: Job, samplers: tuple[SamplerName, ...]) -> list[Way]:
    """The reference, then every way of each sampler.

    Raises:
        UserError: a number of steps that does not divide T.
    """
    if subject.schedule.timesteps % job.steps:
        raise UserError(
            f"`steps` is {job.steps}; it must divide the schedule's {subject.schedule.timesteps} "
            "timesteps, or textbook and engine visit different ones",
            field="steps",
        )
    reference = reference_way(subject, job)
    found = {reference.label: reference}
    for sampler in samplers:
        for way in ways_of(subject, job, sampler, reference):
            found[way.label] = way
    return list(found.values())


@dataclass(frozen=True)
class Recording:
    """What a way was observed to do."""

    states: list[Tensor]
    """x at every network evaluation that was called from Python."""
    samples: Tensor


def record(way: Way, device: torch.device) -> Recording:
    """Sample once with the engine's noise, recording the states."""
    noise = counted_noise(SEED, device) if way.textbook_noise else nullcontext()
    with noise, _inputs_of(way.network) as states:
        samples = way.sample()
    return Recording(states, samples)


@contextmanager
def _inputs_of(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a copy of the x of every evaluation."""
    states: list[Tensor] = []
    handle = network.register_forward_pre_hook(lambda _, given: states.append(given[0].clone()))
    try:
        yield states
    finally:
        handle.remove()


def difference(one: Recording, standard: Recording, replayed: bool) -> float:
    """Largest difference at any step, relative to the largest value if that is beyond one.

    Args:
        one: of the way in question.
        standard: of what it must equal.
        replayed: the engine's steps may be replays of a CUDA graph, whose states are not recorded.

    Raises:
        ValueError: another number of network evaluations, or values that are not finite.
    """
    # Pipelines return clamped samples.
    pairs = [(one.samples.clamp(-1, 1), standard.samples.clamp(-1, 1))]
    if not replayed:
        if len(one.states) != len(standard.states):
            raise ValueError(f"{len(one.states)} network evaluations, not {len(standard.states)}")
        pairs += zip(one.states, standard.states, strict=True)
    worst = 0.0
    for ours, theirs in pairs:
        scale = theirs.abs().amax().clamp(min=1)
        error = ((ours - theirs).abs().amax() / scale).item()
        if not error < float("inf"):
            raise ValueError("values that are not finite")
        worst = max(worst, error)
    return worst


@dataclass(frozen=True)
class Parity:
    """Whether a way may be timed."""

    difference: float | None
    """From its standard; None: there is none, or the comparison failed."""
    against: str | None
    problem: str | None
    """Why it must not be timed."""


def check(way: Way, recordings: dict[str, Recording], device: torch.device) -> Parity:
    """Sample and compare; `recordings` keeps the results. Failures are reported, not raised."""
    against = way.standard
    try:
        for one in (way, against):
            if one is not None and one.label not in recordings:
                recordings[one.label] = record(one, device)
        if against is None:
            return Parity(None, None, None)
        replayed = device.type == "cuda"
        found = difference(recordings[way.label], recordings[against.label], replayed)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return Parity(None, None, f"{type(error).__name__}: {reason[0]}")
    problem = None
    if found > TOLERANCE:
        problem = f"differs from {against.name} by {found:.1e}, more than {TOLERANCE:g}"
    return Parity(found, against.name, problem)
