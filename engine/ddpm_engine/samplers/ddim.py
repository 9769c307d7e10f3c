"""DDIM (Song, Meng & Ermon 2021): every chain between the deterministic one and the ancestral."""

from __future__ import annotations

from torch import Tensor

from ddpm_engine.diffusion.parameterization import Prediction
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.table import CoefficientTable, empty_rows
from ddpm_kernels import Column


def ddim_table(
    schedule: NoiseSchedule, timesteps: Tensor, prediction: Prediction = "eps", eta: float = 0.0
) -> CoefficientTable:
    """The table of DDIM: x′ = a′ x̂_0 + sqrt(s′² − v²) ε̂ + v z (equations 12 and 16).

    ε̂ = (x − a x̂_0) / s is derived anew from the clipped x̂_0, so that x̂_0 and ε̂ always make up x.
    Every row is of first order; the last returns x̂_0.

    Args:
        schedule: the noise schedule the network was trained on.
        timesteps: int64 or float64 `[S]`, strictly decreasing.
        prediction: what the network predicts.
        eta: share of the posterior's standard deviation that is drawn anew, v = η sqrt(β̃): 0 draws
            nothing, 1 is ancestral sampling with `fixed_small` variance.

    Raises:
        UserError: `eta` outside [0, 1], or ε prediction on a schedule with zero terminal SNR.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}; it must lie in [0, 1]")
    a, s = noise_levels(schedule, timesteps)
    (a, a_next), (s, s_next) = (a[:-1], a[1:]), (s[:-1], s[1:])
    drawn = eta**2 * (1 - (a / a_next).square()) / s.square()  # v² / s′²
    direction = s_next * (1 - drawn).clamp(min=0).sqrt()
    rows = empty_rows(a, s, prediction)
    rows[:, Column.X] = direction / s
    rows[:, Column.X0] = a_next - direction * a / s
    rows[:, Column.NOISE] = s_next * drawn.sqrt()
    return CoefficientTable(timesteps, rows)
