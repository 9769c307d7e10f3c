"""The deterministic sampler of EDM (Karras et al. 2022, algorithm 1 without churn).

The paper's state is x / a and its time σ = s / a; these tables are for x itself, the state of the
loop. They are meant for `NoiseSchedule.solver_timesteps` but accept any timesteps. On the schedule
of flow matching the state is x / (a + s) and its time τ = s / (a + s): by `solver_unit`, both are
the same, since in either the slope is (state − x̂_0) / time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.ddim import ddim_table
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.table import (
    CoefficientTable,
    empty_rows,
    set_history_weights,
    table_for,
)
from ddpm_kernels import Column


def euler_table(
    schedule: NoiseSchedule, timesteps: Tensor, prediction: str = "eps"
) -> CoefficientTable:
    """Build the table of Euler's method on dx/dσ = (x − x̂_0) / σ, one row per step.

    It is DDIM with η = 0: a straight line in σ is one in the variance-preserving state too.

    Args:
        schedule: the noise schedule the network was trained on.
        timesteps: int64 or float64 `[S]`, strictly decreasing.
        prediction: what the network predicts.

    Raises:
        UserError: a prediction that needs a signal, on a schedule with zero terminal SNR.
    """
    return ddim_table(schedule, timesteps, prediction)


def heun_table(
    schedule: NoiseSchedule, timesteps: Tensor, prediction: str = "eps"
) -> CoefficientTable:
    """Build the table of Heun's method, two rows per step but the last: `2 N − 1` rows.

    The first row of a step is Euler's, to x_e at σ′. The second evaluates the network there and
    replaces the slope by the mean of both. Since (x_e − x̂_0) / σ′ equals the first slope, the state
    that the step began from is not needed:

        x′ = x_e + ½ (σ / σ′ − 1) (x̂_0′ − x̂_0)        (in the state of EDM)

    Two steps are Euler's alone: the last, to σ = 0, as in the algorithm, and one from σ = ∞ (zero
    terminal SNR), where the mean of both slopes diverges; that of τ does not.

    Args:
        schedule: the noise schedule the network was trained on.
        timesteps: int64 or float64 `[N]`, strictly decreasing.
        prediction: what the network predicts.

    Raises:
        UserError: a prediction that needs a signal, on a schedule with zero terminal SNR.
    """
    euler = euler_table(schedule, timesteps, "x0").rows
    a, s = noise_levels(schedule, timesteps)
    unit = schedule.solver_unit(a, s)
    time = s / unit
    # The level that each row is evaluated at: those of the correctors come twice.
    corrected = [i for i in range(len(timesteps) - 1) if time[i].isfinite()]
    visited = sorted([*range(len(timesteps)), *(i + 1 for i in corrected)])
    rows = empty_rows(len(visited), history=1)
    row = 0
    for i in range(len(timesteps)):
        rows[row, : Column.HISTORY] = euler[i]
        row += 1
        if i in corrected:
            weight = unit[i + 1] * (time[i] / time[i + 1] - 1) / 2
            rows[row, Column.X] = 1
            set_history_weights(rows, row, torch.stack([weight, -weight]))
            row += 1
    return table_for(schedule, timesteps[visited], rows, prediction)
