"""Moments, mean, its rest and sum of squared deviations, of a tile, a slab, or what was kept.

The mean is an unevaluated sum of two, and nothing is summed that has a large part which cancels:
see `reference`.
"""

from __future__ import annotations

from ddpm_kernels.group_norm_silu.parts import (
    at_pixel,
    load_rows,
    load_tile,
    place_of,
    spread_groups,
    sum_groups,
    two_sum,
)
from ddpm_kernels.triton_shim import tl, triton


@triton.jit
def of_tile(tile, inside, count):  # type: ignore[no-untyped-def]
    """Moments of a tile's channels: mean, its rest, and sum of squared deviations from both."""
    anchor = tl.sum(tile, 0) / count
    deviation = tl.where(inside, tile - anchor[None, :], 0.0)
    sums = tl.sum(deviation, 0)
    rest = sums / count
    return anchor, rest, tl.sum(deviation * deviation, 0) - sums * rest


@triton.jit
def of_slab(  # type: ignore[no-untyped-def]
    x,
    skip,
    start,
    stop,
    channel,
    real,
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Moments of a slab's channels.

    Everything is summed relative to the channel's mean over the first tile: no sum has a large part
    that cancels.
    """
    inside = ((start + tl.arange(0, ROWS)) < stop)[:, None] & real[None, :]
    tile = load_tile(x, skip, start, stop, channel, real, CHANNELS, SKIP, ROWS, WIDE)
    wide = tile.to(tl.float32)
    anchor = tl.sum(wide, 0) / tl.minimum(stop - start, ROWS).to(tl.float32)
    deviation = tl.where(inside, wide - anchor[None, :], 0.0)
    first = deviation
    second = deviation * deviation
    for pixel in tl.range(start + ROWS, stop, ROWS, num_stages=STAGES):
        inside = ((pixel + tl.arange(0, ROWS)) < stop)[:, None] & real[None, :]
        tile = load_tile(x, skip, pixel, stop, channel, real, CHANNELS, SKIP, ROWS, WIDE)
        deviation = tl.where(inside, tile.to(tl.float32) - anchor[None, :], 0.0)
        first += deviation
        second += deviation * deviation
    sums = tl.sum(first, 0)
    rest = sums / (stop - start).to(tl.float32)
    return anchor, rest, tl.sum(second, 0) - sums * rest


@triton.jit
def of_kept(  # type: ignore[no-untyped-def]
    moments,
    sample,
    pixels,
    slabs,
    slab_pixels,
    column,
    real,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Moments of a sample's channels, from kept `Moments`, whose slabs are not this launch's."""
    STEP: tl.constexpr = 8
    moments += sample * slabs * (3 * CHANNELS) + column
    anchor = tl.load(moments, real, 0.0)
    first = tl.zeros((WIDTH,), tl.float32)
    second = tl.zeros((WIDTH,), tl.float32)
    for slab in range(0, slabs, STEP):
        index = slab + tl.arange(0, STEP)
        present = (index < slabs)[:, None] & real[None, :]
        count = tl.minimum(pixels - index * slab_pixels, slab_pixels).to(tl.float32)[:, None]
        partial = moments[None, :] + index[:, None] * (3 * CHANNELS)
        apart = tl.load(partial, present, 0.0) - anchor[None, :]
        apart = tl.where(present, apart + tl.load(partial + CHANNELS, present, 0.0), 0.0)
        first += tl.sum(count * apart, 0)
        squares = tl.load(partial + 2 * CHANNELS, present, 0.0)
        second += tl.sum(squares + count * apart * apart, 0)
    rest = first / pixels.to(tl.float32)
    return anchor, rest, second - first * rest


@triton.jit
def of_groups(  # type: ignore[no-untyped-def]
    mean,
    rest,
    squares,
    count,
    before,
    sample,
    channel,
    real,
    before_row,
    before_column,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """From moments of channels of x ⧺ skip, zero where there is none, to those of groups of u."""
    if BEFORE:
        added = load_rows(before, sample, channel, real, before_row, before_column)
        mean, lost = two_sum(mean, added)
        rest = rest + lost
    group_mean = sum_groups(mean, PER_GROUP, WIDTH, GROUPS) / PER_GROUP
    apart = (mean - spread_groups(group_mean, PER_GROUP, WIDTH, GROUPS)) + rest
    apart = tl.where(real, apart, 0.0)
    group_rest = sum_groups(apart, PER_GROUP, WIDTH, GROUPS) / PER_GROUP
    apart = apart - spread_groups(group_rest, PER_GROUP, WIDTH, GROUPS)
    apart = tl.where(real, apart, 0.0)
    squares = sum_groups(squares + count * apart * apart, PER_GROUP, WIDTH, GROUPS)
    return group_mean, group_rest, squares


@triton.jit(do_not_specialize=["pixels", "slabs", "slab_pixels", "before_row"])
def moments_kernel(  # type: ignore[no-untyped-def]
    x,
    skip,
    before,
    moments,
    pixels,
    slabs,
    slab_pixels,
    before_row,
    before_column,
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Moments of the groups of every slab: float32 `[N, slabs, 3, groups]`."""
    sample, slab, start, stop, chunk, channel, real = place_of(
        tl.program_id(0), pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    x = at_pixel(x, sample * pixels, CHANNELS - SKIP)
    skip = at_pixel(skip, sample * pixels, SKIP)
    mean, rest, squares = of_slab(
        x, skip, start, stop, channel, real, CHANNELS, SKIP, ROWS, WIDE, STAGES
    )
    mean, rest, squares = of_groups(
        mean, rest, squares, (stop - start).to(tl.float32),
        before, sample, channel, real, before_row, before_column,
        PER_GROUP, WIDTH, GROUPS, BEFORE,
    )  # fmt: skip
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    lane = tl.arange(0, GROUPS)
    group = chunk * CHUNK_GROUPS + lane
    exists = (lane < CHUNK_GROUPS) & (group < ALL_GROUPS)
    out = moments + slab * (3 * ALL_GROUPS) + group
    tl.store(out, mean, exists)
    tl.store(out + ALL_GROUPS, rest, exists)
    tl.store(out + 2 * ALL_GROUPS, squares, exists)


@triton.jit
def of_slabs(  # type: ignore[no-untyped-def]
    moments,
    sample,
    group,
    exists,
    pixels,
    slabs,
    slab_pixels,
    ALL_GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SLABS: tl.constexpr,
):
    """Moments of a sample's groups from those that `moments_kernel` took of its slabs."""
    partial = moments + sample * slabs * (3 * ALL_GROUPS) + group
    mean = tl.load(partial, exists, 0.0)
    index = tl.arange(0, SLABS)
    count = tl.minimum(pixels - index * slab_pixels, slab_pixels).to(tl.float32)[:, None]
    present = (index < slabs)[:, None] & exists[None, :]
    partial = partial[None, :] + index[:, None] * (3 * ALL_GROUPS)
    apart = tl.load(partial, present, 0.0) - mean[None, :]
    apart = apart + tl.load(partial + ALL_GROUPS, present, 0.0)
    count = tl.where(present, count, 0.0)
    rest = tl.sum(count * apart, 0) / pixels.to(tl.float32)
    apart = apart - rest[None, :]
    squares = tl.load(partial + 2 * ALL_GROUPS, present, 0.0)
    return mean, rest, tl.sum(squares + PER_GROUP * count * apart * apart, 0)
