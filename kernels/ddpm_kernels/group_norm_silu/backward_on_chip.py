"""The Triton function of the backward pass, where a chunk of a sample fits on chip.

One launch reads x and dy once and writes dx.
"""

from __future__ import annotations

from ddpm_kernels.group_norm_silu.backward_parts import (
    centred_and_dz,
    normaliser,
    sample_gradients,
    write_dx,
)
from ddpm_kernels.group_norm_silu.parts import at_pixel, place_of, spread_groups
from ddpm_kernels.triton_shim import tl, triton


@triton.jit(
    do_not_specialize=[
        "pixels", "scale_row", "shift_row", "before_row", "d_scale_row"
    ]
)  # fmt: skip
def on_chip_kernel(  # type: ignore[no-untyped-def]
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
    residual,
    skip_residual,
    dx,
    d_skip,
    sums,
    pixels,
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
    FILM: tl.constexpr,
    BEFORE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUALS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From dy and x to dx, of a sample's chunk that is one tile."""
    CHUNK: tl.constexpr = CHUNK_GROUPS * PER_GROUP
    sample, _, _, _, chunk, channel, real = place_of(
        tl.program_id(0), pixels, 1, pixels, CHANNELS, PER_GROUP, CHUNK_GROUPS, WIDTH
    )
    pixel = sample * pixels
    OWN: tl.constexpr = CHANNELS - SKIP
    dy = at_pixel(dy, pixel, CHANNELS)
    x, skip = at_pixel(x, pixel, OWN), at_pixel(skip, pixel, SKIP)
    dx, d_skip = at_pixel(dx, pixel, OWN), at_pixel(d_skip, pixel, SKIP)
    residual = at_pixel(residual, pixel, OWN if RESIDUALS else 0)
    skip_residual = at_pixel(skip_residual, pixel, SKIP if RESIDUALS else 0)
    centre, rest, rstd, gain, offset = normaliser(
        weight, bias, scale, shift, before, statistics, sample, channel, real,
        scale_row, scale_column, shift_row, shift_column, before_row, before_column,
        CHANNELS, PER_GROUP, FILM, BEFORE,
    )  # fmt: skip
    key = tl.load(dropout_key + sample) if THRESHOLD else 0
    centred, dz = centred_and_dz(
        dy, x, skip, key, centre, gain, offset,
        0, 0, pixels, chunk, channel, real,
        CHANNELS, SKIP, CHUNK, ROWS, WIDTH, WIDE, SILU, THRESHOLD,
    )  # fmt: skip
    c1, c2 = sample_gradients(
        tl.sum(dz * centred, 0), tl.sum(dz, 0), workspace,
        weight, bias, scale, d_scale, d_shift, rest, rstd,
        sample, channel, real, pixels, scale_row, scale_column, d_scale_row, d_scale_column,
        CHANNELS, PER_GROUP, WIDTH, GROUPS, FILM,
    )  # fmt: skip
    slope = rstd * spread_groups(c1, PER_GROUP, WIDTH, GROUPS)
    intercept = spread_groups(c2, PER_GROUP, WIDTH, GROUPS) - slope * rest
    total = write_dx(
        centred, dz, gain, slope, intercept, residual, skip_residual, dx, d_skip,
        0, pixels, channel, real, CHANNELS, SKIP, ROWS, WIDE, RESIDUALS, COLUMNS,
    )  # fmt: skip
    if COLUMNS != 0:
        out = sums + sample * CHANNELS + channel
        tl.store(out, tl.sum(total, 0).to(sums.dtype.element_ty), real)
