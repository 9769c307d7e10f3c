"""An image dissolving into noise, and a sample emerging from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.images.data_codec import Codec, PixelCodec
from ddpm_engine.plots.image_rows import moving_strip, strip
from ddpm_engine.samplers.finite import finite_samples, refuse_not_finite
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler
from ddpm_kernels import q_sample

COLUMNS = 11
_MOST_COLUMNS = 50


def shown_timesteps(timesteps: int) -> list[int]:
    """Timesteps at which to look at a chain of T, closer together at first.

    Most of an image is gone by the middle of the chain.
    """
    fractions = np.linspace(0, 1, COLUMNS - 1) ** 2
    return sorted(set((fractions * (timesteps - 1)).round().astype(int).tolist()))


def check_shown(schedule: NoiseSchedule, timesteps: Sequence[int]) -> None:
    """Refuse timesteps that cannot be columns of `forward_figure`; arguments as there.

    Raises:
        UserError: one that the schedule does not have, or too many.
    """
    for t in timesteps:
        if not 0 <= t < schedule.timesteps:
            raise UserError(
                f"timestep {t + 1} is to be shown, but the schedule has 1 to {schedule.timesteps}"
            )
    if len(timesteps) > _MOST_COLUMNS:
        raise UserError(
            f"`timesteps` has {len(timesteps)}; a figure has room for {_MOST_COLUMNS}", "timesteps"
        )


def forward_figure(
    schedule: NoiseSchedule,
    images: np.ndarray,
    timesteps: Sequence[int],
    seed: int,
    path: Path,
    codec: Codec = PixelCodec(),  # noqa: B008
) -> None:
    """Show q(x_t | x_0) of real images, each always with the same noise (equation 4).

    Args:
        schedule: the noise schedule.
        images: uint8 `[N, H, W, C]`, a row each.
        timesteps: from 0, the columns.
        seed: of the noise.
        path: of the PNG.
        codec: of what is diffused.

    Raises:
        UserError: as `check_shown`.
    """
    check_shown(schedule, timesteps)
    columns = torch.tensor(timesteps)
    rows = []
    for number, image in enumerate(images):
        clean = codec.encode(torch.from_numpy(image).permute(2, 0, 1)[None]).cpu()
        noisy = q_sample(
            clean.expand(len(columns), -1, -1, -1),
            columns,
            schedule.sqrt_alpha_bar.float(),
            schedule.sqrt_one_minus_alpha_bar.float(),
            seed,
            torch.full_like(columns, number),
        )
        rows.append(("$x_t$", np.concatenate([image[None], codec.decode(noisy)])))
    titles = ["$x_0$", *(f"t={t + 1}" for t in timesteps)]
    strip(rows, titles, "forward: images dissolve into noise", path)


@dataclass(frozen=True, eq=False)
class Moment:
    """What a trajectory looked like after one step."""

    index: int
    timestep: float
    x: Tensor
    """The state after the step, `[B, C, H, W]`."""
    x0: Tensor
    """The step's estimate of the clean image, `[B, C, H, W]`."""


def watch(
    model: DiffusionModel, request: SampleRequest, ids: Sequence[int], moments: int
) -> list[Moment]:
    """Sample one batch and keep its trajectory at a few moments, evenly spaced.

    Args:
        model: the network.
        request: what to sample.
        ids: of the samples.
        moments: number of moments to keep, the first and the last step among them.

    Raises:
        UserError: a request that the model cannot serve, or samples that are not finite.
    """
    sampler = Sampler(model, request)
    last = sampler.evaluations - 1
    kept = set(np.linspace(0, last, min(moments, last + 1)).round().astype(int).tolist())
    seen = [
        Moment(step.index, step.timestep, step.x.clone(), step.x0.clone())
        for step in sampler.trajectory(ids)
        if step.index in kept
    ]
    refuse_not_finite(ids, request.seed, finite_samples(seen[-1].x).tolist())
    return seen


def reverse_figure(
    steps: Sequence[Moment],
    path: Path,
    codec: Codec = PixelCodec(),  # noqa: B008
) -> None:
    """Plot how one sample emerges: the state, and each step's estimate of x_0.

    Args:
        steps: as `watch` keeps them; the first sample of the batch is plotted.
        path: of the PNG.
        codec: of the samples.
    """
    states, estimates = (
        np.concatenate([codec.decode(getattr(step, name)[:1]) for step in steps])
        for name in ("x", "x0")
    )
    strip(
        [("$x_{t-1}$", states), (r"$\hat{x}_0$", estimates)],
        [f"t={step.timestep + 1:.0f}" for step in steps],
        "reverse: a sample emerges; below, the network's estimate of it at each step",
        path,
    )


def reverse_animation(
    steps: Sequence[Moment],
    path: Path,
    codec: Codec = PixelCodec(),  # noqa: B008
) -> None:
    """Animate how samples emerge, above the estimates of x_0, as a GIF.

    Args:
        steps: as `watch` keeps them; all samples of the batch are plotted.
        path: of the GIF.
        codec: of the samples.
    """
    moving_strip(
        [
            [("$x_{t-1}$", codec.decode(step.x)), (r"$\hat{x}_0$", codec.decode(step.x0))]
            for step in steps
        ],
        [f"t = {step.timestep + 1:.0f}" for step in steps],
        path,
    )
