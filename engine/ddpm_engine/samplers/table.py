"""The coefficient table: all that distinguishes one sampler from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.diffusion.parameterization import Prediction, x0_coefficients
from ddpm_engine.errors import UserError
from ddpm_kernels import Column


@dataclass(frozen=True, eq=False)
class CoefficientTable:
    """What `ddpm_kernels.reverse_step` needs to know of a sampler, one row a network evaluation."""

    timesteps: Tensor
    """int64 or float64 `[S]`: the timestep that the state is at where each row begins, and that the
    network is told, not increasing.
    Fractions lie between the schedule's timesteps (Karras et al.'s spacing)."""
    rows: Tensor
    """float64 `[S, Column.HISTORY + K]`: the coefficients, in `Column` order."""
    scale: Tensor | None = None
    """float64 `[S + 1]`: the loop's state is so many times x = a x_0 + s ε where each row begins,
    and at the end; None: it is x. See `preconditioned`."""
    shown: Tensor | None = None
    """float64 `[S]`: what the network is told of the noise instead of the timestep, or None."""

    @property
    def evaluations(self) -> int:
        """S: how often the network is called."""
        return len(self.rows)

    @property
    def history(self) -> int:
        """K: how many earlier estimates of x_0 the sampler looks back on."""
        return self.rows.shape[1] - Column.HISTORY


def empty_rows(a: Tensor, s: Tensor, prediction: Prediction, history: int = 0) -> Tensor:
    """Rows with the first two columns filled in and no guidance, everything else zero.

    Float64 `[S, Column.HISTORY + K]`.

    Args:
        a: float64 `[S]`, factor of the image in the state that each row starts from.
        s: float64 `[S]`, factor of the noise.
        prediction: what the network predicts.
        history: K.

    Raises:
        UserError: ε prediction where the state is all noise (a = 0).
    """
    if prediction == "eps" and bool((a == 0).any()):
        raise UserError(
            "prediction is 'eps', but this schedule ends in pure noise (zero terminal SNR): there "
            "the noise says nothing of the image; use a network that predicts 'v' or 'x0'"
        )
    rows = torch.zeros(len(a), Column.HISTORY + history, dtype=torch.float64)
    rows[:, Column.X0_FROM_X], rows[:, Column.X0_FROM_OUTPUT] = x0_coefficients(prediction, a, s)
    rows[:, Column.GUIDANCE] = 1
    return rows


def set_history_weights(rows: Tensor, row: int, weights: Tensor) -> None:
    """Fill in what row `row` makes of its own estimate of x_0 and of earlier ones.

    Args:
        rows: `[S, Column.HISTORY + K]`, changed.
        row: which one.
        weights: `[1 + K]`: entry l is the factor of the estimate made l rows ago.
    """
    slots = len(weights) - 1
    rows[row, Column.X0] = weights[0]
    for lag in range(1, slots + 1):
        rows[row, Column.HISTORY + (row - lag) % slots] = weights[lag]
