"""Every sampler by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.config import LastLevel, Spacing
from ddpm_engine.samplers.ddim import ddim_table
from ddpm_engine.samplers.ddpm import ddpm_table
from ddpm_engine.samplers.dpm_solver import dpm_solver_table
from ddpm_engine.samplers.heun import euler_table, heun_table
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_engine.samplers.timesteps import check_steps, listed_timesteps, spaced_timesteps
from ddpm_engine.samplers.unipc import unipc_table

SAMPLERS: dict[str, Callable[..., CoefficientTable]] = {
    "ddpm": ddpm_table,
    "ddim": ddim_table,
    "dpm++1": partial(dpm_solver_table, order=1),
    "dpm++2m": partial(dpm_solver_table, order=2),
    "dpm++3m": partial(dpm_solver_table, order=3),
    "dpm++2m_sde": partial(dpm_solver_table, order=2, stochastic=True),
    "unipc": partial(unipc_table, order=2),
    "unipc3": partial(unipc_table, order=3),
    "euler": euler_table,
    "heun": heun_table,
}
"""Name → function of (schedule, timesteps, prediction) that builds the table."""

_OWN_SPACING = ("euler", "heun")


def build_table(
    schedule: NoiseSchedule,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: Spacing = "trailing",
    prediction: str = "eps",
    *,
    variance: Variance = "fixed_large",
    eta: float = 0.0,
    steps_offset: int = 0,
    last_level: LastLevel = "clean",
    timesteps: Sequence[int] | None = None,
    skip: int = 0,
) -> CoefficientTable:
    """Build the coefficient table of a sampler by name.

    Args:
        schedule: the noise schedule the network was trained on.
        sampler: a key of `SAMPLERS`.
        steps: number of steps; None: T. A step evaluates the network once; those of heun do twice,
            except the last. `table.evaluations` counts them.
        spacing: which timesteps are visited; euler and heun have the schedule's
            `solver_timesteps` instead.
        prediction: what the network predicts, a key of `PARAMETERIZATIONS`.
        variance: of the noise that ddpm adds.
        eta: fraction of fresh noise in ddim, 0 to 1.
        steps_offset: last timestep that leading spacing visits.
        last_level: that ddim ends at.
        timesteps: timesteps to visit in place of `spacing`, strictly decreasing; `steps` must be
            None.
        skip: number of first steps to leave out, to begin with an image instead of noise.

    Raises:
        UserError: an unknown sampler or prediction; steps, timesteps or eta out of range; or a
            schedule with zero terminal SNR, with a prediction that needs a signal or with Karras
            et al.'s spacing of σ.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    if timesteps is not None:
        if steps is not None:
            raise UserError(f"steps is {steps} and timesteps are listed too; give only one of them")
        visited = listed_timesteps(schedule.timesteps, timesteps)
    else:
        steps = schedule.timesteps if steps is None else steps
        if sampler in _OWN_SPACING:
            check_steps(schedule.timesteps, steps)
            visited = schedule.solver_timesteps(steps)
        else:
            visited = spaced_timesteps(schedule.timesteps, steps, spacing, steps_offset)
    if not 0 <= skip < len(visited):
        raise UserError(
            f"skip is {skip}; of {len(visited)} steps, 0 to {len(visited) - 1} can be left out"
        )
    visited = visited[skip:]
    options: dict[str, Any] = {}
    if sampler == "ddpm":
        options["variance"] = variance
    if sampler == "ddim":
        options |= {"eta": eta, "last_level": last_level}
    return SAMPLERS[sampler](schedule, visited, prediction, **options)
