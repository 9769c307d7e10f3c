"""The process in two dimensions: how noise spreads a data set out, and is pulled back to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.figures.toy import PointNetwork, score
from ddpm_engine.images.grid import save_gif
from ddpm_engine.plots.style import SCALE, canvas, pixels_of, saved, without_ticks
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.initial_noise import initial_noise
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler
from ddpm_kernels import q_sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN, _MOVING = 800, 500
"""Points of a cloud, and of one that moves."""
_TRAILS, _TRAIL_STEPS = 12, 25
"""Points with a visible trail, and the trail's length in steps."""
_FRAMES = 28
_EXTENT = 3.0
_ARROWS = 15


@dataclass(frozen=True, eq=False)
class Plane:
    """A trained network and the two-dimensional data that it was trained on."""

    model: PointNetwork
    schedule: NoiseSchedule
    """What it was trained on."""
    points: Tensor
    """The data, float32 `[N, 2, 1, 1]`."""
    place: Tensor
    """Position of each point along the curve, `[N]`: its colour. Samples take that of their end."""
    seed: int
    """Of all noise."""

    def save_figure(self, path: Path) -> None:
        """Plot the forward process, the reverse process and the score field as a PNG."""
        model, schedule, points, place = self.model, self.schedule, self.points, self.place
        states = reverse_states(model, schedule, self.seed, _SHOWN)
        ends = _place_of(states[-1], points, place)
        last = schedule.timesteps - 1
        shown = [0, *(round(share * last) for share in (0.08, 0.2, 0.45, 1))]
        with saved(path, 10, 6.4, 3, len(shown), palette=True) as (figure, axes):
            for column, t in enumerate(shown):
                forward, reverse, field = axes[:, column]
                forward.set_title(f"t={t + 1}")
                cloud = noised(points[:_SHOWN], schedule, t, self.seed)
                _scatter(forward, cloud, place[:_SHOWN])
                after = states[: len(states) - t]
                _trails(reverse, after[-_TRAIL_STEPS:, :_TRAILS])
                _scatter(reverse, after[-1], ends)
                _field(field, model, schedule, t)
                _scatter(field, points[:_SHOWN].flatten(1), size=0.3)
            for row, label in enumerate(
                [
                    "forward, $q(x_t)$",
                    r"reverse, $p_\theta(x_{t-1})$",
                    r"score, $-\hat\epsilon/\sigma_t$",
                ]
            ):
                axes[row, 0].set_ylabel(label)
            figure.suptitle("noise spreads the data out; the learned field pulls it back")

    def save_animation(self, path: Path) -> None:
        """Animate the reverse process in its score field as a GIF."""
        model, schedule = self.model, self.schedule
        states = reverse_states(model, schedule, self.seed, _MOVING)
        ends = _place_of(states[-1], self.points, self.place)
        frames = []
        for after in np.linspace(0, schedule.timesteps, _FRAMES).round().astype(int).tolist():
            t = max(0, schedule.timesteps - 1 - after)
            with canvas(3.2, 3.45, dpi=100) as (_, axes):
                _field(axes[0, 0], model, schedule, t, coloured=False)
                _scatter(axes[0, 0], states[after], ends, size=3)
                axes[0, 0].set_title(f"t = {schedule.timesteps - after}")
                frames.append(pixels_of(axes[0, 0].figure))
        save_gif(frames, path, 100)


def reverse_states(model: PointNetwork, schedule: NoiseSchedule, seed: int, count: int) -> Tensor:
    """Return all states of ancestral sampling (Ho et al. 2020, algorithm 2).

    Args:
        model: a trained network.
        schedule: what it was trained on.
        seed: of all noise.
        count: number of points.

    Returns:
        float32 `[T + 1, count, 2]`, from the noise to the samples.
    """
    ids = torch.arange(count)
    sampling = SamplingConfig(variance="fixed_small", clip_x0=False)
    request = SampleRequest(seed=seed, precision="no")
    sampler = Sampler(DiffusionModel(model, schedule, "eps", sampling), request)
    states = [initial_noise(seed, ids, model.sample_shape)]
    states += [step.x.clone() for step in sampler.trajectory(ids)]
    return torch.stack(states).flatten(2)


def noised(points: Tensor, schedule: NoiseSchedule, t: int, seed: int) -> Tensor:
    """q(x_t | x_0) of points `[N, 2, 1, 1]` (equation 4): float32 `[N, 2]`."""
    x_t = q_sample(
        points,
        torch.full((len(points),), t),
        schedule.sqrt_alpha_bar.float(),
        schedule.sqrt_one_minus_alpha_bar.float(),
        seed,
        torch.arange(len(points)),
    )
    return x_t.flatten(1)


def _place_of(samples: Tensor, points: Tensor, place: Tensor) -> Tensor:
    """Position along the curve of points `[M, 2]`: that of the nearest data point."""
    return place[torch.cdist(samples, points.flatten(1)).argmin(1)]


def _scatter(axes: Axes, points: Tensor, place: Tensor | None = None, size: float = 1.0) -> None:
    x, y = points.unbind(1)
    colour = {"color": "#000000"} if place is None else {"c": place.numpy(), "cmap": SCALE}
    axes.scatter(x.numpy(), y.numpy(), size, linewidths=0, zorder=3, **colour)
    _square(axes)


def _trails(axes: Axes, states: Tensor) -> None:
    """The ways of a few points, `[S, N, 2]`."""
    x, y = states.unbind(2)
    axes.plot(x.numpy(), y.numpy(), color="#D55E00", linewidth=0.5)


def _field(
    axes: Axes, model: PointNetwork, schedule: NoiseSchedule, t: int, coloured: bool = True
) -> None:
    """Directions of the score, coloured by its length, or grey."""
    ticks = torch.linspace(-_EXTENT, _EXTENT, _ARROWS + 2)[1:-1]
    x, y = torch.meshgrid(ticks, ticks, indexing="xy")
    at = torch.stack([x.flatten(), y.flatten()], dim=1)[:, :, None, None]
    arrows = score(model, schedule, at, t).flatten(1)
    length = arrows.norm(dim=1, keepdim=True)
    u, v = (arrows / length.clamp(min=1e-12)).T
    colour = (length.log().ravel().numpy(),) if coloured else ()
    axes.quiver(
        x.flatten().numpy(), y.flatten().numpy(), u.numpy(), v.numpy(), *colour, cmap=SCALE,
        color="#AAAAAA", scale=22, width=0.006, pivot="mid",
    )  # fmt: skip
    _square(axes)


def _square(axes: Axes) -> None:
    axes.set(xlim=(-_EXTENT, _EXTENT), ylim=(-_EXTENT, _EXTENT), aspect="equal")
    without_ticks(axes)
