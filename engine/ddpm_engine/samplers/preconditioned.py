"""Coefficient tables for networks with EDM's preconditioning."""

from __future__ import annotations

from dataclasses import replace

import torch

from ddpm_engine.diffusion.parameterization import preconditioning
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import Column


def preconditioned(table: CoefficientTable, schedule: NoiseSchedule) -> CoefficientTable:
    """The same sampler for a network F of EDM, so that a step stays the network and one operation.

    F wants c_in y with y = x / a, and is told c_noise. The loop's state therefore becomes k x with
    k = c_in / a, which scales columns, and

        x̂_0 = c_skip y + c_out F = (c_skip / c_in) (k x) + c_out F.

    Args:
        table: of any sampler, for a network that predicts x_0.
        schedule: what it was made of; its `sigma_data` counts.
    """
    a, s = noise_levels(schedule, table.timesteps)
    a, s = a[:-1], s[:-1]
    c = preconditioning(s / a, schedule.sigma_data)
    scale = torch.cat([c.input / a, a.new_ones(1)])
    before, after = scale[:-1], scale[1:]
    rows = table.rows.clone()
    rows[:, Column.X0_FROM_X] = c.skip / c.input
    rows[:, Column.X0_FROM_OUTPUT] = c.out
    rows[:, Column.X] *= after / before
    rows[:, Column.X0] *= after
    rows[:, Column.NOISE] *= after
    rows[:, Column.HISTORY :] *= after[:, None]
    return replace(table, rows=rows, scale=scale, shown=c.noise)
