"""Which timesteps a sampler visits when it takes fewer steps than the schedule has."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ddpm_engine.errors import UserError

Spacing = Literal["leading", "trailing", "linspace"]


def spaced_timesteps(timesteps: int, steps: int, spacing: Spacing = "trailing") -> Tensor:
    """Choose `steps` of the timesteps 0 … T − 1, in the order a sampler visits them.

    `leading` takes multiples of T // steps from 0 up; `trailing` counts down from T − 1 in strides
    of T / steps; `linspace` includes both ends. (Lin et al. 2023, table 2.) The timestep before an
    entry is the next entry of the list, whatever the spacing.

    Returns:
        int64 `[steps]`, strictly decreasing.

    Raises:
        UserError: `steps` outside 1 … T.
    """
    if not 1 <= steps <= timesteps:
        raise UserError(
            f"steps is {steps}; a schedule of {timesteps} timesteps takes 1 to {timesteps} steps"
        )
    if spacing == "leading":
        return torch.arange(steps).flip(0) * (timesteps // steps)
    if spacing == "trailing":
        ends = torch.arange(steps, 0, -1, dtype=torch.float64) * timesteps / steps
        return ends.round().to(torch.int64) - 1
    if spacing == "linspace":
        return torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64).round().to(torch.int64)
    raise UserError(f"spacing is {spacing!r}; it must be leading, trailing or linspace")
