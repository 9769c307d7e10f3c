"""Inpainting: known pixels are put back, at the right noise level, after every step.

    x ← mask · (sqrt(ᾱ) known + sqrt(1 − ᾱ) ε) + (1 − mask) · x

The two parts are generated independently and may not fit together. Resampling harmonises them:
after a step the state is noised forward again and the step repeated, each time with fresh noise.

Source: Lugmayr et al., "RePaint", 2022, algorithm 1 (jumps of one step).
"""

from __future__ import annotations

from collections.abc import Sequence
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


def check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Refuse what is no mask for images.

    Args:
        mask: is to be bool, `[B or 1, C or 1, H, W]`.
        shape: (B, C, H, W) of the images.

    Raises:
        UserError: a mask of another shape or dtype.
    """
    batch, channels, *pixels = shape
    fits = mask.ndim == 4 and mask.dtype == torch.bool
    fits = fits and mask.shape[0] in (1, batch) and mask.shape[1] in (1, channels)
    if not fits or list(mask.shape[2:]) != pixels:
        raise UserError(
            f"`mask` is {mask.dtype} of shape {tuple(mask.shape)}; for images of {shape} it must "
            "be bool, [N or 1, C or 1, H, W]"
        )


class KnownPixels:
    """The known pixels of a batch, which are put back after every step.

    All numbers of a step are found on the device by its row, so that a captured step serves every
    row.

    Args:
        levels: around the rows of the resampled table.
        shape: (B, C, H, W).
        mask_shape: (B or 1, C or 1, H, W).
        device: of everything.
    """

    def __init__(
        self,
        levels: Levels,
        shape: tuple[int, int, int, int],
        mask_shape: Sequence[int],
        device: torch.device,
    ) -> None:
        one = levels.before.new_ones(1)
        following = torch.cat([levels.before[1:], one])
        next_scale = torch.cat([levels.scale_before[1:], one])
        level, scale = levels.after, levels.scale_after
        self.repeated: list[bool] = (following < level).tolist()
        """Whether the state is noised back after each row, to where the next begins."""
        kept = following / level
        columns = (
            scale, level.sqrt(), (1 - level).sqrt(),
            next_scale / scale * kept.sqrt(), next_scale * (1 - kept).clamp(min=0).sqrt(),
        )  # fmt: skip
        self._table = torch.stack(columns, 1).to(device, torch.float32)
        self._known = torch.zeros(shape, device=device).contiguous(
            memory_format=torch.channels_last
        )
        self._mask = torch.zeros(tuple(mask_shape), dtype=torch.bool, device=device)

    def begin(self, known: Tensor, mask: Tensor) -> None:
        """Begin a batch.

        Args:
            known: `[B, C, H, W]` in [-1, 1]; copied.
            mask: bool `[B or 1, C or 1, H, W]`: True where pixels are known; copied.
        """
        self._known.copy_(known)
        self._mask.copy_(mask)

    def put_back(
        self, x: Tensor, row: Tensor, seed: Tensor, sample_ids: Tensor, repeated: bool
    ) -> None:
        """Overwrite the known pixels of the state after a step.

        Args:
            x: `[B, C, H, W]`, changed in place.
            row: 0-dim int64: of the step that led to it.
            seed: 0-dim int64, of all noise.
            sample_ids: int64 `[B]`.
            repeated: what `repeated` says of the row: noise the state back to where the step began.
        """
        shape = (x.shape[1], x.shape[2], x.shape[3])
        numbers = self._table.index_select(0, row.reshape(1))[0].unbind()
        scale, signal, sigma, back, fresh = numbers
        noise = gaussian_noise(seed, sample_ids, shape, row, Stream.KNOWN_NOISE)
        known = scale * (signal * self._known + sigma * noise)
        x.copy_(torch.where(self._mask, known, x))
        if repeated:
            # The forward process, from the level reached to that of the next row.
            noise = gaussian_noise(seed, sample_ids, shape, row, Stream.RESAMPLING_NOISE)
            x.mul_(back).addcmul_(noise, fresh)
