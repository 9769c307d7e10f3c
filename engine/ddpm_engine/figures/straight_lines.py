"""From the chain to the straight line: how points of the plane become noise, and come back.

What would be learnt is known here: the best estimate of x_0 is a mean over the data, so that the
figure shows the methods and not a network (Karras et al. 2022, appendix B.3).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddpm_engine.diffusion.flow_schedule import FlowSchedule
from ddpm_engine.diffusion.parameterization import parameterization
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.plots.style import saved, without_ticks
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.initial_noise import initial_noise
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler
from ddpm_kernels import Stream, gaussian_noise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PATHS, _SAMPLES, _STEPS, _FEW = 40, 600, 100, 5
_KNOWN = 2048
"""Points that estimates are means over."""
_EXTENT = 3.0


class BestEstimate(nn.Module):
    """The network that training would end with, of data that are these points alone.

    E[x_0 ∣ x_t] = Σ w_i x_i with weights w_i ∝ exp(−|x_t − a x_i|² / (2 s²)), as an output of the
    parameterization.

    Args:
        points: the data, float32 `[N, 2, 1, 1]`.
        schedule: of the levels it is given.
        prediction: what it predicts: `v`, of timesteps, or `flow`.
    """

    sample_shape = (2, 1, 1)

    def __init__(self, points: Tensor, schedule: NoiseSchedule, prediction: str) -> None:
        super().__init__()
        self.points = points.flatten(1).double()
        self.schedule, self.row = schedule, parameterization(prediction, schedule)

    def forward(self, z: Tensor, level: Tensor, conditioning: object = None) -> Tensor:
        """Return the output, float32 `[B, 2, 1, 1]` as `z`; levels are all the same."""
        timestep = level[:1].double() if self.row.takes_timestep else level[:1].double() - 1
        a, s = (factor[0] for factor in noise_levels(self.schedule, timestep))
        z = z.double()
        x = z / self.row.state_scale(a, s)
        away = (x.flatten(1)[:, None] - a * self.points).square().sum(2)
        shares = (-away / (2 * s.square())).softmax(1)
        x0 = (shares @ self.points)[:, :, None, None]
        return self.row.from_x0(x0, z, a, s).float()


def straight_lines_figure(points: Tensor, seed: int, path: Path) -> None:
    """Compare the probability flow of the linear chain and of flow matching, in the plane.

    In a row each: how single points become noise, how the ODE leads from noise to points in many
    steps, and where few steps of Euler's method lead.

    Args:
        points: the data, float32 `[N, 2, 1, 1]`.
        seed: of all noise.
        path: of the PNG.
    """
    kinds: list[tuple[str, NoiseSchedule, str]] = [
        ("the chain, $x_t$", NoiseSchedule.linear(), "v"),
        ("flow matching, $z$", FlowSchedule.build(), "flow"),
    ]
    with saved(path, 9, 6.2, 2, 3, palette=True) as (_, axes):
        for row, (label, schedule, prediction) in zip(axes, kinds, strict=True):
            model = BestEstimate(points[:_KNOWN], schedule, prediction)
            pairs, flow, few = row
            _paths(pairs, _lines(points[:_PATHS], model, seed))
            states = ode_states(model, _STEPS, seed, _PATHS)
            _paths(flow, states)
            _dots(few, points.flatten(1)[:_SAMPLES], "#BBBBBB")
            _dots(few, ode_states(model, _FEW, seed, _SAMPLES)[-1], "#D55E00")
            pairs.set_ylabel(label)
        axes[0, 0].set_title("single points become noise")
        axes[0, 1].set_title("the flow of noise to the data")
        axes[0, 2].set_title(f"{_FEW} steps of Euler's method")


def ode_states(model: BestEstimate, steps: int, seed: int, count: int) -> Tensor:
    """Return all states of deterministic sampling, as the network sees them.

    Args:
        model: the network.
        steps: of ddim.
        seed: of the noise.
        count: number of points.

    Returns:
        float32 `[steps + 1, count, 2]`, from the noise to the samples.
    """
    sampling = SamplingConfig("ddim", steps, clip_x0=False)
    bound = DiffusionModel(model, model.schedule, model.row.name, sampling)
    sampler = Sampler(bound, SampleRequest(seed=seed, precision="no"))
    ids = torch.arange(count)
    scales = sampler.table.state_scale.tolist()
    states = [scales[0] * initial_noise(seed, ids, model.sample_shape)]
    for step, scale in zip(sampler.trajectory(ids), scales[1:], strict=True):
        states.append(scale * step.x)
    return torch.stack(states).flatten(2)


def _lines(points: Tensor, model: BestEstimate, seed: int) -> Tensor:
    """Return the ways of single points to noise of their own, `[T + 1, N, 2]`."""
    schedule = model.schedule
    noise = gaussian_noise(seed, torch.arange(len(points)), (2, 1, 1), 0, Stream.TRAINING_NOISE)
    a, s = noise_levels(schedule, torch.arange(schedule.timesteps - 1, -1, -1))
    scale = model.row.state_scale(a, s)
    a, s = ((scale * factor).float()[:, None, None] for factor in (a, s))
    return a * points.flatten(1) + s * noise.flatten(1)


def _paths(axes: Axes, states: Tensor) -> None:
    """Plot ways `[S, N, 2]`, with their ends."""
    x, y = states.numpy().transpose(2, 0, 1)
    axes.plot(x, y, color="#0072B2", linewidth=0.5, alpha=0.7)
    _dots(axes, states[0], "#999999", 4)
    _dots(axes, states[-1], "#D55E00", 4)


def _dots(axes: Axes, points: Tensor, colour: str, size: float = 1.5) -> None:
    x, y = points.numpy().T
    axes.scatter(x, y, size, color=colour, linewidths=0, zorder=3)
    axes.set(xlim=(-_EXTENT, _EXTENT), ylim=(-_EXTENT, _EXTENT), aspect="equal")
    without_ticks(axes)
