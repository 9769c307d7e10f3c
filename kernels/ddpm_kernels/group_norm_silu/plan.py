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
ON_CHIP = 2**16
"""Bytes of its tensors that a program can keep in registers: a quarter of a multiprocessor's on
NVIDIA, where float32 copies come and go."""
NEAR = 2**14
"""Bytes to keep if rows are not too narrow for it: one program loads while others compute."""
NARROWEST = 16
"""Channels of the narrowest rows: 32 bytes in half precision, a sector."""


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
    on_chip: bool = False
    """Whether a tile holds a chunk's pixels, all of them, and is to be kept."""


def fits_on_chip(pixels: int) -> bool:
    """Whether a norm in half precision reads samples of so many pixels once.

    It then has no use for their `Moments`; if its groups have no more than 32 channels.
    """
    return power_of_two(pixels) * 32 * 2 <= ON_CHIP


@lru_cache(maxsize=1024)
def plan(
    batch: int,
    channels: int,
    pixels: int,
    groups: int,
    tile: int,
    programs: int = 512,
    pixel_bytes: int = 0,
) -> Plan:
    """Divide `batch` samples of `pixels` pixels and `channels` channels.

    Args:
        batch: N.
        channels: C.
        pixels: H · W.
        groups: divides C.
        tile: elements of a tile.
        programs: to cut slabs for, as far as that pays.
        pixel_bytes: of a pixel's channel, in all tensors that a program would keep on chip if they
            fit; 0: none.
    """
    per_group = channels // groups
    rows = power_of_two(pixels)
    if pixel_bytes:
        # Elements that are read one by one take registers for their addresses, too.
        most = ON_CHIP // (pixel_bytes * rows) // (2 if channels % 8 else 1)
        least = max(min(NARROWEST, power_of_two(channels)), power_of_two(per_group))
        widths = [width for width in (least, 2 * least, 4 * least) if width <= most]
    if pixel_bytes and widths:
        near = min(WIDTHS[0], NEAR // (pixel_bytes * rows))
        width, chunk_groups, chunks = _chunks(channels, groups, widths, near, full=False)
        padded_groups = power_of_two(max(chunk_groups, width // per_group))
        # Twice in long words is no slower than once in words of less than four channels.
        if chunks == 1 or chunk_groups * per_group % 4 == 0 or channels % 4 != 0:
            return Plan(rows, width, chunk_groups, chunks, rows, 1, padded_groups, on_chip=True)

    widths = [*WIDTHS, power_of_two(per_group)]
    width, chunk_groups, chunks = _chunks(channels, groups, widths, near=128, full=True)
    rows = min(max(1, tile // width), rows)
    tiles = -(-pixels // rows)
    # Two tiles are worth a program's fixed work, where multiprocessors would be idle without it.
    # Otherwise a slab must outweigh another launch, which reads the sample again.
    least = 2 if batch * chunks < FEW else 8
    slabs = max(1, min(MAX_SLABS, programs // (batch * chunks), tiles // least))
    slab_pixels = -(-tiles // slabs) * rows
    padded_groups = power_of_two(max(chunk_groups, width // per_group))
    slabs = -(-pixels // slab_pixels)
    return Plan(rows, width, chunk_groups, chunks, slab_pixels, slabs, padded_groups)


def _chunks(
    channels: int, groups: int, widths: list[int], near: int, full: bool
) -> tuple[int, int, int]:
    """Width of a tile, one of `widths` or less, groups of a chunk, and chunks of a sample.

    Where it is to be `full`, few idle lanes count for more than a width `near` what is wanted.
    """
    per_group = channels // groups
    # Chunks start at multiples of 8 channels where they can, for 16-byte accesses.
    step = 8 // gcd(8, per_group)
    candidates = []
    for width in widths:
        chunk_groups = min(width // per_group, groups)
        if chunk_groups == 0:
            continue
        if chunk_groups < groups and chunk_groups >= step:
            chunk_groups -= chunk_groups % step
        width = power_of_two(chunk_groups * per_group)
        chunks = -(-groups // chunk_groups)
        aligned = chunks == 1 or chunk_groups * per_group % 8 == 0
        lanes, far = chunks * width, abs(width - near)
        wanted = (lanes, far) if full else (far, lanes)
        candidates.append((not aligned, wanted, width, chunk_groups))
    *_, width, chunk_groups = min(candidates)
    chunks = -(-groups // chunk_groups)
    # Of equal size, as far as alignment allows: the largest decides how long all take.
    even = -(-groups // chunks)
    if chunk_groups >= step:
        even = -(-even // step) * step
    chunk_groups = min(chunk_groups, even)
    return width, chunk_groups, -(-groups // chunk_groups)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
