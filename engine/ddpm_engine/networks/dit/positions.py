"""Where a patch is: sines and cosines that are added, and angles that queries and keys turn by.

Coordinates run over the same range whatever the size of the image: on a grid of other height or
width than the network was made for they are interpolated. Nothing here is kept between calls, so
that no conversion of a network rounds it.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023 (sines and cosines); Su
et al., "RoFormer", 2021, in two dimensions as Fang et al., "EVA-02", 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.sizes import Size, height_and_width

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles, float32 `[L, 1, D / 2]`."""

_LONGEST = 10_000.0
"""Ratio of the longest wavelength to the shortest."""


def coordinates(height: int, width: int, base: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, in units of the grid that the network was made for.

    Args:
        height: patches of a column.
        width: patches of a row.
        base: patches of a side of the grid that the network was made for, or of a column and a row.
        device: where the result is wanted.

    Returns:
        Rows and columns, float32 `[height * width]` each, row after row.
    """
    rows, columns = (
        torch.arange(count, device=device, dtype=torch.float32) / (count / side)
        for count, side in zip((height, width), height_and_width(base), strict=True)
    )
    return rows.repeat_interleave(width), columns.repeat(height)


def sinusoids(height: int, width: int, base: Size, channels: int, device: torch.device) -> Tensor:
    """Embed positions as sines and cosines, of columns in the first half, of rows in the second.

    Args:
        height: see `coordinates`.
        width: see `coordinates`.
        base: see `coordinates`.
        channels: a multiple of 4.
        device: where the result is wanted.

    Returns:
        float32 `[height * width, channels]`.
    """
    quarter = channels // 4
    exponents = torch.arange(quarter, device=device, dtype=torch.float64) / quarter
    frequencies = 1.0 / _LONGEST**exponents
    rows, columns = coordinates(height, width, base, device)
    parts = []
    for place in (columns, rows):
        angles = torch.outer(place.double(), frequencies)
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()


def rotation(height: int, width: int, base: Size, head_dim: int, device: torch.device) -> Rotation:
    """The rotation of each patch's queries and keys.

    The first half of a head's pairs of channels turns with the row, the second with the column.

    Args:
        height: see `coordinates`.
        width: see `coordinates`.
        base: see `coordinates`.
        head_dim: D, a multiple of 4.
        device: where the result is wanted.

    Returns:
        Cosines and sines, float32 `[height * width, 1, D / 2]`.
    """
    quarter = head_dim // 4
    exponents = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    frequencies = 1.0 / _LONGEST**exponents
    angles = torch.cat(
        [torch.outer(place, frequencies) for place in coordinates(height, width, base, device)],
        dim=1,
    )[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair of neighbouring channels.

    Args:
        x: queries or keys, `[B, L, heads, D]`.
        by: from `rotation`.

    Returns:
        The same shape and dtype; the arithmetic is float32, or wider if `x` is.
    """
    cosines, sines = by
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
