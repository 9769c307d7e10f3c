"""Every way of drawing pictures that is measured, and whether it draws the right ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from benchmarks.reference.ddpm import GaussianDiffusion
from benchmarks.throughput.subject import SEED, Subject, counted_noise
from benchmarks.throughput.watching import inputs_of
from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.config import Spacing
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler

SamplerName = Literal["ddpm", "ddim", "dpm++2m"]
REFERENCE = "reference"
TOLERANCE = 1e-3
"""Largest difference of any value at any step, relative to the largest value if beyond one."""

SPACINGS: dict[str, Spacing] = {"ddpm": "leading", "ddim": "leading", "dpm++2m": "trailing"}
"""That of diffusers by default, but for the last: its default visits a timestep twice."""


@dataclass(frozen=True)
class Job:
    """How much is drawn."""

    batch: int
    """Pictures, all at once."""
    steps: int
    """Network evaluations a picture."""
    cache_interval: int = 2
    """Of the cached way."""


@dataclass(frozen=True)
class Way:
    """One way of drawing the pictures 0 … batch − 1."""

    name: str
    sampler: str
    network: nn.Module
    draw: Callable[[], Tensor]
    """Float32 `[B, C, H, W]` around [-1, 1]."""
    textbook_noise: bool = False
    """Whether it calls `torch.randn`."""
    standard: Way | None = field(default=None, repr=False)
    """What must draw the same; None: there is nothing independent here to compare it with."""
    uncompiled: Way | None = field(default=None, repr=False)
    """The same with the network as it is before compilation."""

    @property
    def label(self) -> str:
        """Both names."""
        return f"{self.sampler}: {self.name}"


class CachedByHand:
    """A network that keeps its deep features for some evaluations: the engine's cache, plainly."""

    def __init__(self, network: UNet, interval: int) -> None:
        self.network, self.interval = network, interval
        self.evaluations = 0
        self.features: Tensor | None = None

    def __call__(self, x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        """Evaluate in full every so many-th time."""
        prediction: Tensor
        if self.evaluations % self.interval == 0:
            prediction, self.features = self.network(x, timesteps, return_features=True)
        else:
            prediction = self.network(x, timesteps, features=self.features)
        self.evaluations += 1
        return prediction


def ways_of(subject: Subject, job: Job, sampler: str, reference: Way) -> list[Way]:
    """The ways of one sampler; the first is what the others are compared with."""

    def engine(name: str, network: UNet, standard: Way | None, cache_interval: int = 1) -> Way:
        def draw() -> Tensor:
            return drawn_by_engine(subject, job, sampler, network, cache_interval)

        uncompiled = None
        if network is not subject.unet:
            uncompiled = engine(name, subject.unet, standard, cache_interval)
        return Way(name, sampler, network, draw, standard=standard, uncompiled=uncompiled)

    ways = [reference] if sampler == "ddpm" else []
    if (peer := peer_way(subject, job, sampler)) is not None:
        ways.append(Way(**{**vars(peer), "standard": ways[0] if ways else None}))
    standard = ways[0] if ways else None
    ways.append(engine("engine, eager", subject.unet, standard))
    standard = standard or ways[-1]
    ways.append(engine("engine, compiled", subject.compiled, standard))

    def draw_cached() -> Tensor:
        network: Any = CachedByHand(subject.unet, job.cache_interval)
        return drawn_by_engine(subject, job, sampler, network, 1)

    by_hand = Way("cached by hand", sampler, subject.unet, draw_cached)
    interval = job.cache_interval
    ways.append(engine(f"engine, cached ×{interval}", subject.fastest, by_hand, interval))
    return ways


def reference_way(subject: Subject, job: Job) -> Way:
    """Algorithm 2, textbook fashion, on the engine's eager network.

    Raises:
        UserError: the network predicts something else than the noise, or its variance.
    """
    variance, prediction = subject.config.sampling.variance, subject.config.diffusion.prediction
    if prediction != "eps":
        raise UserError(
            f"the network of {subject.name} predicts {prediction}; the textbook loop knows "
            "networks that predict the noise (eps) only"
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

    def draw() -> Tensor:
        images: Tensor = pipeline(
            batch_size=job.batch, num_inference_steps=job.steps, output_type="pt", **call
        ).images
        return 2 * images - 1

    return Way(f"diffusers {name}", sampler, subject.twin, draw, textbook_noise=True)


def drawn_by_engine(
    subject: Subject, job: Job, sampler: str, network: UNet, cache_interval: int
) -> Tensor:
    """The engine's samples."""
    model = DiffusionModel(
        network,
        subject.schedule,
        "eps",
        subject.config.sampling,
        sample_shape=subject.unet.sample_shape,
    )
    request = model.request(
        seed=SEED, sampler=sampler, steps=job.steps, spacing=SPACINGS[sampler], eta=0.0,
        # The peer of the last clips by a quantile of each sample or not at all; so: not at all.
        clip_x0=sampler != "dpm++2m", cache_interval=cache_interval,
    )  # fmt: skip
    return Sampler(model, request).sample(range(job.batch), batch_size=job.batch)


def all_ways(subject: Subject, job: Job, samplers: tuple[SamplerName, ...]) -> list[Way]:
    """The reference, then every way of each sampler."""
    if subject.schedule.timesteps % job.steps:
        raise UserError(
            f"--steps is {job.steps}; it must divide the schedule's {subject.schedule.timesteps} "
            "timesteps, or textbook and engine visit different ones"
        )
    reference = reference_way(subject, job)
    found = {reference.label: reference}
    for sampler in samplers:
        for way in ways_of(subject, job, sampler, reference):
            found[way.label] = way
    return list(found.values())


@dataclass(frozen=True)
class Chain:
    """What a way was seen to do."""

    states: list[Tensor]
    """x at every network evaluation that was called from Python."""
    pictures: Tensor


def chain_of(way: Way, device: torch.device) -> Chain:
    """Draw once with the engine's noise, watching."""
    noise = counted_noise(SEED, device) if way.textbook_noise else nullcontext()
    with noise, inputs_of(way.network) as states:
        pictures = way.draw()
    return Chain(states, pictures)


def difference(chain: Chain, standard: Chain, replayed: bool) -> float:
    """Largest difference at any step, relative to the largest value if that is beyond one.

    Args:
        chain: of the way in question.
        standard: of what it must equal.
        replayed: the engine's steps may be replays of a graph, whose states nobody sees.

    Raises:
        ValueError: another number of network evaluations, or values that are not finite.
    """
    # Pipelines return clamped pictures.
    pairs = [(chain.pictures.clamp(-1, 1), standard.pictures.clamp(-1, 1))]
    if not replayed:
        if len(chain.states) != len(standard.states):
            raise ValueError(f"{len(chain.states)} network evaluations, not {len(standard.states)}")
        pairs += zip(chain.states, standard.states, strict=True)
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
    """From its standard; None: there is none, or no comparison came about."""
    against: str | None
    problem: str | None
    """Why it must not be timed."""


def check(way: Way, chains: dict[str, Chain], device: torch.device) -> Parity:
    """Draw and compare; `chains` keeps what was drawn. Any failure is reported, not raised."""
    against = way.standard
    try:
        for one in (way, against):
            if one is not None and one.label not in chains:
                chains[one.label] = chain_of(one, device)
        if against is None:
            return Parity(None, None, None)
        replayed = device.type == "cuda"
        found = difference(chains[way.label], chains[against.label], replayed)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return Parity(None, None, f"{type(error).__name__}: {reason[0]}")
    problem = None
    if found > TOLERANCE:
        problem = f"differs from {against.name} by {found:.1e}, more than {TOLERANCE:g}"
    return Parity(found, against.name, problem)
