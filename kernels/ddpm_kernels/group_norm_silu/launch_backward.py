"""Launches of the backward pass."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of
from ddpm_kernels.group_norm_silu.backward import combine_kernel, dx_kernel, sums_kernel
from ddpm_kernels.group_norm_silu.backward_on_chip import on_chip_kernel
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
from ddpm_kernels.group_norm_silu.plan import plan, power_of_two
from ddpm_kernels.group_norm_silu.totals import totals_kernel
from ddpm_kernels.tiles import Tile, tile_for

LINE = 32
"""Channels of a program that sums over samples, of 4 bytes each."""
OF_DX, WITH_RESIDUALS = 1, 2
"""What is summed over each channel's pixels, if anything is: COLUMNS of the kernels."""


def launch_backward(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
    activation: str,
    needs_dx: bool = True,
    skip: Tensor | None = None,
    before: Tensor | None = None,
    dropout_key: Tensor | None = None,
    dropout_probability: float = 0.0,
    residual: Tensor | None = None,
    skip_residual: Tensor | None = None,
    owes: bool = False,
) -> tuple[Tensor | None, ...]:
    """Launch the backward pass; see `group_norm_silu_backward_reference`.

    Returns:
        dx `[N, C₁, H, W]`, dγ and dβ `[C]`, ds and dt `[N, C]`, dskip `[N, C₂, H, W]`, dbefore
        `[N, C]` and the gradient of owed biases `[C]`; None where the reference returns an empty
        tensor.
    """
    d_scale = d_shift = d_before = d_owed = film = None
    if scale is not None and shift is not None:
        d_scale, d_shift = torch.empty_like(scale), torch.empty_like(scale)
        film = (*scale.stride(), *shift.stride(), *d_scale.stride())
    variant = Variant(
        activation,
        film,
        0 if skip is None else skip.shape[1],
        None if before is None else before.stride(),
        dropped(dropout_key, dropout_probability),
    )
    residuals = (residual is not None) + 2 * (skip_residual is not None)
    tile = tile_for("group_norm_silu_backward", x)
    launches = _backward_launches(tile, x.shape, x.dtype, groups, variant, residuals, owes)

    weight, bias, statistics = weight.contiguous(), bias.contiguous(), statistics.contiguous()
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias)
    if before is not None:
        d_before = before.new_empty(before.shape)
    if owes:
        d_owed = statistics.new_empty(dy.shape[1])
    workspace = statistics.new_empty(launches.workspace)
    sums = d_before if launches.sums is None else statistics.new_empty(launches.sums)
    key = None
    if dropout_key is not None and variant.threshold:
        key = dropout_key.contiguous()
    dx, d_skip = _empty_in_nhwc(x), _empty_in_nhwc(skip)
    read = (
        _in_nhwc(dy), _in_nhwc(x), _in_nhwc(skip),
        weight, bias, scale, shift, before, key, statistics, workspace,
    )  # fmt: skip
    written = (
        # Where one of two has no residual gradient, it has a mask.
        _in_nhwc(skip_residual if residual is None else residual),
        _in_nhwc(residual if skip_residual is None else skip_residual),
        dx, d_skip, sums,
    )  # fmt: skip
    with on_device_of(x):
        if launches.on_chip is not None:
            launches.on_chip(*read, d_scale, d_shift, *written)
        else:
            launches.slabs(*read, d_scale, d_shift)
            if launches.combine is not None:
                launches.combine(
                    workspace, weight, bias, scale, before, statistics, d_scale, d_shift
                )
            if needs_dx or launches.columns:
                launches.dx(*read, *written)
        launches.totals(workspace, sums, d_weight, d_bias, d_before, d_owed)
    if d_owed is not None and launches.columns == OF_DX:
        for part, gradient in (
            (d_owed[: x.shape[1]], residual), (d_owed[x.shape[1] :], skip_residual)
        ):  # fmt: skip
            if gradient is not None:
                part.add_(gradient.sum((0, 2, 3), dtype=part.dtype))
    if needs_dx:
        dx, d_skip = _laid_out_as(x, dx), _laid_out_as(skip, d_skip)
    else:
        dx = d_skip = None
    return dx, d_weight, d_bias, d_scale, d_shift, d_skip, d_before, d_owed


class _Backward(NamedTuple):
    on_chip: Launch | None
    """In place of the next three, where a chunk of a sample fits."""
    slabs: Launch
    combine: Launch | None
    """None where one slab covers a sample."""
    dx: Launch
    totals: Launch
    columns: int
    workspace: tuple[int, ...]
    """Shape."""
    sums: tuple[int, ...] | None
    """Shape; None where there are none, or they are the gradient of `before` as they are."""


@lru_cache(maxsize=1024)
def _backward_launches(
    tile: Tile,
    shape: torch.Size,
    dtype: torch.dtype,
    groups: int,
    variant: Variant,
    residuals: int,
    owes: bool,
) -> _Backward:
    batch, channels, height, width = shape
    channels += variant.skip
    both = 2 * dtype.itemsize  # x and dy
    division = plan(batch, channels, height * width, groups, tile.elements, tile.programs, both)
    options = tile.options()
    if division.on_chip:
        # 64 elements a thread in half precision: with fewer, a program of the largest tile spills;
        # so it does with as many that are read one by one.
        share = 2048 if dtype.itemsize == 2 and channels % 8 == 0 else 1024
        options["num_warps"] = warps_on_chip(division, share)
    has_before = variant.before is not None
    columns = OF_DX if has_before else WITH_RESIDUALS if owes else 0
    several = division.slabs > 1
    by_sample = has_before and (several or owes)
    values = values_of(division, shape, groups, variant)
    values |= {
        "STAGES": tile.stages,
        "samples": batch,
        "LINE": LINE,
        "SAMPLES": min(64, power_of_two(batch)),
        "RESIDUALS": residuals,
        "COLUMNS": columns,
        "OWED": owes,
        "BY_SAMPLE": by_sample,
    }
    chunks = batch * division.chunks
    lines = -(-channels // LINE)
    return _Backward(
        bind(on_chip_kernel, (chunks,), values, options) if division.on_chip else None,
        bind(sums_kernel, (chunks * division.slabs,), values, options),
        bind(combine_kernel, (chunks,), values, options) if several else None,
        bind(dx_kernel, (chunks * division.slabs,), values, options),
        bind(totals_kernel, (lines * (1 + batch if by_sample else 1),), values, tile.options()),
        columns,
        (batch if division.on_chip else (2 + division.slabs) * batch, 2, channels),
        (batch * division.slabs, channels) if by_sample or owes else None,
    )


def _in_nhwc(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=NHWC)


def _empty_in_nhwc(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x, memory_format=NHWC)


def _laid_out_as(x: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if x is None or gradient is None or x.is_contiguous(memory_format=NHWC):
        return gradient
    return in_nchw(gradient)
