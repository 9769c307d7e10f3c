"""Moments of a map by channel, kept by the kernel that wrote it for the norm that reads it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of each channel in each slab of pixels.

    By channel, so that a reader can combine them to groups of any size, of several maps joined.
    """

    values: Tensor
    """`[N, slabs, 3, C]`, float32: mean, its rest, and sum of squared deviations from their sum."""
    slab_pixels: int
    """Pixels of a slab; the last one may have fewer."""
