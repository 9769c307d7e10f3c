"""Every sampler by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.parameterization import Prediction
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.config import Spacing
from ddpm_engine.samplers.ddim import ddim_table
from ddpm_engine.samplers.ddpm import ddpm_table
from ddpm_engine.samplers.dpm_solver import dpm_solver_table
from ddpm_engine.samplers.heun import euler_table, heun_table
from ddpm_engine.samplers.preconditioned import preconditioned
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_engine.samplers.timesteps import karras_timesteps, listed_timesteps, spaced_timesteps
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
"""Name → function of (schedule, timesteps, prediction) that returns the table."""

_KARRAS = ("euler", "heun")


def build_table(
    schedule: NoiseSchedule,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: Spacing = "trailing",
    prediction: Prediction = "eps",
    *,
    variance: Variance = "fixed_large",
    eta: float = 0.0,
    timesteps: Sequence[int] | None = None,
    skip: int = 0,
) -> CoefficientTable:
    """The coefficient table of a sampler by name.

    Args:
        schedule: the noise schedule the network was trained on.
        sampler: a key of `SAMPLERS`.
        steps: how many steps to take; None: T. A step evaluates the network once, except that
            heun's do twice, the last excepted: `table.evaluations` counts them.
        spacing: which timesteps are visited; euler and heun have Karras et al.'s spacing instead.
        prediction: what the network predicts. For `"edm"` the table is one for the network's own
            inputs (`preconditioned`).
        variance: of the noise that ddpm adds.
        eta: share of fresh noise in ddim.
        timesteps: visit these, strictly decreasing, whatever `spacing` says; `steps` must be None.
        skip: leave out so many of the first steps, to begin with an image instead of noise.

    Raises:
        UserError: an unknown sampler; steps, timesteps or eta out of range; ε prediction, or Karras
            et al.'s spacing, on a schedule with zero terminal SNR.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    if timesteps is not None:
        if steps is not None:
            raise UserError(f"steps is {steps} and the timesteps are listed too; give one of them")
        visited = listed_timesteps(schedule.timesteps, timesteps)
    else:
        steps = schedule.timesteps if steps is None else steps
        if sampler in _KARRAS:
            visited = karras_timesteps(schedule, steps)
        else:
            visited = spaced_timesteps(schedule.timesteps, steps, spacing)
    if not 0 <= skip < len(visited):
        raise UserError(f"skip is {skip}; of {len(visited)} steps, 0 to {len(visited) - 1} can be")
    visited = visited[skip:]
    options: dict[str, Any] = {}
    if sampler == "ddpm":
        options["variance"] = variance
    if sampler == "ddim":
        options["eta"] = eta
    if prediction == "edm":
        return preconditioned(SAMPLERS[sampler](schedule, visited, "x0", **options), schedule)
    return SAMPLERS[sampler](schedule, visited, prediction, **options)
