"""The coefficient table: all that distinguishes one sampler from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.prediction import Prediction, x0_coefficients
from ddpm_engine.schedule import NoiseSchedule
from ddpm_kernels import Column


@dataclass(frozen=True, eq=False)
class CoefficientTable:
    """What `ddpm_kernels.reverse_step` needs to know of a sampler, one row a step."""

    timesteps: Tensor
    """int64 `[S]`: the timestep that the network is shown at each step, decreasing."""
    rows: Tensor
    """float64 `[S, Column.HISTORY + K]`: the coefficients, in `Column` order."""

    @property
    def history(self) -> int:
        """K: how many earlier estimates of x_0 the sampler looks back on."""
        return self.rows.shape[1] - Column.HISTORY


def empty_rows(
    schedule: NoiseSchedule, timesteps: Tensor, prediction: Prediction, history: int = 0
) -> Tensor:
    """Rows with the first two columns filled in and no guidance, everything else zero."""
    rows = torch.zeros(len(timesteps), Column.HISTORY + history, dtype=torch.float64)
    rows[:, Column.X0_FROM_X], rows[:, Column.X0_FROM_OUTPUT] = x0_coefficients(
        prediction,
        schedule.sqrt_alpha_bar[timesteps],
        schedule.sqrt_one_minus_alpha_bar[timesteps],
    )
    rows[:, Column.GUIDANCE] = 1
    return rows
