"""The Triton functions of the backward pass, where a chunk of a sample does not fit on chip.

One launch takes the partial sums of each slab, a small one makes A, B, c₁ and c₂ of them, and a
third writes dx. Where one slab covers the sample, the first does the work of the second.
"""

from __future__ import annotations

from ddpm_kernels.group_norm_silu.backward_parts import (
    centred_and_dz,
    normaliser,
    sample_gradients,
    statistics_of,
    write_dx,
)
from ddpm_kernels.group_norm_silu.parts import at_pixel, last_first, place_of
from ddpm_kernels.triton_shim import tl, triton


@triton.jit(
    do_not_specialize=[
        "pixels", "slabs", "slab_pixels", "samples",
        "scale_row", "shift_row", "before_row", "d_scale_row",
    ]
)  # fmt: skip
def sums_kernel(  # type: ignore[no-untyped-def]
    dy,
    x,
    skip,
    weight,
    bias,
    scale,
    shift,
    before,
    dropout_key,
    statistics,
    workspace,
    d_scale,
    d_shift,
    pixels,
    slabs,
    slab_pixels,
    samples,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    before_row,
    before_column,
    d_scale_row,
    d_scale_column,
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
    FILM: tl.constexpr,
    BEFORE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SILU: tl.constexpr,
):
    """Σ dz (x − centre) and Σ dz of every slab; with SLABS = 1, what `_combine` makes of them."""
    CHUNK: tl.constexpr = CHUNK_GROUPS * PER_GROUP
    sample, slab, start, stop, chunk, channel, real = place_of(
        tl.program_id(0), pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    # Relative to the slab: offsets from the start of the sample cost registers that spill.
    pixel = sample * pixels + start
    dy = at_pixel(dy, pixel, CHANNELS)
    x, skip = at_pixel(x, pixel, CHANNELS - SKIP), at_pixel(skip, pixel, SKIP)
    length = stop - start
    centre, _, _, gain, offset = normaliser(
        weight, bias, scale, shift, before, statistics, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, before_row, before_column,
        CHANNELS, PER_GROUP, FILM, BEFORE,
    )  # fmt: skip
    key = tl.load(dropout_key + sample) if THRESHOLD else 0
    a = tl.zeros((ROWS, WIDTH), tl.float32)
    b = tl.zeros((ROWS, WIDTH), tl.float32)
    for row in tl.range(0, length, ROWS, num_stages=STAGES):
        centred, dz = centred_and_dz(
            dy, x, skip, key, centre, gain, offset,
            start, row, length, chunk, channel, real,
            CHANNELS, SKIP, CHUNK, ROWS, WIDTH, WIDE, SILU, THRESHOLD,
        )  # fmt: skip
        a += dz * centred
        b += dz
    if SLABS == 1:
        _combine(
            tl.sum(a, 0), tl.sum(b, 0), workspace,
            weight, bias, scale, before, statistics, d_scale, d_shift, pixels, samples,
            scale_row, scale_column, before_row, before_column, d_scale_row, d_scale_column,
            CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH, GROUPS, FILM, BEFORE,
        )  # fmt: skip
    else:
        out = workspace + (2 * samples + slab) * (2 * CHANNELS) + channel
        tl.store(out, tl.sum(a, 0), real)
        tl.store(out + CHANNELS, tl.sum(b, 0), real)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    a,
    b,
    workspace,
    weight,
    bias,
    scale,
    before,
    statistics,
    d_scale,
    d_shift,
    pixels,
    samples,
    scale_row,
    scale_column,
    before_row,
    before_column,
    d_scale_row,
    d_scale_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    FILM: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """`sample_gradients`, with c₁ and c₂ left in the workspace, of a program a sample and chunk.

    All places and statistics are found here, so that a loop before it keeps no registers for them.
    """
    sample, _, _, _, chunk, channel, real = place_of(
        tl.program_id(0), pixels, 1, pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    _, rest, rstd = statistics_of(
        statistics, before, sample, channel, real, before_row, before_column,
        CHANNELS, PER_GROUP, BEFORE,
    )  # fmt: skip
    c1, c2 = sample_gradients(
        a, b, workspace, weight, bias, scale, d_scale, d_shift, rest, rstd,
        sample, channel, real, pixels, scale_row, scale_column, d_scale_row, d_scale_column,
        CHANNELS, PER_GROUP, WIDTH, GROUPS, FILM,
    )  # fmt: skip
    ALL_GROUPS: tl.constexpr = CHANNELS // PER_GROUP
    lane = tl.arange(0, GROUPS)
    group = chunk * CHUNK_GROUPS + lane
    exists = (lane < CHUNK_GROUPS) & (group < ALL_GROUPS)
    out = workspace + (samples + sample) * (2 * CHANNELS) + group
    tl.store(out, c1, exists)
    tl.store(out + ALL_GROUPS, c2, exists)


@triton.jit(
    do_not_specialize=["pixels", "slabs", "samples", "scale_row", "before_row", "d_scale_row"]
)
def combine_kernel(  # type: ignore[no-untyped-def]
    workspace,
    weight,
    bias,
    scale,
    before,
    statistics,
    d_scale,
    d_shift,
    pixels,
    slabs,
    samples,
    scale_row,
    scale_column,
    before_row,
    before_column,
    d_scale_row,
    d_scale_column,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SLABS: tl.constexpr,
    FILM: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Add a sample's slabs and `_combine`."""
    sample, _, _, _, _, channel, real = place_of(
        tl.program_id(0), pixels, 1, pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    a = tl.zeros((WIDTH,), tl.float32)
    b = tl.zeros((WIDTH,), tl.float32)
    STEP: tl.constexpr = min(SLABS, 8)
    for slab in range(0, slabs, STEP):
        index = slab + tl.arange(0, STEP)
        present = (index < slabs)[:, None] & real[None, :]
        row = 2 * samples + sample * slabs + index
        partial = workspace + row[:, None] * (2 * CHANNELS) + channel[None, :]
        a += tl.sum(tl.load(partial, present, 0.0), 0)
        b += tl.sum(tl.load(partial + CHANNELS, present, 0.0), 0)
    _combine(
        a, b, workspace,
        weight, bias, scale, before, statistics, d_scale, d_shift, pixels, samples,
        scale_row, scale_column, before_row, before_column, d_scale_row, d_scale_column,
        CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH, GROUPS, FILM, BEFORE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "pixels", "slabs", "slab_pixels", "samples",
        "scale_row", "shift_row", "before_row",
    ]
)  # fmt: skip
def dx_kernel(  # type: ignore[no-untyped-def]
    dy,
    x,
    skip,
    weight,
    bias,
    scale,
    shift,
    before,
    dropout_key,
    statistics,
    workspace,
    residual,
    skip_residual,
    dx,
    d_skip,
    sums,
    pixels,
    slabs,
    slab_pixels,
    samples,
    scale_row,
    scale_column,
    shift_row,
    shift_column,
    before_row,
    before_column,
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    FILM: tl.constexpr,
    BEFORE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUALS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From rstd c₁ and rstd c₂ to one slab of dx."""
    CHUNK: tl.constexpr = CHUNK_GROUPS * PER_GROUP
    sample, slab, start, stop, chunk, channel, real = place_of(
        last_first(), pixels, slabs, slab_pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    pixel = sample * pixels + start
    OWN: tl.constexpr = CHANNELS - SKIP
    dy = at_pixel(dy, pixel, CHANNELS)
    x, skip = at_pixel(x, pixel, OWN), at_pixel(skip, pixel, SKIP)
    dx, d_skip = at_pixel(dx, pixel, OWN), at_pixel(d_skip, pixel, SKIP)
    residual = at_pixel(residual, pixel, OWN if RESIDUALS else 0)
    skip_residual = at_pixel(skip_residual, pixel, SKIP if RESIDUALS else 0)
    length = stop - start
    centre, rest, rstd, gain, offset = normaliser(
        weight, bias, scale, shift, before, statistics, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, before_row, before_column,
        CHANNELS, PER_GROUP, FILM, BEFORE,
    )  # fmt: skip
    c = workspace + (samples + sample) * (2 * CHANNELS) + channel // PER_GROUP
    slope = rstd * tl.load(c, real, 0.0)
    intercept = tl.load(c + CHANNELS // PER_GROUP, real, 0.0) - slope * rest
    key = tl.load(dropout_key + sample) if THRESHOLD else 0
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for row in tl.range(0, length, ROWS, num_stages=STAGES):
        centred, dz = centred_and_dz(
            dy, x, skip, key, centre, gain, offset,
            start, row, length, chunk, channel, real,
            CHANNELS, SKIP, CHUNK, ROWS, WIDTH, WIDE, SILU, THRESHOLD,
        )  # fmt: skip
        total += write_dx(
            centred, dz, gain, slope, intercept, residual, skip_residual, dx, d_skip,
            row, length, channel, real, CHANNELS, SKIP, ROWS, WIDE, RESIDUALS, COLUMNS,
        )  # fmt: skip
    if COLUMNS != 0:
        out = sums + slab * CHANNELS + channel
        tl.store(out, tl.sum(total, 0).to(sums.dtype.element_ty), real)
