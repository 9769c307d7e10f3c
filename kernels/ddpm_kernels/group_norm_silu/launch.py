"""Launches of the Triton functions.

What a call launches follows from the shape of x and a few options; it is worked out once for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of
from ddpm_kernels.group_norm_silu.backward import combine_kernel, dx_kernel, sums_kernel
from ddpm_kernels.group_norm_silu.forward import forward_kernel, moments_kernel
from ddpm_kernels.group_norm_silu.plan import Plan, plan, power_of_two
from ddpm_kernels.tiles import Tile, tile_for
from ddpm_kernels.tiling import INDEX_LIMIT

NHWC = torch.channels_last
Launch = Callable[..., None]
"""A kernel with its grid and all arguments but tensors."""
Strides = tuple[int, ...]
"""Row and column strides of scale, of shift and, in the backward pass, of their gradients."""
_STRIDES = (
    "scale_row", "scale_column", "shift_row", "shift_column", "d_scale_row", "d_scale_column"
)  # fmt: skip


def launch_forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; arguments and results as in `group_norm_silu_reference`."""
    if scale is None or shift is None:
        film, scale, shift = None, weight, weight  # which are not read
    else:
        film = (*scale.stride(), *shift.stride())
    tile = tile_for("group_norm_silu", x)
    launches = _forward_launches(tile, x.shape, groups, film, eps, activation)
    dense = x.contiguous(memory_format=NHWC)
    y = torch.empty_like(dense, memory_format=NHWC)
    statistics = x.new_empty(launches.statistics, dtype=torch.float32)
    moments = statistics
    with on_device_of(x):
        if launches.moments is not None:
            moments = statistics.new_empty(launches.slab_moments)
            launches.moments(dense, moments)
        launches.normalise(
            dense, moments, weight.contiguous(), bias.contiguous(), scale, shift, y, statistics
        )
    return (y if dense is x else _contiguous(y)), statistics


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
) -> tuple[Tensor | None, ...]:
    """Launch the backward pass; see `group_norm_silu_backward_reference`.

    Returns:
        dx `[N, C, H, W]`, dγ and dβ `[C]`, ds and dt `[N, C]`; None where the reference returns an
        empty tensor.
    """
    weight, bias = weight.contiguous(), bias.contiguous()
    if scale is None or shift is None:
        film = None
        scale = shift = d_scale = d_shift = weight  # which are neither read nor written
    else:
        d_scale, d_shift = torch.empty_like(scale), torch.empty_like(scale)
        film = (*scale.stride(), *shift.stride(), *d_scale.stride())
    tile = tile_for("group_norm_silu_backward", x)
    launches = _backward_launches(tile, x.shape, groups, film, activation)
    dense = x.contiguous(memory_format=NHWC)
    both = dy.contiguous(memory_format=NHWC), dense
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias)
    statistics = statistics.contiguous()
    workspace = statistics.new_empty(launches.workspace)
    affine = weight, bias, scale, shift, statistics, workspace
    with on_device_of(x):
        launches.sums(*both, *affine, d_scale, d_shift)
        if launches.combine is not None:
            launches.combine(workspace, weight, bias, scale, statistics, d_scale, d_shift)
        if needs_dx:
            dx = torch.empty_like(dense, memory_format=NHWC)
            launches.dx(*both, *affine, dx, d_weight, d_bias)
            dx = dx if dense is x else _contiguous(dx)
        else:
            launches.affine(*both, *affine, dense, d_weight, d_bias)
            dx = None
    return dx, d_weight, d_bias, *((None, None) if film is None else (d_scale, d_shift))


class _Forward(NamedTuple):
    moments: Launch | None
    """None where one slab covers a sample."""
    normalise: Launch
    slab_moments: tuple[int, ...]
    """Shape, as are the following."""
    statistics: tuple[int, ...]


class _Backward(NamedTuple):
    sums: Launch
    combine: Launch | None
    """None where one slab covers a sample."""
    dx: Launch
    affine: Launch
    """The programs of `dx` that write the gradients of weight and bias, alone."""
    workspace: tuple[int, ...]
    """Shape."""


@lru_cache(maxsize=1024)
def _forward_launches(
    tile: Tile, shape: torch.Size, groups: int, film: Strides | None, eps: float, activation: str
) -> _Forward:
    division, grid, values = _values(tile, shape, groups, film, activation)
    values["eps"] = eps
    several = division.slabs > 1
    return _Forward(
        _launch(moments_kernel, grid, tile, values) if several else None,
        _launch(forward_kernel, grid, tile, values),
        (shape[0], division.slabs, 3, groups),
        (shape[0], 3, groups),
    )


@lru_cache(maxsize=1024)
def _backward_launches(
    tile: Tile, shape: torch.Size, groups: int, film: Strides | None, activation: str
) -> _Backward:
    division, grid, values = _values(tile, shape, groups, film, activation)
    batch, channels = shape[:2]
    all_slabs = batch * division.slabs
    line = 32  # channels, of 4 bytes each
    values |= {
        "samples": batch,
        "all_slabs": all_slabs,
        "LINE": line,
        "SAMPLES": min(64, power_of_two(batch)),
    }
    several = division.slabs > 1
    lines = -(-channels // line)
    return _Backward(
        _launch(sums_kernel, grid, tile, values),
        _launch(combine_kernel, (batch * division.chunks,), tile, values) if several else None,
        _launch(dx_kernel, (lines + grid[0],), tile, values),
        _launch(dx_kernel, (lines,), tile, values),
        (all_slabs + 2 * batch, 2, channels),
    )


def _values(
    tile: Tile, shape: torch.Size, groups: int, film: Strides | None, activation: str
) -> tuple[Plan, tuple[int], dict[str, Any]]:
    """Plan a call on an x of a shape: its grid, and values of the kernels' parameters by name."""
    batch, channels, height, width = shape
    pixels = height * width
    division = plan(batch, channels, pixels, groups, tile.elements, tile.programs)
    grid = (batch * division.slabs * division.chunks,)
    return division, grid, {
        "pixels": pixels,
        "slabs": division.slabs,
        "slab_pixels": division.slab_pixels,
        **dict(zip(_STRIDES, film or (0,) * len(_STRIDES), strict=False)),
        "CHANNELS": channels,
        "PER_GROUP": channels // groups,
        "CHUNK_GROUPS": division.chunk_groups,
        "ROWS": division.rows,
        "WIDTH": division.width,
        "GROUPS": division.padded_groups,
        "SLABS": power_of_two(division.slabs),
        # The last tile's offsets pass the sample's end before they are masked.
        "WIDE": (pixels + division.rows) * channels + division.width >= INDEX_LIMIT,
        "STAGES": tile.stages,
        "FILM": film is not None,
        "SILU": activation == "silu",
    }  # fmt: skip


def _launch(kernel: Any, grid: tuple[int], tile: Tile, values: dict[str, Any]) -> Launch:
    """Bind all but a kernel's tensors, which come first; by position, which is quicker."""
    rest = [values[name] for name in kernel.arg_names if name in values]
    options = tile.options()
    # `kernel[grid]` without the function that it would make.
    return lambda *tensors: kernel.run(*tensors, *rest, grid=grid, warmup=False, **options)


def _contiguous(channels_last: Tensor) -> Tensor:
    plain = torch.empty_like(channels_last, memory_format=torch.contiguous_format)
    return plain.copy_(channels_last)
