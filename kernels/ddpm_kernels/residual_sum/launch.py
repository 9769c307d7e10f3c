"""The Triton function of `residual_sum`, and its launch.

A program takes a slab of consecutive pixels and a chunk of channels of one sample, as those of
`group_norm_silu`; so it alone has the moments of its channels in the slab.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of
from ddpm_kernels.group_norm_silu.parts import offsets_at, place_of
from ddpm_kernels.group_norm_silu.plan import plan
from ddpm_kernels.tiles import Tile, tile_for
from ddpm_kernels.tiling import INDEX_LIMIT
from ddpm_kernels.triton_shim import tl, triton

NHWC = torch.channels_last


# --- Triton


@triton.jit
def _store_sum(h, x, y, offsets, inside, offset, DIVISOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of y; returns it as it is stored, in float32."""
    total = tl.load(h + offsets, inside, 0.0).to(tl.float32) + offset[None, :]
    if x is not None:
        total += tl.load(x + offsets, inside, 0.0).to(tl.float32)
    if DIVISOR != 1.0:
        total = total / DIVISOR
    stored = total.to(y.dtype.element_ty)
    tl.store(y + offsets, stored, inside)
    return stored.to(tl.float32)


@triton.jit(do_not_specialize=["pixels", "slabs", "slab_pixels"])
def _residual_sum_kernel(  # type: ignore[no-untyped-def]
    h,
    x,
    bias,
    y,
    moments,
    pixels,
    slabs,
    slab_pixels,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    """One slab of y; and its moments, summed relative to the first tile's mean."""
    sample, slab, start, stop, _, channel, real = place_of(
        tl.program_id(0), pixels, slabs, slab_pixels, CHANNELS, 1, CHUNK, WIDTH
    )
    h += sample * pixels * CHANNELS
    y += sample * pixels * CHANNELS
    if x is not None:
        x += sample * pixels * CHANNELS
    offset = tl.zeros((WIDTH,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, real, 0.0).to(tl.float32)
    if moments is None:
        for pixel in range(start, stop, ROWS):
            offsets, inside = offsets_at(pixel, stop, channel, real, CHANNELS, ROWS, WIDE)
            _store_sum(h, x, y, offsets, inside, offset, DIVISOR)
    else:
        offsets, inside = offsets_at(start, stop, channel, real, CHANNELS, ROWS, WIDE)
        tile = _store_sum(h, x, y, offsets, inside, offset, DIVISOR)
        rows = tl.minimum(stop - start, ROWS).to(tl.float32)
        anchor = tl.sum(tl.where(inside, tile, 0.0), 0) / rows
        first = tl.where(inside, tile - anchor[None, :], 0.0)
        second = first * first
        for pixel in range(start + ROWS, stop, ROWS):
            offsets, inside = offsets_at(pixel, stop, channel, real, CHANNELS, ROWS, WIDE)
            tile = _store_sum(h, x, y, offsets, inside, offset, DIVISOR)
            deviation = tl.where(inside, tile - anchor[None, :], 0.0)
            first += deviation
            second += deviation * deviation
        sums = tl.sum(first, 0)
        rest = sums / (stop - start).to(tl.float32)
        out = moments + slab * (3 * CHANNELS) + channel
        tl.store(out, anchor, real)
        tl.store(out + CHANNELS, rest, real)
        tl.store(out + 2 * CHANNELS, tl.sum(second, 0) - sums * rest, real)


# --- Launcher


class _Planned(NamedTuple):
    run: Callable[..., None]
    """The kernel with its grid and all arguments but tensors."""
    moments: tuple[int, ...]
    """Shape."""


def launch(
    h: Tensor, x: Tensor | None, bias: Tensor | None, divisor: float, slab_pixels: int
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments and results as in `residual_sum_reference`."""
    tile = tile_for("residual_sum", h)
    planned = _plan(tile, h.shape, divisor, slab_pixels)
    dense = h.contiguous(memory_format=NHWC)
    y = torch.empty_like(dense, memory_format=NHWC)
    moments = h.new_empty(planned.moments, dtype=torch.float32)
    with on_device_of(h):
        planned.run(
            dense,
            None if x is None else x.contiguous(memory_format=NHWC),
            None if bias is None else bias.contiguous(),
            y,
            moments if slab_pixels else None,
        )
    return y.contiguous(memory_format=format_of(h)), moments


@lru_cache(maxsize=1024)
def _plan(tile: Tile, shape: torch.Size, divisor: float, slab_pixels: int) -> _Planned:
    batch, channels, height, width = shape
    pixels = height * width
    # Each channel a group: any number of them may share a program.
    division = plan(batch, channels, pixels, channels, tile.elements, tile.programs)
    slab = slab_pixels or division.slab_pixels
    slabs = -(-pixels // slab)
    grid = (batch * slabs * division.chunks,)
    options = tile.options()
    # The last tile's offsets pass the sample's end before they are masked.
    wide = (pixels + division.rows) * channels + division.width >= INDEX_LIMIT
    rest = (
        pixels, slabs, slab, channels, division.chunk_groups, division.rows, division.width,
        wide, divisor,
    )  # fmt: skip
    # `kernel[grid]` without the function that it would make.
    kernel = _residual_sum_kernel
    return _Planned(
        lambda *tensors: kernel.run(*tensors, *rest, grid=grid, warmup=False, **options),
        (batch, slabs, 3, channels) if slab_pixels else (0,),
    )


def format_of(h: Tensor) -> torch.memory_format:
    """The format of h, `[N, C, H, W]`; channels-last of a part of one that is."""
    channels_last = h.is_contiguous(memory_format=torch.channels_last)
    if channels_last or (h.stride(1) == 1 and not h.is_contiguous()):
        return torch.channels_last
    return torch.contiguous_format
