"""Figures of a trained run, by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.bounds import Ge, Le, out_of_bounds
from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.config import RunConfig
from ddpm_engine.data.open import open_dataset, samples_at
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.diffusion.variational_bound import bits_per_dim
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import real_digits
from ddpm_engine.evaluation.feature_networks import feature_network
from ddpm_engine.evaluation.fid import Moments, frechet_distance, moments
from ddpm_engine.figures.interpolation import (
    denoising_figure,
    interpolation_figure,
    unrestricted,
)
from ddpm_engine.figures.trajectory import (
    COLUMNS,
    check_shown,
    forward_figure,
    reverse_animation,
    reverse_figure,
    shown_timesteps,
    watch,
)
from ddpm_engine.generation.sample_reader import open_images
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.plots.curves import bound_figure, loss_figure, quality_figure, schedules_figure
from ddpm_engine.plots.image_rows import side_by_side
from ddpm_engine.samplers.config import SamplerName, SamplingConfig
from ddpm_engine.samplers.identity import SampleId, Seed
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler

_GRID = 64
_ROWS = 3
"""Images that are noised."""
_FRAMES, _MOVING = 24, 6
"""Frames of the animation, and samples in each."""
QUALITY_SAMPLERS: tuple[SamplerName, ...] = ("ddpm", "ddim", "dpm++2m")
QUALITY_STEPS = (5, 10, 20, 40)
_BATCH = 256


class Inapplicable(UserError):
    """The figure does not apply to this kind of run."""


@dataclass(frozen=True)
class Exhibit:
    """Everything needed to plot a trained run."""

    trained: LoadedModel
    run: Path
    """The run's directory."""
    out: Path
    """Folder for the figures."""
    seed: Seed = 0
    """Of all noise."""
    ids: tuple[SampleId, SampleId] = (4, 2)
    """Ids of two samples: `reverse` plots the first, `interpolation` goes from one to the other."""
    steps: Annotated[int, Ge(1)] | None = None
    """Sampling steps; None: the run's."""
    timesteps: tuple[int, ...] | None = None
    """Timesteps of the forward process to plot, from 0, 50 at most; None: ten, denser at the
    start."""
    samples: Path | None = None
    """Folder of PNGs with the model's samples; None: samples are generated."""
    photo: Tensor | None = None
    """Image to noise and denoise, `[C, H, W]` in [-1, 1]; None: the first of the data."""
    count: Annotated[int, Ge(2), Le(1000)] = 256
    """Samples per point of the quality figure."""
    bound_images: Annotated[int, Ge(1), Le(_GRID)] = 16
    """Images to compute the bound of; each costs one network evaluation per timestep."""

    def __post_init__(self) -> None:
        for problem in out_of_bounds(self):
            raise problem

    @property
    def config(self) -> RunConfig:
        """Of the run."""
        return self.trained.config

    @property
    def sampling(self) -> SamplingConfig:
        """How samples are generated."""
        chosen = self.config.sampling
        return chosen if self.steps is None else replace(chosen, steps=self.steps)

    @cached_property
    def real(self) -> np.ndarray:
        """The first images in training order: uint8 `[64, H, W, C]`."""
        model = self.config.model
        dataset = open_dataset(
            self.config.data,
            size=model.sample_size,
            channels=model.in_channels,
            classes=None if model.num_class_embeds is None else model.num_class_embeds - 1,
            seed=self.config.training.seed,
            text=self.trained.spec.text,
            vector=self.trained.spec.vector,
        )
        stored = samples_at(dataset, range(_GRID)).images
        if stored.dtype != torch.uint8:
            codec = self.trained.codec
            stored = stored[:, 0] if stored.dim() == 5 else stored  # without mirrored images
            return codec.decode(codec.encode(stored))
        return stored.permute(0, 2, 3, 1).numpy()

    @cached_property
    def drawn(self) -> np.ndarray:
        """Samples of the model: uint8 `[64 or fewer, H, W, C]`."""
        if self.samples is None:
            return self.generated(_GRID, self.sampling)
        reader = open_images(self.samples)
        return reader.read(sorted(reader.ids())[:_GRID])

    def generated(self, count: int, sampling: SamplingConfig) -> np.ndarray:
        """Generate the first samples of the seed: uint8 `[count, H, W, C]`."""
        request = SampleRequest(seed=self.seed, sampling=sampling, precision="no")
        sampler = Sampler(unrestricted(self.trained), request)
        return sampler.images(range(count), batch_size=_BATCH)


def check(exhibit: Exhibit, names: Collection[str]) -> None:
    """Refuse what figures would only find when it is their turn.

    Args:
        exhibit: that they are of.
        names: of the figures.

    Raises:
        UserError: steps or timesteps that the schedule does not have, one id twice, or a folder
            without samples, or with damaged ones.
    """
    if "real-and-drawn" in names and exhibit.samples is not None:
        _ = exhibit.drawn
    if "reverse" in names or ("real-and-drawn" in names and exhibit.samples is None):
        request = SampleRequest(seed=exhibit.seed, sampling=exhibit.sampling, precision="no")
        Sampler(unrestricted(exhibit.trained), request)
    if "interpolation" in names and exhibit.ids[0] == exhibit.ids[1]:
        raise UserError(f"`ids` is {exhibit.ids}; interpolation needs two different ones", "ids")
    if "forward" in names and exhibit.timesteps is not None:
        check_shown(exhibit.trained.schedule, exhibit.timesteps)


def real_and_drawn(exhibit: Exhibit) -> list[Path]:
    """Plot real images next to samples.

    Raises:
        UserError: the folder of samples holds no images.
    """
    samples = exhibit.drawn
    path = exhibit.out / "real-and-drawn.png"
    side_by_side(exhibit.real[: len(samples)], samples, ("real", "drawn by the model"), path)
    return [path]


def forward(exhibit: Exhibit) -> list[Path]:
    """Plot the forward process: images dissolving into noise.

    Raises:
        UserError: a timestep that the schedule does not have.
    """
    schedule = exhibit.trained.schedule
    timesteps: Sequence[int] = exhibit.timesteps or shown_timesteps(schedule.timesteps)
    path = exhibit.out / "forward.png"
    real, codec = exhibit.real[:_ROWS], exhibit.trained.codec
    forward_figure(schedule, real, timesteps, exhibit.seed, path, codec)
    return [path]


def reverse(exhibit: Exhibit) -> list[Path]:
    """Plot the reverse process, as a PNG and as a GIF.

    Raises:
        UserError: steps that the schedule does not have, or samples that are not finite.
    """
    model = unrestricted(exhibit.trained)
    request = SampleRequest(seed=exhibit.seed, sampling=exhibit.sampling, precision="no")
    still, moving = exhibit.out / "reverse.png", exhibit.out / "reverse.gif"
    first = exhibit.ids[0]
    reverse_figure(watch(model, request, [first], COLUMNS), still, model.codec)
    steps = watch(model, request, range(first, first + _MOVING), _FRAMES)
    reverse_animation(steps, moving, model.codec)
    return [still, moving]


def loss(exhibit: Exhibit) -> list[Path]:
    """Plot the training loss.

    Raises:
        Inapplicable: a `UserError`: the run has no metrics.
    """
    file = exhibit.run / "metrics.jsonl"
    if not file.exists():
        raise Inapplicable(f"there is no {file}, which has the losses; give the run's directory")
    steps, losses = _losses(file)
    if not steps:
        raise Inapplicable(f"{file} has no losses yet; train for longer")
    path = exhibit.out / "loss.png"
    loss_figure(steps, losses, path)
    return [path]


def _losses(file: Path) -> tuple[list[int], list[float]]:
    """Read steps and losses, but for rows without one: skipped steps, and what was measured."""
    steps, losses = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            step, loss = row["step"], row.get("loss")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Inapplicable(f"line {number} of {file} is damaged; repair that line") from None
        if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss):
            steps.append(step)
            losses.append(float(loss))
    return steps, losses


def schedules(exhibit: Exhibit) -> list[Path]:
    """Plot ᾱ and the signal-to-noise ratio of every schedule and of the run's."""
    steps = exhibit.trained.schedule.timesteps
    linear = NoiseSchedule.linear(steps)
    named = {
        "linear": linear,
        "cosine": NoiseSchedule.cosine(steps),
        "sigmoid": NoiseSchedule.sigmoid(steps),
    }
    if steps > 1:
        named["linear, zero terminal SNR"] = linear.rescaled_to_zero_terminal_snr()
    own = exhibit.trained.schedule
    if not any(torch.equal(own.betas, schedule.betas) for schedule in named.values()):
        named["this run's"] = own
    path = exhibit.out / "schedules.png"
    schedules_figure(named, path)
    return [path]


def quality(exhibit: Exhibit) -> list[Path]:
    """Plot the Fréchet distance of sampled to real digits against the number of steps.

    Raises:
        Inapplicable: a `UserError`: the run was not trained on the digits.
    """
    if exhibit.config.data.source != "digits":
        raise Inapplicable(
            "quality against steps is plotted only for runs on the digits, whose feature network "
            "trains in seconds; evaluate other runs instead"
        )
    size, count = exhibit.trained.image_shape[1], exhibit.count
    numbers = [steps for steps in QUALITY_STEPS if steps <= exhibit.trained.schedule.timesteps]
    if not numbers:
        raise Inapplicable(
            f"quality is plotted from {QUALITY_STEPS[0]} steps on, and the schedule has fewer"
        )
    network = feature_network("digits", size)

    def of(images: np.ndarray) -> Moments:
        return moments([network(images)[:, : network.features]])

    # A fixed shuffle, since the data set is ordered by writer.
    digits = real_digits(size).images[np.random.default_rng(0).permutation(1797)]
    reference = of(digits[count:])
    distances: dict[str, dict[int, float]] = {}
    for sampler in QUALITY_SAMPLERS:
        line = distances.setdefault(sampler, {})
        for steps in numbers:
            sampling = replace(exhibit.sampling, sampler=sampler, steps=steps)
            line[steps] = frechet_distance(of(exhibit.generated(count, sampling)), reference)
    path = exhibit.out / "quality.png"
    quality_figure(distances, frechet_distance(of(digits[:count]), reference), count, path)
    return [path]


def bound(exhibit: Exhibit) -> list[Path]:
    """Plot the terms of the variational bound over t.

    Raises:
        Inapplicable: a `UserError`: the network samples latents.
    """
    trained = exhibit.trained
    if trained.codec.clip_range is None:
        raise Inapplicable("the variational bound is that of pixels, and the samples are latents")
    images = exhibit.real[: exhibit.bound_images]
    device = trained.device
    ids = torch.arange(len(images), device=device)
    null = trained.spec.null_class
    labels = None if null is None else torch.full_like(ids, null)
    terms = bits_per_dim(
        trained.network,
        trained.schedule,
        torch.from_numpy(images).permute(0, 3, 1, 2).to(device),
        ids,
        seed=exhibit.seed,
        prediction=exhibit.config.diffusion.prediction,
        variance=exhibit.config.sampling.variance,
        conditioning=Conditioning(labels),
        clip=bool(trained.sampling.clip_x0),
    )
    path = exhibit.out / "bound.png"
    bound_figure(terms.cpu().numpy(), path)
    return [path]


def interpolation(exhibit: Exhibit) -> list[Path]:
    """Plot the interpolation between two samples."""
    path = exhibit.out / "interpolation.png"
    interpolation_figure(exhibit.trained, exhibit.seed, exhibit.ids, path)
    return [path]


def denoising(exhibit: Exhibit) -> list[Path]:
    """Plot an image noised to several timesteps and denoised again."""
    image = exhibit.photo
    if image is None:
        image = torch.from_numpy(exhibit.real[0]).permute(2, 0, 1).float() / 127.5 - 1
    path = exhibit.out / "denoising.png"
    denoising_figure(exhibit.trained, image, exhibit.seed, path)
    return [path]


FIGURES: dict[str, Callable[[Exhibit], list[Path]]] = {
    "real-and-drawn": real_and_drawn,
    "forward": forward,
    "reverse": reverse,
    "loss": loss,
    "schedules": schedules,
    "quality": quality,
    "bound": bound,
    "interpolation": interpolation,
    "denoising": denoising,
}
"""Name → function that writes figures into the exhibit's folder and returns their paths."""
