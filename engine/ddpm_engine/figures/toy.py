"""Diffusion in the plane: data of two dimensions, whose whole distribution can be seen.

A point is an image of two channels and one pixel, `[B, 2, 1, 1]`, so that the engine's own
schedule, noising, loss and samplers serve it as they are; only the network is another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.identity import check_seed
from ddpm_kernels import Stream, denoising_loss, q_sample, random_integers

Toy = Literal["swiss_roll", "moons"]
TOYS: tuple[str, ...] = get_args(Toy)

POINTS = 8192
STEPS = 4000
BATCH = 512
WIDTH = 128
LEARNING_RATE = 3e-3


def toy_points(toy: Toy) -> tuple[Tensor, Tensor]:
    """A data set in the plane, made by scikit-learn, centred and scaled to unit variance.

    Args:
        toy: `"swiss_roll"`, a spiral; or `"moons"`, two half circles.

    Returns:
        Points, float32 `[POINTS, 2, 1, 1]`, and where along the curve each lies, from 0 to 1:
        float32 `[POINTS]`.

    Raises:
        UserError: an unknown data set.
    """
    from sklearn.datasets import make_moons, make_swiss_roll

    if toy == "swiss_roll":
        roll, place = make_swiss_roll(POINTS, noise=0.3, random_state=0)
        points = roll[:, [0, 2]]
    elif toy == "moons":
        points, moon = make_moons(POINTS, noise=0.04, random_state=0)
        along = np.where(moon == 0, points[:, 0] + 1, points[:, 0]) / 2
        place = 1.5 * moon + along  # apart, so that the two have colours of their own
    else:
        raise UserError(f"toy is {toy!r}; it must be one of {', '.join(TOYS)}")
    points = points - points.mean(0)
    points = points / points.std()
    place = (place - place.min()) / (place.max() - place.min())
    return torch.from_numpy(points).float()[:, :, None, None], torch.from_numpy(place).float()


def toy_schedule() -> NoiseSchedule:
    """The linear schedule on a fifth of its timesteps, which end in as little signal."""
    return NoiseSchedule.linear(200, 5e-4, 0.1)


class PointNetwork(nn.Module):
    """Predicts the noise in a point of the plane: three hidden layers on sines and cosines.

    Args:
        timesteps: T.
        width: of each hidden layer.
    """

    sample_shape = (2, 1, 1)
    time_frequencies: Tensor
    place_frequencies: Tensor

    def __init__(self, timesteps: int, width: int = WIDTH) -> None:
        super().__init__()
        octaves = 2.0 ** torch.arange(-1, 5)
        self.register_buffer("time_frequencies", math.pi * octaves / timesteps)
        self.register_buffer("place_frequencies", octaves[1:5])
        inputs = 2 + 2 * 6 + 2 * 2 * 4
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: None = None) -> Tensor:
        """The noise in noisy points: float32 `[B, 2, 1, 1]`, as `x`; `timesteps` int64 `[B]`."""
        point = x.flatten(1)
        time = timesteps.float().expand(len(x))[:, None] * self.time_frequencies
        place = (point[..., None] * self.place_frequencies).flatten(1)
        features = torch.cat([point, time.sin(), time.cos(), place.sin(), place.cos()], dim=1)
        return self.layers(features)[:, :, None, None]


def train_toy(
    points: Tensor,
    schedule: NoiseSchedule,
    steps: int = STEPS,
    seed: int = 0,
    on_step: Callable[[int], object] = lambda _: None,
) -> PointNetwork:
    """Fit a `PointNetwork` by L_simple (Ho et al. 2020, algorithm 1).

    Args:
        points: float32 `[N, 2, 1, 1]`, in no particular order.
        schedule: the noise schedule.
        steps: of the optimizer, each with `BATCH` points.
        seed: of weights and noise.
        on_step: called with 1 after each step, for progress bars.

    Returns:
        The network, in eval mode.

    Raises:
        UserError: a seed or a number of steps out of range.
    """
    if steps < 1:
        raise UserError(f"`steps` is {steps}; it must be at least 1", "steps")
    check_seed(seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = PointNetwork(schedule.timesteps)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    signal, sigma = schedule.sqrt_alpha_bar.float(), schedule.sqrt_one_minus_alpha_bar.float()
    of_noise = torch.ones_like(signal)
    for step in range(steps):
        positions = torch.arange(step * BATCH, (step + 1) * BATCH)
        t = random_integers(seed, positions, schedule.timesteps, 0, Stream.TRAINING_TIMESTEP)
        x_0 = points[positions % len(points)]
        x_t = q_sample(x_0, t, signal, sigma, seed, positions)
        loss = denoising_loss(model(x_t, t), x_0, t, None, of_noise, seed, positions).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        on_step(1)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def score(model: PointNetwork, schedule: NoiseSchedule, x: Tensor, t: int) -> Tensor:
    """∇ log q(x_t) as the network knows it: −ε̂ / sqrt(1 − ᾱ_t) (Song et al. 2021, section 3).

    Args:
        model: a trained network.
        schedule: what it was trained on.
        x: points, float32 `[B, 2, 1, 1]`.
        t: the timestep, from 0.

    Returns:
        float32 `[B, 2, 1, 1]`: where the data are, seen from each point, in units of one over the
        distance.
    """
    timesteps = torch.full((len(x),), t)
    return -model(x, timesteps) / schedule.sqrt_one_minus_alpha_bar[t].float()
