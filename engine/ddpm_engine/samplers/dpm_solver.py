"""DPM-Solver++ (Lu et al. 2022b): multistep exponential integrators on the estimate of x_0.

In λ = log(a / s) the probability-flow ODE solves to

    x′ = (s′ / s) x + s′ ∫ e^λ x̂_0 dλ        (equation 8)

and a solver of order k puts a polynomial of degree k − 1 through the last k estimates for x̂_0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.noise_levels import half_log_snr, noise_levels, usable_history
from ddpm_engine.samplers.table import (
    CoefficientTable,
    empty_rows,
    set_history_weights,
    table_for,
)
from ddpm_kernels import Column

_FEW_STEPS = 15
"""With fewer steps than this, the last but one is of second order at most."""


def dpm_solver_table(
    schedule: NoiseSchedule,
    timesteps: Tensor,
    prediction: str = "eps",
    order: int = 2,
    stochastic: bool = False,
) -> CoefficientTable:
    """Build the table of multistep DPM-Solver++, or of SDE-DPM-Solver++.

    Order 1 is DDIM; order 2 is algorithm 2 of the paper (2M). Order 3 is that of the authors' code
    (3M), which gives the second difference half the weight of Taylor's theorem and so converges
    with order 2, too. In full it would be of third order, but with 15 to 50 steps that are even in
    the timestep, and so uneven in λ, it erred up to 2.5 times as much on a mixture of Gaussians.
    UniPC does have third order.

    Row i is of order i + 1 at most, for want of estimates; the last row is of first order and
    returns x̂_0; and in tables of fewer than 15 rows the last but one is of second order at most.
    On a schedule with zero terminal SNR the first estimate lies at λ = −∞ and serves the first row
    alone, so the second row is of first order too.

    Args:
        schedule: the noise schedule the network was trained on.
        timesteps: int64 or float64 `[S]`, strictly decreasing.
        prediction: what the network predicts.
        order: 1, 2 or 3.
        stochastic: solve the reverse SDE instead, orders 1 and 2 (appendix: order 1 is ancestral
            sampling with `fixed_small` variance).

    Raises:
        UserError: a prediction that needs a signal, on a schedule with zero terminal SNR.
        ValueError: another order.
    """
    if order not in ((1, 2) if stochastic else (1, 2, 3)):
        raise ValueError(f"order is {order}; it must be 1, 2 or, without noise, 3")
    a, s = noise_levels(schedule, timesteps)
    time = half_log_snr(a, s)
    steps = len(timesteps)
    rows = empty_rows(steps, history=order - 1)
    for i in range(steps):
        usable = min(order, usable_history(time, i))
        if i == steps - 1:
            usable = 1
        elif i == steps - 2 and steps < _FEW_STEPS:
            usable = min(usable, 2)
        h = time[i + 1] - time[i]
        rows[i, Column.X] = s[i + 1] / s[i]
        forgotten = -torch.expm1(-h)
        if stochastic:
            rows[i, Column.X] *= (-h).exp()
            forgotten = -torch.expm1(-2 * h)
            rows[i, Column.NOISE] = s[i + 1] * forgotten.sqrt()
        visited = time[i + 1 - usable : i + 2].flip(0)
        set_history_weights(rows, i, a[i + 1] * _weights(visited, forgotten, order))
    return table_for(schedule, timesteps, rows, prediction)


def _weights(visited: Tensor, forgotten: Tensor, size: int) -> Tensor:
    """Return the weights of a step's estimates in units of a′: float64 `[size]`, newest first.

    Args:
        visited: λ where the step ends, where it begins and where the steps before it began, latest
            first: one more than the order.
        forgotten: 1 − e^{−h}, or of the SDE 1 − e^{−2h}.
        size: number of weights to return; those beyond the order are zero.
    """
    h = visited[0] - visited[1]
    # Estimates as symbols: row l is the one made l steps ago.
    estimates = torch.eye(size, dtype=torch.float64)
    order = len(visited) - 1
    if order == 1:
        return forgotten * estimates[0]
    ratios = (visited[1:-1] - visited[2:]) / h
    slopes = (estimates[: order - 1] - estimates[1:order]) / ratios[:, None]
    if order == 2:
        return forgotten * (estimates[0] + slopes[0] / 2)
    # h² times the second derivative would be twice this; see `dpm_solver_table`.
    curvature = (slopes[0] - slopes[1]) / ratios.sum()
    slope = slopes[0] + ratios[0] * curvature
    first = 1 - forgotten / h
    second = 0.5 - first / h
    return forgotten * estimates[0] + first * slope + second * curvature
