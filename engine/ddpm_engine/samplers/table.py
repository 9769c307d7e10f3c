"""The coefficient table: all that distinguishes one sampler from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.diffusion.parameterization import parameterization
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_kernels import Column


@dataclass(frozen=True, eq=False)
class CoefficientTable:
    """A sampler, as `ddpm_kernels.reverse_step` needs it: one row per network evaluation."""

    timesteps: Tensor
    """int64 or float64 `[S]`, not increasing: the timestep of the state before each row.
    Fractions lie between the schedule's timesteps (Karras et al.'s spacing)."""
    rows: Tensor
    """float64 `[S, Column.HISTORY + K]`: the coefficients, in `Column` order."""
    state_scale: Tensor
    """float64 `[S + 1]`: ratio between the loop's state and x_t = a x_0 + s ε before each row, then
    after the last, where it is 1."""
    noise_input: Tensor
    """int64 or float64 `[S]`: the noise level that the network is given, such as the timestep."""

    @property
    def evaluations(self) -> int:
        """S: how often the network is called."""
        return len(self.rows)

    @property
    def history(self) -> int:
        """K: how many earlier estimates of x_0 the sampler looks back on."""
        return self.rows.shape[1] - Column.HISTORY


def empty_rows(steps: int, history: int = 0) -> Tensor:
    """Return rows of zeros, float64 `[steps, Column.HISTORY + history]`, for a sampler to fill."""
    return torch.zeros(steps, Column.HISTORY + history, dtype=torch.float64)


def set_history_weights(rows: Tensor, row: int, weights: Tensor) -> None:
    """Set the factors of a row's own estimate of x_0 and of earlier ones.

    Args:
        rows: `[S, Column.HISTORY + K]`, changed in place.
        row: which one.
        weights: `[1 + K]`: entry l is the factor of the estimate made l rows ago.
    """
    slots = len(weights) - 1
    rows[row, Column.X0] = weights[0]
    for lag in range(1, slots + 1):
        rows[row, Column.HISTORY + (row - lag) % slots] = weights[lag]


def table_for(
    schedule: NoiseSchedule, timesteps: Tensor, rows: Tensor, prediction: str
) -> CoefficientTable:
    """Complete a sampler's rows for a kind of network.

    A sampler says how the next state follows from the estimate of x_0; the network's
    parameterization says how that estimate follows from the state and the output. If the network
    sees z = k x_t, the loop's state is z, so that a step stays the network and one operation.

    Args:
        schedule: the noise schedule that the network was trained on.
        timesteps: int64 or float64 `[S]`, not increasing, of the state before each row.
        rows: float64 `[S, Column.HISTORY + K]`, as of a state x_t; left unchanged.
        prediction: what the network predicts.

    Raises:
        UserError: an unknown prediction, or one that needs a signal where there is none (zero
            terminal SNR).
    """
    row = parameterization(prediction, schedule)
    a, s = (level[:-1] for level in noise_levels(schedule, timesteps))
    row.check(a)
    scale = torch.cat([row.state_scale(a, s), a.new_ones(1)])
    before, after = scale[:-1], scale[1:]
    rows = rows.clone()
    rows[:, Column.X0_FROM_X], rows[:, Column.X0_FROM_OUTPUT] = row.x0_coefficients(a, s)
    rows[:, Column.GUIDANCE] = 1
    rows[:, Column.X] *= after / before
    rows[:, Column.X0] *= after
    rows[:, Column.NOISE] *= after
    rows[:, Column.HISTORY :] *= after[:, None]
    return CoefficientTable(timesteps, rows, scale, row.noise_level(a, s, timesteps))
