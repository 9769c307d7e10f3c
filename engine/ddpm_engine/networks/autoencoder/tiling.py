"""Large images in overlapping tiles, so that memory does not grow with the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    read: int = 1,
    written: int = 1,
) -> Tensor:
    """Apply a function to tiles, and blend what they have in common.

    Each tile weighs nothing more at its inner edges, and linearly more up to `overlap` from them.

    Args:
        function: maps `[B, C, h · read, w · read]` to `[B, C', h · written, w · written]`.
        x: `[B, C, H · read, W · read]`.
        tile: side of a tile, at most, in units of h.
        overlap: of neighbouring tiles, at least, in units of h, less than `tile`.
        read: elements of the input along a side for one unit.
        written: elements of the output along a side for one unit.

    Returns:
        `[B, C', H · written, W · written]`.
    """
    height, width = x.shape[2] // read, x.shape[3] // read
    rows, columns = min(tile, height), min(tile, width)
    total = weights = x.new_zeros(0)
    for top in _starts(height, rows, overlap):
        for left in _starts(width, columns, overlap):
            piece = x[..., top * read : (top + rows) * read, left * read : (left + columns) * read]
            result = function(piece)
            weight = _ramp(top, rows, height, overlap, written)[:, None] * _ramp(
                left, columns, width, overlap, written
            )
            weight = weight.to(result.device, result.dtype)
            if not weights.numel():
                total = result.new_zeros(*result.shape[:2], height * written, width * written)
                weights = result.new_zeros(height * written, width * written)
            down = slice(top * written, (top + rows) * written)
            across = slice(left * written, (left + columns) * written)
            total[..., down, across] += weight * result
            weights[down, across] += weight
    return total / weights


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """First positions of tiles that cover a length, all of one size, evenly spread."""
    if length <= tile:
        return [0]
    steps = -(-(length - tile) // (tile - overlap))
    return [round(k * (length - tile) / steps) for k in range(steps + 1)]


def _ramp(start: int, tile: int, length: int, overlap: int, written: int) -> Tensor:
    """Weights along a side of a tile, 1 but for its inner edges, `[tile · written]`."""
    place = torch.arange(tile * written) + 0.5
    ramp = torch.ones(tile * written)
    if start > 0:
        ramp = torch.minimum(ramp, place / (overlap * written))
    if start + tile < length:
        ramp = torch.minimum(ramp, place.flip(0) / (overlap * written))
    return ramp
