"""Launches of the forward pass."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of
from ddpm_kernels.group_norm_silu.forward import forward_kernel
from ddpm_kernels.group_norm_silu.launching import (
    NHWC,
    Launch,
    Variant,
    bind,
    dropped,
    in_nchw,
    values_of,
    warps_on_chip,
)
from ddpm_kernels.group_norm_silu.moments import moments_kernel
from ddpm_kernels.group_norm_silu.plan import plan
from ddpm_kernels.tiles import Tile, tile_for

BYTES_A_WARP = 4096
"""On chip: 64 elements a thread in half precision, which take 128 registers, or 255."""


def launch_forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
    skip: Tensor | None = None,
    before: Tensor | None = None,
    dropout_key: Tensor | None = None,
    dropout_probability: float = 0.0,
    moments: Tensor | None = None,
    slab_pixels: int = 0,
    skip_moments: Tensor | None = None,
    skip_slab_pixels: int = 0,
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; arguments and results as in `group_norm_silu_reference`."""
    variant = Variant(
        activation,
        None if scale is None or shift is None else (*scale.stride(), *shift.stride()),
        0 if skip is None else skip.shape[1],
        None if before is None else before.stride(),
        dropped(dropout_key, dropout_probability),
    )
    slabs: tuple[int, ...] = ()
    if moments is not None and (skip is None or skip_moments is not None):
        of_skip = 0 if skip_moments is None else skip_moments.shape[1]
        slabs = moments.shape[1], slab_pixels, of_skip, skip_slab_pixels
    tile = tile_for("group_norm_silu", x)
    launches = _forward_launches(tile, x.shape, x.dtype, groups, eps, variant, slabs)
    dense = x.contiguous(memory_format=NHWC)
    if skip is None:
        y = torch.empty_like(dense, memory_format=NHWC)
    else:
        skip = skip.contiguous(memory_format=NHWC)
        y = torch.empty(launches.y, dtype=x.dtype, device=x.device, memory_format=NHWC)
    statistics = x.new_empty(launches.statistics, dtype=torch.float32)
    weight, bias = weight.contiguous(), bias.contiguous()
    if not launches.reads_kept:
        moments = skip_moments = None
    slab_moments = None
    key = dropout_key.contiguous() if dropout_key is not None and variant.threshold else None
    with on_device_of(x):
        if launches.moments is not None:
            slab_moments = statistics.new_empty(launches.slab_moments)
            launches.moments(dense, skip, before, slab_moments)
        launches.normalise(
            dense, skip, slab_moments, moments, skip_moments, weight, bias, scale, shift, before,
            key, y, statistics,
        )  # fmt: skip
    return (y if dense is x else in_nchw(y)), statistics


class _Forward(NamedTuple):
    moments: Launch | None
    """None where a single launch does all."""
    normalise: Launch
    reads_kept: bool
    """Moments that were kept, of x and skip."""
    slab_moments: tuple[int, ...]
    """Shape, as are the following."""
    y: tuple[int, ...]
    statistics: tuple[int, ...]


@lru_cache(maxsize=1024)
def _forward_launches(
    tile: Tile,
    shape: torch.Size,
    dtype: torch.dtype,
    groups: int,
    eps: float,
    variant: Variant,
    kept: tuple[int, ...],
) -> _Forward:
    batch, channels, height, width = shape
    channels += variant.skip
    # Dropout takes as many registers as another tensor.
    pixel_bytes = dtype.itemsize * (2 if variant.threshold else 1)
    division = plan(
        batch, channels, height * width, groups, tile.elements, tile.programs, pixel_bytes
    )
    options = tile.options()
    if division.on_chip:
        options["num_warps"] = warps_on_chip(division, BYTES_A_WARP // dtype.itemsize)
    reads_kept = bool(kept) and not division.on_chip
    names = "x_slabs", "x_slab_pixels", "skip_slabs", "skip_slab_pixels"
    values = values_of(division, shape, groups, variant)
    values |= {"eps": eps, "STAGES": tile.stages, "KEPT": reads_kept}
    values |= dict(zip(names, kept or (0,) * len(names), strict=True))
    grid = (batch * division.slabs * division.chunks,)
    several = division.slabs > 1 and not reads_kept
    return _Forward(
        bind(moments_kernel, grid, values, options) if several else None,
        bind(forward_kernel, grid, values, options),
        reads_kept,
        (batch, division.slabs, 3, groups),
        (batch, channels, height, width),
        (batch, 3, groups),
    )
