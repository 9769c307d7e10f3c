"""How a `[N, pixels, C]` tensor is divided among programs."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

WIDTHS = (64, 128, 256, 512)
"""Channels of a tile: a row of 64 in half precision is one cache line."""
FEW = 128
"""Programs that keep every multiprocessor busy, if barely; there are 100 to 150 of them."""
MAX_SLABS = 64
"""Each program of the forward's second launch reads the moments of all of its sample's slabs."""


class Plan(NamedTuple):
    """The tiles, chunks and slabs of one call."""

    rows: int
    """Pixels of a tile, a power of two."""
    width: int
    """Channels of a tile, a power of two."""
    chunk_groups: int
    """Groups in a program's chunk of channels; they need not fill the tile."""
    chunks: int
    """Chunks of a sample."""
    slab_pixels: int
    """Pixels of a slab, a multiple of `rows`; the last slab of a sample may have fewer."""
    slabs: int
    """Slabs of a sample."""
    padded_groups: int
    """Power of two that a tile's groups are padded to; they fill the tile exactly if they can."""


@lru_cache(maxsize=1024)
def plan(
    batch: int, channels: int, pixels: int, groups: int, tile: int, programs: int = 512
) -> Plan:
    """Divide `batch` samples of `pixels` pixels and `channels` channels.

    Args:
        batch: N.
        channels: C.
        pixels: H · W.
        groups: divides C.
        tile: elements of a tile.
        programs: to cut slabs for, as far as that pays.
    """
    per_group = channels // groups
    # Chunks start at multiples of 8 channels where they can, for 16-byte accesses.
    step = 8 // gcd(8, per_group)
    candidates = []
    for width in (*WIDTHS, power_of_two(per_group)):
        chunk_groups = min(width // per_group, groups)
        if chunk_groups == 0:
            continue
        if chunk_groups < groups and chunk_groups >= step:
            chunk_groups -= chunk_groups % step
        width = power_of_two(chunk_groups * per_group)
        chunks = -(-groups // chunk_groups)
        aligned = chunks == 1 or chunk_groups * per_group % 8 == 0
        # Least idle lanes; among equals 128 channels or the nearest to it.
        candidates.append((not aligned, chunks * width, abs(width - 128), width, chunk_groups))
    *_, width, chunk_groups = min(candidates)
    chunks = -(-groups // chunk_groups)
    # Of equal size, as far as alignment allows: the largest decides how long all take.
    even = -(-groups // chunks)
    if chunk_groups >= step:
        even = -(-even // step) * step
    chunk_groups = min(chunk_groups, even)
    chunks = -(-groups // chunk_groups)

    rows = min(max(1, tile // width), power_of_two(pixels))
    tiles = -(-pixels // rows)
    # Two tiles are worth a program's fixed work, where multiprocessors would be idle without it.
    # Otherwise a slab must outweigh another launch, which reads the sample again.
    least = 2 if batch * chunks < FEW else 8
    slabs = max(1, min(MAX_SLABS, programs // (batch * chunks), tiles // least))
    slab_pixels = -(-tiles // slabs) * rows
    padded_groups = power_of_two(max(chunk_groups, width // per_group))
    slabs = -(-pixels // slab_pixels)
    return Plan(rows, width, chunk_groups, chunks, slab_pixels, slabs, padded_groups)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
