"""Timesteps that a sampler visits when it takes fewer steps than the schedule has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.config import Spacing


def spaced_timesteps(
    timesteps: int, steps: int, spacing: Spacing = "trailing", offset: int = 0
) -> Tensor:
    """Choose `steps` of the timesteps 0 … T − 1, in the order a sampler visits them.

    `leading` takes multiples of T // steps from 0 up; `trailing` counts down from T − 1 in strides
    of T / steps; `linspace` includes both ends (Lin et al. 2023, section 3.3, table 2). The
    timestep before an entry is the next entry of the list, whatever the spacing.

    Args:
        timesteps: T.
        steps: how many.
        spacing: how they are spaced.
        offset: of the multiples that `leading` takes, as Stable Diffusion has it.

    Returns:
        int64 `[steps]`, strictly decreasing.

    Raises:
        UserError: `steps` outside 1 … T, or an offset beyond T − 1.
    """
    check_steps(timesteps, steps)
    if spacing == "leading":
        visited = torch.arange(steps).flip(0) * (timesteps // steps) + offset
        if visited[0] >= timesteps:
            raise UserError(
                f"`steps_offset` is {offset}, by which leading `spacing` of {steps} `steps` begins "
                f"at timestep {visited[0]}, and the schedule ends with {timesteps - 1}; take "
                "trailing `spacing`, or fewer `steps`",
                "steps_offset",
            )
        return visited
    if spacing == "trailing":
        ends = torch.arange(steps, 0, -1, dtype=torch.float64) * timesteps / steps
        return ends.round().to(torch.int64) - 1
    if spacing == "linspace":
        return torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64).round().to(torch.int64)
    raise UserError(f"spacing is {spacing!r}; it must be leading, trailing or linspace")


def listed_timesteps(timesteps: int, visited: Sequence[int]) -> Tensor:
    """Check timesteps that are listed one by one.

    Args:
        timesteps: T.
        visited: strictly decreasing, each in 0 … T − 1.

    Returns:
        int64 `[len(visited)]`.

    Raises:
        UserError: an empty list, or an entry that is not an integer, out of range or not below the
            one before it; the first such entry is named.
    """
    if len(visited) == 0:
        raise UserError("the list of timesteps is empty; name at least one")
    before = timesteps
    for place, entry in enumerate(visited):
        named = f"timestep {entry} (entry {place} of the list)"
        if not isinstance(entry, int) or isinstance(entry, bool):
            raise UserError(f"{named} is not a whole number")
        if not 0 <= entry < timesteps:
            raise UserError(f"{named} is outside the schedule's 0 to {timesteps - 1}")
        if entry >= before:
            raise UserError(f"{named} is not below the {before} before it; list them downwards")
        before = entry
    return torch.tensor(list(visited), dtype=torch.int64)


def check_begins_in_noise(schedule: NoiseSchedule, visited: Tensor, listed: bool) -> None:
    """Refuse to begin with noise alone where the network expects to see an image through it.

    So it is if the image would be more than half as strong as the noise, and the schedule has a
    timestep where it is less than half of that.

    Args:
        schedule: the noise schedule.
        visited: int64 or float64 `[S]`, not increasing.
        listed: whether the timesteps were listed one by one.

    Raises:
        UserError: such a first timestep.
    """
    first = int(visited[0])
    ratio = schedule.snr.sqrt()
    if ratio[first] <= max(0.5, 2 * ratio[-1].item()):
        return
    last = schedule.timesteps - 1
    chosen = f"`timesteps` begins at {first}"
    remedy = f"begin at {last}, or give `images` to begin with"
    if not listed:
        chosen = f"leading `spacing` of {len(visited)} `steps` begins at timestep {first}"
        remedy = f"take trailing `spacing`, which begins at {last}, or more `steps`"
    raise UserError(
        f"{chosen}, where the network expects an image {ratio[first]:.3g} times as strong as the "
        f"noise, but sampling begins with noise alone; {remedy}",
        "timesteps" if listed else "spacing",
    )


def check_steps(timesteps: int, steps: int) -> None:
    """Refuse a number of steps outside 1 … T.

    Raises:
        UserError: such a number.
    """
    if not 1 <= steps <= timesteps or steps != int(steps):
        raise UserError(
            f"`steps` is {steps}; a schedule of {timesteps} timesteps takes 1 to {timesteps} steps",
            "steps",
        )
