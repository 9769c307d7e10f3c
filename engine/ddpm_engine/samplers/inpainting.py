"""Inpainting: known pixels are put back, at the right noise level, after every step.

    x ← mask · (sqrt(ᾱ) known + sqrt(1 − ᾱ) ε) + (1 − mask) · x

The two parts are drawn apart and so need not fit; resampling lets them meet: after a step the state
is noised forward again and the step repeated, with fresh noise each time.

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
class Inpainting:
    """What is known of each picture.

    Raises:
        UserError: shapes that do not go together, or fewer than one draw a step.
    """

    known: Tensor
    """`[B, C, H, W]` in [-1, 1]: the pictures, one for each sample id."""
    mask: Tensor
    """bool `[B or 1, C or 1, H, W]`: True where the picture is known."""
    draws: int = 1
    """How often each step is taken; 10 in the paper, 1 for no resampling."""

    def __post_init__(self) -> None:
        batch, channels, *pixels = self.known.shape
        fits = self.mask.ndim == 4 and self.mask.dtype == torch.bool
        fits = fits and self.mask.shape[0] in (1, batch) and self.mask.shape[1] in (1, channels)
        if not fits or list(self.mask.shape[2:]) != pixels:
            raise UserError(
                f"mask is {self.mask.dtype} of shape {tuple(self.mask.shape)}; for pictures of "
                f"{tuple(self.known.shape)} it must be bool, [B or 1, C or 1, H, W]"
            )
        if self.draws < 1:
            raise UserError(f"draws is {self.draws}; every step is taken at least once")

    def part(self, start: int, stop: int) -> Inpainting:
        """That of some of the pictures."""
        mask = self.mask if len(self.mask) == 1 else self.mask[start:stop]
        return Inpainting(self.known[start:stop], mask, self.draws)


@dataclass(frozen=True, eq=False)
class Levels:
    """ᾱ, and the scale of the state, around each row of a table: float64 `[S]` each."""

    before: Tensor
    """ᾱ of the state that the row begins with."""
    after: Tensor
    """ᾱ of the state that it leads to; 1 at the end."""
    scale_before: Tensor
    """How many times x the state is that the row begins with."""
    scale_after: Tensor
    """How many times x the state is that it leads to."""


def levels_of(schedule: NoiseSchedule, table: CoefficientTable) -> Levels:
    """The levels around each row: a row leads to what the next one begins with."""
    alpha_bar = noise_levels(schedule, table.timesteps)[0].square()
    scale = table.state_scale
    return Levels(alpha_bar[:-1], alpha_bar[1:], scale[:-1], scale[1:])


def resampled(
    table: CoefficientTable, levels: Levels, draws: int
) -> tuple[CoefficientTable, Levels]:
    """Repeat each row but the last, which adds no noise. Each repetition is a row of its own.

    Raises:
        UserError: a sampler that looks back on earlier steps, which repetitions would spoil.
    """
    if draws == 1:
        return table, levels
    if table.history:
        raise UserError(
            f"inpainting is to take each step {draws} times, and this sampler looks back on "
            "earlier steps; use ddpm or ddim, or take each step once"
        )
    repeats = torch.full((len(table.rows),), draws)
    repeats[-1] = 1

    def repeated(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(repeats, 0)

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
    """The part of a batch that is known, and what happens between two steps.

    Args:
        inpainting: what is known of this batch.
        levels: of the resampled table.
        seed: of all noise.
        sample_ids: int64 `[B]`.
    """

    def __init__(
        self, inpainting: Inpainting, levels: Levels, seed: int, sample_ids: Tensor
    ) -> None:
        device = sample_ids.device
        self._known = inpainting.known.to(device, torch.float32)
        self._mask = inpainting.mask.to(device)
        self._before = [*levels.before.tolist(), 1.0]
        self._after = levels.after.tolist()
        self._scale_before = [*levels.scale_before.tolist(), 1.0]
        self._scale_after = levels.scale_after.tolist()
        self._seed = seed
        self._ids = sample_ids

    def put_back(self, x: Tensor, step: int) -> None:
        """Overwrite the known pixels of x, `[B, C, H, W]`, after a step.

        If the step is to be repeated, x is noised back to where it began.
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
