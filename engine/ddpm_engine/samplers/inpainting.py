"""Inpainting: known pixels are put back, at the right noise level, after every step.

    x ← mask · (sqrt(ᾱ) known + sqrt(1 − ᾱ) ε) + (1 − mask) · x

The two parts are generated independently and may not fit together. Resampling harmonises them:
after a step the state is noised forward again and the step repeated, each time with fresh noise.

Source: Lugmayr et al., "RePaint", 2022, algorithm 1 (jumps of one step).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import Stream, gaussian_noise


@dataclass(frozen=True, eq=False)
class Levels:
    """ᾱ, and the scale of the state, around each row of a table: float64 `[S]` each."""

    before: Tensor
    """ᾱ of the state before the row."""
    after: Tensor
    """ᾱ of the state after the row; 1 at the end."""
    scale_before: Tensor
    """Ratio between the loop's state and x_t before the row."""
    scale_after: Tensor
    """Ratio between the loop's state and x_t after the row."""


def levels_of(schedule: NoiseSchedule, table: CoefficientTable) -> Levels:
    """Return the levels around each row, where the next row begins at the level it leads to."""
    alpha_bar = noise_levels(schedule, table.timesteps)[0].square()
    scale = table.state_scale
    return Levels(alpha_bar[:-1], alpha_bar[1:], scale[:-1], scale[1:])


def resampled(
    table: CoefficientTable, levels: Levels, repeats: int
) -> tuple[CoefficientTable, Levels]:
    """Repeat each row but the last, which adds no noise.

    Raises:
        UserError: a sampler that uses earlier estimates, which repetitions would spoil.
    """
    if repeats == 1:
        return table, levels
    if table.history:
        raise UserError(
            f"`repeats` is {repeats}, and this sampler looks back on earlier steps; use ddpm or "
            "ddim, or take each step once"
        )
    counts = torch.full((len(table.rows),), repeats)
    counts[-1] = 1

    def repeated(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(counts, 0)

    return (
        CoefficientTable(
            repeated(table.timesteps),
            repeated(table.rows),
            torch.cat([repeated(table.state_scale[:-1]), table.state_scale[-1:]]),
            repeated(table.noise_input),
        ),
        Levels(
            repeated(levels.before),
            repeated(levels.after),
            repeated(levels.scale_before),
            repeated(levels.scale_after),
        ),
    )


class KnownPixels:
    """The known pixels of a batch, which are put back after every step.

    Args:
        known: `[B, C, H, W]` in [-1, 1].
        mask: bool `[B or 1, C or 1, H, W]`: True where pixels are known.
        levels: around the rows of the resampled table.
        seed: of all noise.
        sample_ids: int64 `[B]`.

    Raises:
        UserError: a mask of another shape or dtype.
    """

    def __init__(
        self, known: Tensor, mask: Tensor, levels: Levels, seed: int, sample_ids: Tensor
    ) -> None:
        batch, channels, *pixels = known.shape
        fits = mask.ndim == 4 and mask.dtype == torch.bool
        fits = fits and mask.shape[0] in (1, batch) and mask.shape[1] in (1, channels)
        if not fits or list(mask.shape[2:]) != pixels:
            raise UserError(
                f"`mask` is {mask.dtype} of shape {tuple(mask.shape)}; for images of "
                f"{tuple(known.shape)} it must be bool, [N or 1, C or 1, H, W]"
            )
        device = sample_ids.device
        self._known = known.to(device, torch.float32)
        self._mask = mask.to(device)
        self._before = [*levels.before.tolist(), 1.0]
        self._after = levels.after.tolist()
        self._scale_before = [*levels.scale_before.tolist(), 1.0]
        self._scale_after = levels.scale_after.tolist()
        self._seed = seed
        self._ids = sample_ids

    def put_back(self, x: Tensor, step: int) -> None:
        """Overwrite the known pixels of the state after a step.

        If the step is to be repeated, the state is then noised back to where the step began.

        Args:
            x: `[B, C, H, W]`, changed in place.
            step: index of the row that led to it.
        """
        shape = (x.shape[1], x.shape[2], x.shape[3])
        level, following = self._after[step], self._before[step + 1]
        noise = gaussian_noise(self._seed, self._ids, shape, step, Stream.KNOWN_NOISE)
        scale = self._scale_after[step]
        known = scale * (level**0.5 * self._known + (1 - level) ** 0.5 * noise)
        x.copy_(torch.where(self._mask, known, x))
        if following < level:
            # The forward process, from the level reached to that of the next row.
            kept = following / level
            noise = gaussian_noise(self._seed, self._ids, shape, step, Stream.RESAMPLING_NOISE)
            next_scale = self._scale_before[step + 1]
            x.mul_(next_scale / scale * kept**0.5).add_(noise, alpha=next_scale * (1 - kept) ** 0.5)
