"""The deterministic sampler of EDM (Karras et al. 2022, algorithm 1 without churn).

Its state is x / a, its time σ = s / a; the tables are for x itself, the state of the loop. It is
meant for `karras_timesteps`, and takes any others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.diffusion.parameterization import Prediction
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.ddim import ddim_table
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.table import CoefficientTable, empty_rows, set_history_weights
from ddpm_kernels import Column


def euler_table(
    schedule: NoiseSchedule, timesteps: Tensor, prediction: Prediction = "eps"
) -> CoefficientTable:
    """Euler's method on dx/dσ = (x − x̂_0) / σ, one row a step.

    Which is DDIM with η = 0: a line in σ is a line in the VP state.

    Args:
        schedule: the noise schedule the network was trained on.
        timesteps: int64 or float64 `[S]`, strictly decreasing.
        prediction: what the network predicts.

    Raises:
        UserError: ε prediction on a schedule with zero terminal SNR.
    """
    return ddim_table(schedule, timesteps, prediction)


def heun_table(
    schedule: NoiseSchedule, timesteps: Tensor, prediction: Prediction = "eps"
) -> CoefficientTable:
    """Heun's method, two network evaluations a step, so `2 · len(timesteps) − 1` rows.

    The first row of a step is Euler's, to x_e at σ′. The second evaluates there and replaces the
    slope by the mean of both. As (x_e − x̂_0) / σ′ is the first slope too, the state that the step
    began from is not needed:

        x′ = x_e + ½ (σ / σ′ − 1) (x̂_0′ − x̂_0)        (in the state of EDM)

    Euler's alone are the last step, to σ = 0, as in the algorithm, and one from σ = ∞ (zero
    terminal SNR), where the mean of both slopes diverges.

    Args:
        schedule: the noise schedule the network was trained on.
        timesteps: int64 or float64 `[N]`, strictly decreasing.
        prediction: what the network predicts.

    Raises:
        UserError: ε prediction on a schedule with zero terminal SNR.
    """
    euler = euler_table(schedule, timesteps, prediction).rows
    a, s = noise_levels(schedule, timesteps)
    sigma = s / a
    # Which noise level each row is evaluated at: those of the correctors come twice.
    corrected = [i for i in range(len(timesteps) - 1) if sigma[i].isfinite()]
    visited = sorted([*range(len(timesteps)), *(i + 1 for i in corrected)])
    rows = empty_rows(a[visited], s[visited], prediction, history=1)
    row = 0
    for i in range(len(timesteps)):
        rows[row, : Column.HISTORY] = euler[i]
        row += 1
        if i in corrected:
            weight = a[i + 1] * (sigma[i] / sigma[i + 1] - 1) / 2
            rows[row, Column.X] = 1
            set_history_weights(rows, row, torch.stack([weight, -weight]))
            row += 1
    return CoefficientTable(timesteps[visited], rows)
