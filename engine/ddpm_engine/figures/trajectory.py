"""An image dissolving into noise, and a picture emerging from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.images.grid import to_uint8
from ddpm_engine.plots.image_rows import moving_strip, strip
from ddpm_engine.samplers.sampler import TrajectoryStep, sampling_steps
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import q_sample

COLUMNS = 11


def shown_timesteps(timesteps: int) -> list[int]:
    """Timesteps at which to look at a chain of T, closer together at first.

    Most of an image is gone by the middle of the chain.
    """
    fractions = np.linspace(0, 1, COLUMNS - 1) ** 2
    return sorted(set((fractions * (timesteps - 1)).round().astype(int).tolist()))


def forward_figure(
    schedule: NoiseSchedule, images: np.ndarray, timesteps: Sequence[int], seed: int, path: Path
) -> None:
    """Show q(x_t | x_0) of real images, each always with the same noise (equation 4).

    Args:
        schedule: the noise schedule.
        images: uint8 `[N, H, W, C]`, a row each.
        timesteps: from 0, the columns.
        seed: of the noise.
        path: of the PNG.

    Raises:
        UserError: a timestep that the schedule does not have.
    """
    for t in timesteps:
        if not 0 <= t < schedule.timesteps:
            raise UserError(
                f"timestep {t + 1} is to be shown, but the schedule has 1 to {schedule.timesteps}"
            )
    columns = torch.tensor(timesteps)
    rows = []
    for number, image in enumerate(images):
        noisy = q_sample(
            torch.from_numpy(image).permute(2, 0, 1).expand(len(columns), -1, -1, -1),
            columns,
            schedule.sqrt_alpha_bar.float(),
            schedule.sqrt_one_minus_alpha_bar.float(),
            seed,
            torch.full_like(columns, number),
        )
        rows.append(("$x_t$", np.concatenate([image[None], to_uint8(noisy)])))
    titles = ["$x_0$", *(f"t={t + 1}" for t in timesteps)]
    strip(rows, titles, "forward: images dissolve into noise", path)


def watch(
    trained: LoadedModel,
    table: CoefficientTable,
    seed: int,
    sample_ids: Tensor,
    labels: Tensor | None,
    moments: int,
) -> list[TrajectoryStep]:
    """Run the reverse process and keep what it looked like at a few moments, even in time.

    Args:
        trained: the network.
        table: the sampler.
        seed: of all noise.
        sample_ids: int64 `[B]`.
        labels: int64 `[B]`, or None.
        moments: how many to keep, the first and the last step among them.
    """
    last = table.evaluations - 1
    kept = set(np.linspace(0, last, min(moments, last + 1)).round().astype(int).tolist())
    return [
        TrajectoryStep(step.index, step.timestep, step.x.clone(), step.x0.clone())
        for step in sampling_steps(
            trained.model, table, trained.model.sample_shape, seed=seed, sample_ids=sample_ids,
            labels=labels, clip=trained.clip,
        )
        if step.index in kept
    ]  # fmt: skip


def reverse_figure(steps: Sequence[TrajectoryStep], path: Path) -> None:
    """Show one picture emerge: the state, and the estimate of x_0 that each step was made from.

    Args:
        steps: as `watch` keeps them; the first picture of the batch is shown.
        path: of the PNG.
    """
    states, estimates = (
        np.concatenate([to_uint8(getattr(step, name)[:1]) for step in steps])
        for name in ("x", "x0")
    )
    strip(
        [("$x_{t-1}$", states), (r"$\hat{x}_0$", estimates)],
        [f"t={step.timestep + 1:.0f}" for step in steps],
        "reverse: a picture emerges; below, the network's guess of it at each step",
        path,
    )


def reverse_animation(steps: Sequence[TrajectoryStep], path: Path) -> None:
    """Show pictures emerge as a GIF, above the estimates of x_0.

    Args:
        steps: as `watch` keeps them; all pictures of the batch are shown.
        path: of the GIF.
    """
    moving_strip(
        [[("$x_{t-1}$", to_uint8(step.x)), (r"$\hat{x}_0$", to_uint8(step.x0))] for step in steps],
        [f"t = {step.timestep + 1:.0f}" for step in steps],
        path,
    )
