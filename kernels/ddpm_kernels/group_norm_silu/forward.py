"""The Triton functions of the forward pass.

One launch takes the moments of each slab, a second combines them and writes y. Where one slab
covers the sample, a single launch does both.
"""

from __future__ import annotations

from ddpm_kernels.group_norm_silu.parts import (
    affine_of,
    last_first,
    place_of,
    spread_groups,
    sum_groups,
    tile_at,
)
from ddpm_kernels.triton_shim import tl, triton


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    x,
    start,
    stop,
    channel,
    real,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Mean, as an unevaluated sum of two, and sum of squared deviations of each group in a slab.

    Everything is summed relative to the channel's mean over the first tile, and those differences
    relative to the group's: no sum has a large part that cancels.
    """
    offsets, inside = tile_at(start, stop, channel, real, CHANNELS, ROWS, WIDE)
    tile = tl.load(x + offsets, inside, 0.0).to(tl.float32)
    anchor = tl.sum(tile, 0) / tl.minimum(stop - start, ROWS).to(tl.float32)
    deviation = tl.where(inside, tile - anchor[None, :], 0.0)
    first = deviation
    second = deviation * deviation
    for pixel in tl.range(start + ROWS, stop, ROWS, num_stages=STAGES):
        offsets, inside = tile_at(pixel, stop, channel, real, CHANNELS, ROWS, WIDE)
        tile = tl.load(x + offsets, inside, 0.0).to(tl.float32)
        deviation = tl.where(inside, tile - anchor[None, :], 0.0)
        first += deviation
        second += deviation * deviation
    count = (stop - start).to(tl.float32)
    sums = tl.sum(first, 0)
    rest = sums / count
    squares = tl.sum(second, 0) - sums * rest

    mean = sum_groups(anchor, PER_GROUP, WIDTH, GROUPS) / PER_GROUP
    apart = (anchor - spread_groups(mean, PER_GROUP, WIDTH, GROUPS)) + rest
    apart = tl.where(real, apart, 0.0)
    mean_rest = sum_groups(apart, PER_GROUP, WIDTH, GROUPS) / PER_GROUP
    apart = apart - spread_groups(mean_rest, PER_GROUP, WIDTH, GROUPS)
    apart = tl.where(real, apart, 0.0)
    squares = sum_groups(squares + count * apart * apart, PER_GROUP, WIDTH, GROUPS)
    return mean, mean_rest, squares


@triton.jit(do_not_specialize=["pixels", "slabs", "slab_pixels"])
def moments_kernel(  # type: ignore[no-untyped-def]
    x,
    moments,
    pixels,
    slabs,
    slab_pixels,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`_moments` of every slab: float32 `[N, slabs, 3, groups]`."""
    sample, slab, start, stop, chunk, channel, real = place_of(
        tl.program_id(0), pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    mean, rest, squares = _moments(
        x + sample * pixels * CHANNELS,
        start, stop, channel, real, CHANNELS, PER_GROUP, ROWS, WIDTH, GROUPS, WIDE, STAGES,
    )  # fmt: skip
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    lane = tl.arange(0, GROUPS)
    group = chunk * CHUNK_GROUPS + lane
    exists = (lane < CHUNK_GROUPS) & (group < ALL_GROUPS)
    out = moments + slab * (3 * ALL_GROUPS) + group
    tl.store(out, mean, exists)
    tl.store(out + ALL_GROUPS, rest, exists)
    tl.store(out + 2 * ALL_GROUPS, squares, exists)


@triton.jit(do_not_specialize=["pixels", "slabs", "slab_pixels", "scale_row", "shift_row"])
def forward_kernel(  # type: ignore[no-untyped-def]
    x,
    moments,
    weight,
    bias,
    scale,
    shift,
    y,
    statistics,
    pixels,
    slabs,
    slab_pixels,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    eps,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    SLABS: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
):
    """From the slabs' moments to y. With SLABS = 1 it takes the moments itself."""
    sample, _, start, stop, chunk, channel, real = place_of(
        last_first(), pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    x += sample * pixels * CHANNELS
    y += sample * pixels * CHANNELS
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    lane = tl.arange(0, GROUPS)
    group = chunk * CHUNK_GROUPS + lane
    exists = (lane < CHUNK_GROUPS) & (group < ALL_GROUPS)

    if SLABS == 1:
        mean, rest, squares = _moments(
            x, start, stop, channel, real, CHANNELS, PER_GROUP, ROWS, WIDTH, GROUPS, WIDE, STAGES
        )
    else:
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
        squares = tl.sum(squares + PER_GROUP * count * apart * apart, 0)
    variance = tl.maximum(squares / (pixels.to(tl.float32) * PER_GROUP), 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32)))
    # So far the mean is that of the first pixels, and the rest may be several deviations.
    anchor = mean
    mean = anchor + rest
    rest = (anchor - mean) + rest
    if start == 0:
        out = statistics + sample * (3 * ALL_GROUPS) + group
        tl.store(out, mean, exists)
        tl.store(out + ALL_GROUPS, rest, exists)
        tl.store(out + 2 * ALL_GROUPS, rstd, exists)

    gain, offset = affine_of(
        weight, bias, scale, shift, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, FILM,
    )  # fmt: skip
    gain = gain * spread_groups(rstd, PER_GROUP, WIDTH, GROUPS)
    offset = offset - gain * spread_groups(rest, PER_GROUP, WIDTH, GROUPS)
    mean_c = spread_groups(mean, PER_GROUP, WIDTH, GROUPS)
    for pixel in tl.range(start, stop, ROWS, num_stages=STAGES):
        offsets, inside = tile_at(pixel, stop, channel, real, CHANNELS, ROWS, WIDE)
        tile = tl.load(x + offsets, inside, 0.0).to(tl.float32)
        z = (tile - mean_c[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + offsets, z.to(y.dtype.element_ty), inside)
