"""The Triton functions of the backward pass.

One launch takes the partial sums of each slab, a small one makes A, B, c₁ and c₂ of them (see
`op`), and a third writes dx and adds the samples' terms of dγ and dβ. Where one slab covers the
sample, the first does the work of the second.

What passes between them lies in one workspace, float32 rows of `[2, C]`: first one of each slab of
every sample, then two of each sample, of which the second has c₁ and c₂ `[2, groups]`.
"""

from __future__ import annotations

from ddpm_kernels.group_norm_silu.parts import (
    affine_of,
    last_first,
    place_of,
    sum_groups,
    tile_at,
)
from ddpm_kernels.triton_shim import tl, triton


@triton.jit
def _statistics_of(statistics, sample, group, exists, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean, its rest and rstd of `group`, of one sample; GROUPS is the number of all groups."""
    statistics += sample * (3 * GROUPS) + group
    mean = tl.load(statistics, exists, 0.0)
    rest = tl.load(statistics + GROUPS, exists, 0.0)
    rstd = tl.load(statistics + 2 * GROUPS, exists, 0.0)
    return mean, rest, rstd


@triton.jit
def _normaliser(  # type: ignore[no-untyped-def]
    statistics,
    weight,
    bias,
    scale,
    shift,
    sample,
    channel,
    real,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    FILM: tl.constexpr,
):
    """Of each channel mean, its rest and rstd; gain and offset: z = (x − mean) gain + offset."""
    mean, rest, rstd = _statistics_of(
        statistics, sample, channel // PER_GROUP, real, CHANNELS // PER_GROUP
    )
    gain, offset = affine_of(
        weight, bias, scale, shift, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, FILM,
    )  # fmt: skip
    gain = gain * rstd
    return mean, rest, rstd, gain, offset - gain * rest


@triton.jit
def _centred_and_dz(x, dy, mean, gain, offset, offsets, inside, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of x − mean and dz. Where there is no element, dz is zero."""
    centred = tl.load(x + offsets, inside, 0.0).to(tl.float32) - mean[None, :]
    dz = tl.load(dy + offsets, inside, 0.0).to(tl.float32)
    if SILU:
        z = centred * gain[None, :] + offset[None, :]
        sigmoid = tl.sigmoid(z)
        dz = dz * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    return centred, dz


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    a,
    b,
    workspace,
    weight,
    bias,
    scale,
    statistics,
    d_scale,
    d_shift,
    sample,
    chunk,
    channel,
    real,
    pixels,
    all_slabs,
    scale_row,
    scale_column,
    d_scale_row,
    d_scale_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    FILM: tl.constexpr,
):
    """From a sample's sums to its terms of dγ and dβ, rstd times its c₁ and c₂, ds and dt.

    d_scale and d_shift have the same strides.
    """
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    _, rest, rstd = _statistics_of(statistics, sample, channel // PER_GROUP, real, ALL_GROUPS)
    a = rstd * (a - rest * b)

    gain = tl.load(weight + channel, real, 0.0).to(tl.float32)
    factor = tl.full((WIDTH,), 1.0, tl.float32)
    if FILM:
        s = tl.load(scale + sample * scale_row + channel * scale_column, real, 0.0)
        factor += s.to(tl.float32)
        offset = tl.load(bias + channel, real, 0.0).to(tl.float32)
        out = sample * d_scale_row + channel * d_scale_column
        ds = gain * a + offset * b
        tl.store(d_scale + out, ds.to(d_scale.dtype.element_ty), real)
        tl.store(d_shift + out, b.to(d_shift.dtype.element_ty), real)
        gain = gain * factor
    out = workspace + (all_slabs + 2 * sample) * (2 * CHANNELS)
    tl.store(out + channel, factor * a, real)
    tl.store(out + CHANNELS + channel, factor * b, real)

    lane = tl.arange(0, GROUPS)
    group = chunk * CHUNK_GROUPS + lane
    exists = (lane < CHUNK_GROUPS) & (group < ALL_GROUPS)
    # Multiplied in the order of `dx_kernel`, so that of a group of one element nothing is left.
    gain = gain * rstd
    size = pixels.to(tl.float32) * PER_GROUP
    out += 2 * CHANNELS + group
    tl.store(out, sum_groups(gain * a, PER_GROUP, WIDTH, GROUPS) / size, exists)
    tl.store(out + ALL_GROUPS, sum_groups(gain * b, PER_GROUP, WIDTH, GROUPS) / size, exists)


@triton.jit(
    do_not_specialize=[
        "pixels", "slabs", "slab_pixels", "all_slabs", "scale_row", "shift_row", "d_scale_row"
    ]
)  # fmt: skip
def sums_kernel(  # type: ignore[no-untyped-def]
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    statistics,
    workspace,
    d_scale,
    d_shift,
    pixels,
    slabs,
    slab_pixels,
    all_slabs,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    d_scale_row,
    d_scale_column,
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
    """Σ dz (x − mean) and Σ dz of every slab; with SLABS = 1, what `_combine` makes of them."""
    sample, slab, start, stop, _, channel, real = place_of(
        tl.program_id(0), pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    # Relative to the slab: offsets from the start of the sample cost registers that spill.
    x += (sample * pixels + start) * CHANNELS
    dy += (sample * pixels + start) * CHANNELS
    length = stop - start
    mean, _, _, gain, offset = _normaliser(
        statistics, weight, bias, scale, shift, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, CHANNELS, PER_GROUP, FILM,
    )  # fmt: skip
    a = tl.zeros((ROWS, WIDTH), tl.float32)
    b = tl.zeros((ROWS, WIDTH), tl.float32)
    for pixel in tl.range(0, length, ROWS, num_stages=STAGES):
        offsets, inside = tile_at(pixel, length, channel, real, CHANNELS, ROWS, WIDE)
        centred, dz = _centred_and_dz(x, dy, mean, gain, offset, offsets, inside, SILU)
        a += dz * centred
        b += dz
    if SLABS == 1:
        sample, _, _, _, chunk, channel, real = place_of(
            tl.program_id(0), pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
        )
        _combine(
            tl.sum(a, 0), tl.sum(b, 0), workspace,
            weight, bias, scale, statistics, d_scale, d_shift,
            sample, chunk, channel, real, pixels, all_slabs,
            scale_row, scale_column, d_scale_row, d_scale_column,
            CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH, GROUPS, FILM,
        )  # fmt: skip
    else:
        out = workspace + slab * (2 * CHANNELS) + channel
        tl.store(out, tl.sum(a, 0), real)
        tl.store(out + CHANNELS, tl.sum(b, 0), real)


@triton.jit(do_not_specialize=["pixels", "slabs", "all_slabs", "scale_row", "d_scale_row"])
def combine_kernel(  # type: ignore[no-untyped-def]
    workspace,
    weight,
    bias,
    scale,
    statistics,
    d_scale,
    d_shift,
    pixels,
    slabs,
    all_slabs,
    scale_row,
    scale_column,
    d_scale_row,
    d_scale_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SLABS: tl.constexpr,
    FILM: tl.constexpr,
):
    """Add a sample's slabs and `_combine`."""
    sample, _, _, _, chunk, channel, real = place_of(
        tl.program_id(0), pixels, 1, pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    a = tl.zeros((WIDTH,), tl.float32)
    b = tl.zeros((WIDTH,), tl.float32)
    STEP: tl.constexpr = min(SLABS, 8)
    for slab in range(0, slabs, STEP):
        index = slab + tl.arange(0, STEP)
        present = (index < slabs)[:, None] & real[None, :]
        partial = workspace + (sample * slabs + index)[:, None] * (2 * CHANNELS) + channel[None, :]
        a += tl.sum(tl.load(partial, present, 0.0), 0)
        b += tl.sum(tl.load(partial + CHANNELS, present, 0.0), 0)
    _combine(
        a, b, workspace, weight, bias, scale, statistics, d_scale, d_shift,
        sample, chunk, channel, real, pixels, all_slabs,
        scale_row, scale_column, d_scale_row, d_scale_column,
        CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH, GROUPS, FILM,
    )  # fmt: skip


@triton.jit
def _write_dx(  # type: ignore[no-untyped-def]
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    statistics,
    workspace,
    dx,
    pixels,
    slabs,
    slab_pixels,
    all_slabs,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
):
    """One slab of dx."""
    sample, _, start, stop, _, channel, real = place_of(
        last_first(), pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    x += sample * pixels * CHANNELS
    dy += sample * pixels * CHANNELS
    dx += sample * pixels * CHANNELS
    mean, rest, rstd, gain, offset = _normaliser(
        statistics, weight, bias, scale, shift, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, CHANNELS, PER_GROUP, FILM,
    )  # fmt: skip
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    c = workspace + (all_slabs + 2 * sample + 1) * (2 * CHANNELS) + channel // PER_GROUP
    # rstd (c₂ + x̂ c₁) is a line in x − mean.
    slope = rstd * tl.load(c, real, 0.0)
    intercept = tl.load(c + ALL_GROUPS, real, 0.0) - slope * rest
    for pixel in tl.range(start, stop, ROWS, num_stages=STAGES):
        offsets, inside = tile_at(pixel, stop, channel, real, CHANNELS, ROWS, WIDE)
        centred, dz = _centred_and_dz(x, dy, mean, gain, offset, offsets, inside, SILU)
        result = gain[None, :] * dz - (slope[None, :] * centred + intercept[None, :])
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), inside)


@triton.jit
def _sum_affine(  # type: ignore[no-untyped-def]
    program,
    workspace,
    d_weight,
    d_bias,
    samples,
    all_slabs,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sum the samples' terms of WIDTH channels' dγ and dβ, ROWS samples at a time."""
    channel = program * WIDTH + tl.arange(0, WIDTH)
    real = channel < CHANNELS
    a = tl.zeros((ROWS, WIDTH), tl.float32)
    b = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, samples, ROWS):
        sample = first + tl.arange(0, ROWS)
        present = (sample < samples)[:, None] & real[None, :]
        row = (all_slabs + 2 * sample).to(tl.int64)
        terms = workspace + row[:, None] * (2 * CHANNELS) + channel[None, :]
        a += tl.load(terms, present, 0.0)
        b += tl.load(terms + CHANNELS, present, 0.0)
    tl.store(d_weight + channel, tl.sum(a, 0).to(d_weight.dtype.element_ty), real)
    tl.store(d_bias + channel, tl.sum(b, 0).to(d_bias.dtype.element_ty), real)


@triton.jit(
    do_not_specialize=[
        "pixels", "slabs", "slab_pixels", "samples", "all_slabs", "scale_row", "shift_row"
    ]
)  # fmt: skip
def dx_kernel(  # type: ignore[no-untyped-def]
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    statistics,
    workspace,
    dx,
    d_weight,
    d_bias,
    pixels,
    slabs,
    slab_pixels,
    samples,
    all_slabs,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    LINE: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """From rstd c₁ and rstd c₂ to dx. The first programs sum LINE channels' dγ and dβ each."""
    if tl.program_id(0) < tl.cdiv(CHANNELS, LINE):
        _sum_affine(
            tl.program_id(0), workspace, d_weight, d_bias, samples, all_slabs,
            CHANNELS, SAMPLES, LINE,
        )  # fmt: skip
    else:
        _write_dx(
            dy, x, weight, bias, scale, shift, statistics, workspace, dx,
            pixels, slabs, slab_pixels, all_slabs,
            scale_row, scale_column, shift_row, shift_column,
            CHANNELS, PER_GROUP, CHUNK_GROUPS, ROWS, WIDTH, WIDE, STAGES, FILM, SILU,
        )  # fmt: skip
