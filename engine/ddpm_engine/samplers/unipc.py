"""UniPC (Zhao et al. 2023, section 3): a predictor, and a corrector at no further evaluation.

The network is evaluated at the predicted state only. Its output first corrects that state, then
predicts the next. With m_i the estimate of x_0 at row i, p predicted and c corrected,

    p_{i+1} = (s_{i+1} / s_i) c_i + P_i(m_i, m_{i−1}, …)
    c_{i+1} = (s_{i+1} / s_i) c_i + C_i(m_{i+1}, m_i, m_{i−1}, …)

where P_i and C_i are linear. So c_i = p_i + C_{i−1} − P_{i−1}: the corrected state need not be
kept, and a step of the loop, from p_i to p_{i+1}, is one row with history.
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


def unipc_table(
    schedule: NoiseSchedule, timesteps: Tensor, prediction: str = "eps", order: int = 2
) -> CoefficientTable:
    """Build the table of UniPC with data prediction and B(h) = e^h − 1 (the paper's B_2).

    Row i predicts with order i + 1 at most, for want of estimates, and row S − j with order j at
    most, so the last returns x̂_0. Each step is corrected with the order that it was predicted with,
    which raises its accuracy by one; the last cannot be. On a schedule with zero terminal SNR the
    first estimate lies at λ = −∞ and serves the first step alone.

    Args:
        schedule: the noise schedule the network was trained on.
        timesteps: int64 or float64 `[S]`, strictly decreasing.
        prediction: what the network predicts.
        order: of the predictor, 1 to 3.

    Raises:
        UserError: a prediction that needs a signal, on a schedule with zero terminal SNR.
        ValueError: another order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; it must be 1, 2 or 3")
    a, s = noise_levels(schedule, timesteps)
    time = half_log_snr(a, s)
    steps = len(timesteps)
    rows = empty_rows(steps, history=order)
    correction = torch.zeros(order + 1, dtype=torch.float64)
    for i in range(steps):
        usable = min(order, usable_history(time, i), steps - i)
        visited = time[i + 1 - usable : i + 2].flip(0)
        predictor, corrector = (
            a[i + 1] * _weights(visited, order + 2, corrected) for corrected in (False, True)
        )
        decay = s[i + 1] / s[i]
        rows[i, Column.X] = decay
        set_history_weights(rows, i, predictor[1:] + decay * correction)
        correction = (corrector - predictor)[:-1]
    return table_for(schedule, timesteps, rows, prediction)


def _weights(visited: Tensor, size: int, corrected: bool) -> Tensor:
    """Return the weights of a step's estimates in units of a′: float64 `[size]`.

    Entry 0 belongs to the estimate where the step ends, zero unless `corrected`; 1 to the one where
    it begins; the others to those before. `visited` holds λ of as many of them as are used.
    """
    h = visited[0] - visited[1]
    estimates = torch.eye(size, dtype=torch.float64)
    others = [*range(2, len(visited)), *([0] if corrected else [])]
    weights = estimates[1].clone()
    if others:
        distances = (visited[others] - visited[1]) / h
        if corrected:
            distances[-1] = 1  # also where h is infinite
        slopes = (estimates[others] - estimates[1]) / distances[:, None]
        weights += (_slope_weights(h, distances)[:, None] * slopes).sum(0)
    return -torch.expm1(-h) * weights


def _slope_weights(h: Tensor, distances: Tensor) -> Tensor:
    """Solve R ρ = b (Theorem 3.1) for the weight of each slope, `[n]`.

    Args:
        h: λ from where the step begins to where it ends.
        distances: `[n]`, of the slopes' ends from where the step begins, in units of h.
    """
    count = len(distances)
    if count == 1:  # a half suffices for the order, and is what the authors take
        return torch.full_like(distances, 0.5)
    moments, factorial = [], 1
    remainder = torch.expm1(-h) / -h - 1
    for k in range(1, count + 1):
        moments.append(remainder * factorial / torch.expm1(-h))
        factorial *= k + 1
        remainder = remainder / -h - 1 / factorial
    powers = torch.stack([distances**k for k in range(count)])
    return torch.linalg.solve(powers, torch.stack(moments))
