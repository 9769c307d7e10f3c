"""The Triton function that writes y.

Where a chunk of a sample fits on chip, one launch reads it once, takes its moments and writes y.
Elsewhere a launch takes the moments of each slab, and a second combines them and writes y. Without
the first where one slab covers the sample, or where moments of x and skip were kept by the kernels
that wrote these.
"""

from __future__ import annotations

from ddpm_kernels.dropout import keep_scale
from ddpm_kernels.group_norm_silu.moments import (
    of_groups,
    of_kept,
    of_slab,
    of_slabs,
    of_tile,
)
from ddpm_kernels.group_norm_silu.parts import (
    affine_of,
    at_pixel,
    centre_of,
    last_first,
    load_tile,
    place_of,
    sigmoid_of,
    spread_groups,
    tile_at,
)
from ddpm_kernels.triton_shim import tl, triton


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    tile,
    y,
    mean,
    gain,
    offset,
    key,
    pixel,
    stop,
    chunk,
    channel,
    real,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """One tile of y."""
    z = (tile.to(tl.float32) - mean[None, :]) * gain[None, :] + offset[None, :]
    if SILU:
        z = z * sigmoid_of(z, y.dtype.element_ty == tl.float32)
    if THRESHOLD:
        z = z * keep_scale(key, pixel, chunk * CHUNK, CHANNELS, CHUNK, ROWS, WIDTH, THRESHOLD)
    pointers, inside = tile_at(y, None, pixel, stop, channel, real, CHANNELS, 0, ROWS, WIDE)
    tl.store(pointers, z.to(y.dtype.element_ty), inside)


@triton.jit(
    do_not_specialize=[
        "pixels", "slabs", "slab_pixels", "scale_row", "shift_row", "before_row",
        "x_slabs", "x_slab_pixels", "skip_slabs", "skip_slab_pixels",
    ]
)  # fmt: skip
def forward_kernel(  # type: ignore[no-untyped-def]
    x,
    skip,
    moments,
    x_moments,
    skip_moments,
    weight,
    bias,
    scale,
    shift,
    before,
    dropout_key,
    y,
    statistics,
    pixels,
    slabs,
    slab_pixels,
    x_slabs,
    x_slab_pixels,
    skip_slabs,
    skip_slab_pixels,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    before_row,
    before_column,
    eps,
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    SLABS: tl.constexpr,
    ON_CHIP: tl.constexpr,
    KEPT: tl.constexpr,
    FILM: tl.constexpr,
    BEFORE: tl.constexpr,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """From moments to y: its own where x stays ON_CHIP or SLABS = 1, KEPT ones, or the slabs'."""
    sample, _, start, stop, chunk, channel, real = place_of(
        last_first(), pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    OWN: tl.constexpr = CHANNELS - SKIP
    x = at_pixel(x, sample * pixels, OWN)
    skip = at_pixel(skip, sample * pixels, SKIP)
    y = at_pixel(y, sample * pixels, CHANNELS)
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    CHUNK: tl.constexpr = CHUNK_GROUPS * PER_GROUP
    lane = tl.arange(0, GROUPS)
    group = chunk * CHUNK_GROUPS + lane
    exists = (lane < CHUNK_GROUPS) & (group < ALL_GROUPS)

    if ON_CHIP:
        tile = load_tile(x, skip, 0, pixels, channel, real, CHANNELS, SKIP, ROWS, WIDE)
        inside = (tl.arange(0, ROWS) < pixels)[:, None] & real[None, :]
        mean, rest, squares = of_tile(tile.to(tl.float32), inside, pixels.to(tl.float32))
    elif KEPT:
        own = real & (channel < OWN)
        mean, rest, squares = of_kept(
            x_moments, sample, pixels, x_slabs, x_slab_pixels, channel, own, OWN, WIDTH
        )
        if SKIP:
            others = real & (channel >= OWN)
            skip_mean, skip_rest, skip_squares = of_kept(
                skip_moments, sample, pixels, skip_slabs, skip_slab_pixels, channel - OWN, others,
                SKIP, WIDTH,
            )  # fmt: skip
            mean, rest, squares = mean + skip_mean, rest + skip_rest, squares + skip_squares
    elif SLABS == 1:
        mean, rest, squares = of_slab(
            x, skip, start, stop, channel, real, CHANNELS, SKIP, ROWS, WIDE, STAGES
        )
    if ON_CHIP or KEPT or SLABS == 1:
        mean, rest, squares = of_groups(
            mean, rest, squares, pixels.to(tl.float32),
            before, sample, channel, real, before_row, before_column,
            PER_GROUP, WIDTH, GROUPS, BEFORE,
        )  # fmt: skip
    else:
        mean, rest, squares = of_slabs(
            moments, sample, group, exists, pixels, slabs, slab_pixels, ALL_GROUPS, PER_GROUP, SLABS
        )
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
    mean, rest = centre_of(
        spread_groups(mean, PER_GROUP, WIDTH, GROUPS),
        spread_groups(rest, PER_GROUP, WIDTH, GROUPS),
        before, sample, channel, real, before_row, before_column, BEFORE,
    )  # fmt: skip
    gain = gain * spread_groups(rstd, PER_GROUP, WIDTH, GROUPS)
    offset = offset - gain * rest
    key = tl.load(dropout_key + sample) if THRESHOLD else 0
    if ON_CHIP:
        _write(
            tile, y, mean, gain, offset, key, 0, pixels, chunk, channel, real,
            CHANNELS, CHUNK, ROWS, WIDTH, WIDE, SILU, THRESHOLD,
        )  # fmt: skip
    else:
        for pixel in tl.range(start, stop, ROWS, num_stages=STAGES):
            tile = load_tile(x, skip, pixel, stop, channel, real, CHANNELS, SKIP, ROWS, WIDE)
            _write(
                tile, y, mean, gain, offset, key, pixel, stop, chunk, channel, real,
                CHANNELS, CHUNK, ROWS, WIDTH, WIDE, SILU, THRESHOLD,
            )  # fmt: skip
