"""DDIM (Song, Meng & Ermon 2021): every chain between the deterministic one and the ancestral."""

from __future__ import annotations

from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.config import LastLevel
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.table import CoefficientTable, empty_rows, table_for
from ddpm_kernels import Column


def ddim_table(
    schedule: NoiseSchedule,
    timesteps: Tensor,
    prediction: str = "eps",
    eta: float = 0.0,
    last_level: LastLevel = "clean",
) -> CoefficientTable:
    """Build the table of DDIM: x′ = a′ x̂_0 + sqrt(s′² − v²) ε̂ + v z (equations 12 and 16).

    ε̂ = (x − a x̂_0) / s is derived from the clipped x̂_0, so that x̂_0 and ε̂ always make up x. Every
    row is of first order; the last returns x̂_0, or what has the noise level of timestep 0.

    Args:
        schedule: the noise schedule the network was trained on.
        timesteps: int64 or float64 `[S]`, strictly decreasing.
        prediction: what the network predicts.
        eta: fresh noise as a fraction of the posterior's standard deviation, v = η sqrt(β̃): 0 is
            deterministic, 1 is ancestral sampling with `fixed_small` variance.
        last_level: that the last row ends at.

    Raises:
        UserError: `eta` outside [0, 1], or a prediction that needs a signal, on a schedule with
            zero terminal SNR.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"`eta` is {eta}; it must lie in [0, 1]", "eta")
    a, s = noise_levels(schedule, timesteps)
    if last_level == "first":
        a[-1], s[-1] = schedule.sqrt_alpha_bar[0], schedule.sqrt_one_minus_alpha_bar[0]
    (a, a_next), (s, s_next) = (a[:-1], a[1:]), (s[:-1], s[1:])
    fresh = eta**2 * (1 - (a / a_next).square()) / s.square()  # v² / s′²
    direction = s_next * (1 - fresh).clamp(min=0).sqrt()
    rows = empty_rows(len(timesteps))
    rows[:, Column.X] = direction / s
    rows[:, Column.X0] = a_next - direction * a / s
    rows[:, Column.NOISE] = s_next * fresh.sqrt()
    return table_for(schedule, timesteps, rows, prediction)
