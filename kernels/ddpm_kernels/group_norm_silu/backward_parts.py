"""What the Triton functions of the backward pass share.

See `reference` for the mathematics. What the launches pass on lies in one workspace, float32 rows
of `[2, C]`: first one of each sample, its terms of dγ and dβ; then, where a sample does not stay on
chip, one of each with rstd c₁ and rstd c₂ `[2, groups]`, and one of each slab. With COLUMNS, the
sums over each slab's pixels of dx ⧺ dskip go to `sums`, `[N · slabs, C]`.
"""

from __future__ import annotations

from ddpm_kernels.dropout import keep_scale
from ddpm_kernels.group_norm_silu.parts import (
    affine_of,
    centre_of,
    load_rows,
    load_tile,
    sigmoid_of,
    sum_groups,
    tile_at,
)
from ddpm_kernels.triton_shim import tl, triton


@triton.jit
def statistics_of(  # type: ignore[no-untyped-def]
    statistics,
    before,
    sample,
    channel,
    real,
    before_row,
    before_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Of each channel its centre, which is taken off x, the centre's rest, and rstd."""
    GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    statistics += sample * (3 * GROUPS) + channel // PER_GROUP
    mean = tl.load(statistics, real, 0.0)
    rest = tl.load(statistics + GROUPS, real, 0.0)
    rstd = tl.load(statistics + 2 * GROUPS, real, 0.0)
    centre, rest = centre_of(
        mean, rest, before, sample, channel, real, before_row, before_column, BEFORE
    )
    return centre, rest, rstd


@triton.jit
def normaliser(  # type: ignore[no-untyped-def]
    weight,
    bias,
    scale,
    shift,
    before,
    statistics,
    sample,
    channel,
    real,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    before_row,
    before_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    FILM: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """`statistics_of`, and gain and offset: z = (x − centre) gain + offset."""
    centre, rest, rstd = statistics_of(
        statistics, before, sample, channel, real, before_row, before_column,
        CHANNELS, PER_GROUP, BEFORE,
    )  # fmt: skip
    gain, offset = affine_of(
        weight, bias, scale, shift, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, FILM,
    )  # fmt: skip
    gain = gain * rstd
    return centre, rest, rstd, gain, offset - gain * rest


@triton.jit
def centred_and_dz(  # type: ignore[no-untyped-def]
    dy,
    x,
    skip,
    key,
    centre,
    gain,
    offset,
    start,
    row,
    length,
    chunk,
    channel,
    real,
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """The tile from a row of the slab that begins at pixel `start`: x less its centre, and dz.

    dy, x and skip point to the slab. Where there is no element, dz is zero.
    """
    tile = load_tile(x, skip, row, length, channel, real, CHANNELS, SKIP, ROWS, WIDE)
    dz = load_tile(dy, None, row, length, channel, real, CHANNELS, 0, ROWS, WIDE).to(tl.float32)
    centred = tile.to(tl.float32) - centre[None, :]
    if THRESHOLD:
        dz = dz * keep_scale(
            key, start + row, chunk * CHUNK, CHANNELS, CHUNK, ROWS, WIDTH, THRESHOLD
        )
    if SILU:
        z = centred * gain[None, :] + offset[None, :]
        sigmoid = sigmoid_of(z, x.dtype.element_ty == tl.float32)
        dz = dz * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    return centred, dz


@triton.jit
def sample_gradients(  # type: ignore[no-untyped-def]
    a,
    b,
    workspace,
    weight,
    bias,
    scale,
    d_scale,
    d_shift,
    rest,
    rstd,
    sample,
    channel,
    real,
    pixels,
    scale_row,
    scale_column,
    d_scale_row,
    d_scale_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    FILM: tl.constexpr,
):
    """Store a sample's terms of dγ and dβ, ds and dt; return rstd times its c₁ and c₂ `[GROUPS]`.

    Args:
        a: Σ dz (x − centre) of each channel.
        b: Σ dz.

    d_scale and d_shift have the same strides.
    """
    a = rstd * (a - rest * b)
    gain = tl.load(weight + channel, real, 0.0).to(tl.float32)
    factor = tl.full((WIDTH,), 1.0, tl.float32)
    if FILM:
        factor += load_rows(scale, sample, channel, real, scale_row, scale_column)
        offset = tl.load(bias + channel, real, 0.0).to(tl.float32)
        out = sample * d_scale_row + channel * d_scale_column
        ds = gain * a + offset * b
        tl.store(d_scale + out, ds.to(d_scale.dtype.element_ty), real)
        tl.store(d_shift + out, b.to(d_shift.dtype.element_ty), real)
        gain = gain * factor
    out = workspace + sample * (2 * CHANNELS) + channel
    tl.store(out, factor * a, real)
    tl.store(out + CHANNELS, factor * b, real)
    # Multiplied in the order of `normaliser`, so that of a group of one element nothing is left.
    gain = gain * rstd
    size = pixels.to(tl.float32) * PER_GROUP
    c1 = sum_groups(gain * a, PER_GROUP, WIDTH, GROUPS) / size
    c2 = sum_groups(gain * b, PER_GROUP, WIDTH, GROUPS) / size
    return c1, c2


@triton.jit
def write_dx(  # type: ignore[no-untyped-def]
    centred,
    dz,
    gain,
    slope,
    intercept,
    residual,
    skip_residual,
    dx,
    d_skip,
    row,
    length,
    channel,
    real,
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    RESIDUALS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile of dx ⧺ d_skip, the residual gradients added; return what COLUMNS are to sum.

    rstd (c₂ + x̂ c₁) is a line in x less its centre.
    """
    result = gain[None, :] * dz - (slope[None, :] * centred + intercept[None, :])
    summed = result
    if RESIDUALS:
        given = real
        if RESIDUALS == 1:
            given = real & (channel < CHANNELS - SKIP)
        elif RESIDUALS == 2:
            given = real & (channel >= CHANNELS - SKIP)
        added = load_tile(
            residual, skip_residual, row, length, channel, given, CHANNELS, SKIP, ROWS, WIDE
        )
        result += added.to(tl.float32)
        if COLUMNS == 2:
            summed = result
    pointers, inside = tile_at(dx, d_skip, row, length, channel, real, CHANNELS, SKIP, ROWS, WIDE)
    tl.store(pointers, result.to(dx.dtype.element_ty), inside)
    return tl.where(inside, summed, 0.0)
