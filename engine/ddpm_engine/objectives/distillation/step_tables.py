"""Tables of a stage of trajectory distillation; see `trajectory` for the mathematics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import Column


@dataclass(frozen=True, eq=False)
class StepTables:
    """The tables of a stage, an entry for each of the M noise levels that the teacher visits."""

    teacher: CoefficientTable
    """DDIM in M steps."""
    student: CoefficientTable
    """The same steps for a network that predicts what the student does."""
    signal: Tensor
    """float64 `[M]`: factor of the image in the networks' input."""
    noise: Tensor
    """float64 `[M]`: factor of the noise in the networks' input."""
    kappa: Tensor
    """float64 `[M]`: weight κ of the second estimate in the target."""
    weights: Tensor
    """float64 `[M]`: of the squared error of the student's output."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> StepTables:
        """Return the tables on a device, in a precision."""

        def moved(table: CoefficientTable) -> CoefficientTable:
            level = table.noise_input
            return replace(
                table,
                timesteps=table.timesteps.to(device),
                rows=table.rows.to(device, dtype),
                noise_input=level.to(device, dtype if level.is_floating_point() else level.dtype),
            )

        rest = (self.signal, self.noise, self.kappa, self.weights)
        return StepTables(
            moved(self.teacher), moved(self.student), *(table.to(device, dtype) for table in rest)
        )


def step_tables(
    schedule: NoiseSchedule, steps: int, teacher_steps: int, prediction: str, teacher: str
) -> StepTables:
    """Build the tables of a stage.

    Args:
        schedule: of both networks.
        steps: N, the student's number of steps.
        teacher_steps: M, a multiple of N.
        prediction: what the student predicts.
        teacher: what its teacher predicts; both networks see the same input.

    Raises:
        UserError: more than T steps; or a prediction that needs a signal, with zero terminal SNR.
    """
    theirs = build_table(schedule, "ddim", teacher_steps, prediction=teacher)
    ours = build_table(schedule, "ddim", teacher_steps, prediction=prediction)
    a, s = noise_levels(schedule, ours.timesteps)
    level = torch.arange(teacher_steps)
    # Level M is the image itself, where ρ would be infinite; no step begins there.
    rho = (a / s)[:-1]
    stride = teacher_steps // steps
    end = (level // stride + 1) * stride
    between = (level + 1).clamp(max=teacher_steps - 1)
    kappa = (a[end] - s[end] * rho[between]) / (a[end] - s[end] * rho)
    kappa[stride - 1 :: stride] = 0
    scale = ours.state_scale[:-1]
    return StepTables(
        theirs,
        ours,
        signal=scale * a[:-1],
        noise=scale * s[:-1],
        kappa=kappa,
        weights=rho.square().clamp(min=1) * ours.rows[:, Column.X0_FROM_OUTPUT].square(),
    )
