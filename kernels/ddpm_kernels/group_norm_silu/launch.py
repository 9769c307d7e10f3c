"""Launches of the Triton functions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.group_norm_silu.backward import combine_kernel, dx_kernel, sums_kernel
from ddpm_kernels.group_norm_silu.forward import forward_kernel, moments_kernel
from ddpm_kernels.group_norm_silu.plan import Plan, plan, power_of_two
from ddpm_kernels.tiles import Tile, tile_for
from ddpm_kernels.tiling import INDEX_LIMIT

NHWC = torch.channels_last


def launch_forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; arguments and results as in `group_norm_silu_reference`."""
    scale, shift, eps, activation = rest
    batch = x.shape[0]
    division, shapes = _division("group_norm_silu", tile_for("group_norm_silu", x), x.shape, groups)
    dense = x.contiguous(memory_format=NHWC)
    y = torch.empty_like(dense, memory_format=NHWC)
    statistics = torch.empty((batch, 3, groups), dtype=torch.float32, device=x.device)
    moments = statistics
    grid = (batch * division.slabs * division.chunks,)
    weight, bias = weight.contiguous(), bias.contiguous()
    with torch.cuda.device_of(x):
        if division.slabs > 1:
            moments = statistics.new_empty((batch, division.slabs, 3, groups))
            moments_kernel[grid](dense, moments, GROUPS=division.padded_groups, **shapes)
        forward_kernel[grid](
            x=dense,
            moments=moments,
            weight=weight,
            bias=bias,
            y=y,
            statistics=statistics,
            eps=eps,
            GROUPS=division.padded_groups,
            SLABS=power_of_two(division.slabs),
            SILU=activation == "silu",
            **_film(weight, scale, shift),
            **shapes,
        )
    return _laid_out_as(x, y), statistics


def launch_backward(
    dy: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Launch the backward pass; see `group_norm_silu_backward_reference`.

    Without scale and shift, their gradients are None. Those of weight and bias may share memory.
    """
    scale, shift, statistics, activation = rest
    batch, channels, height, width = x.shape
    operation = "group_norm_silu_backward"
    division, shapes = _division(operation, tile_for(operation, x), x.shape, groups)
    film = _film(weight, scale, shift)
    dense = x.contiguous(memory_format=NHWC)
    dx = torch.empty_like(dense, memory_format=NHWC)
    weight, bias, statistics = weight.contiguous(), bias.contiguous(), statistics.contiguous()
    tiles = {
        "dy": dy.contiguous(memory_format=NHWC),
        "x": dense,
        "weight": weight,
        "bias": bias,
        "statistics": statistics,
        "SILU": activation == "silu",
        **film,
        **shapes,
    }
    sums = statistics.new_empty((batch, division.slabs, 2, channels))
    affine = statistics.new_empty((batch, 2, channels))
    c = statistics.new_empty((batch, 2, groups))
    d_scale = d_shift = None
    if scale is not None:
        d_scale, d_shift = torch.empty_like(scale), torch.empty_like(scale)
    grid = (batch * division.slabs * division.chunks,)
    with torch.cuda.device_of(x):
        sums_kernel[grid](sums=sums, **tiles)
        combine_kernel[(batch * division.chunks,)](
            sums,
            weight,
            bias,
            film["scale"],
            statistics,
            affine,
            c,
            affine if d_scale is None else d_scale,  # not written
            affine if d_shift is None else d_shift,
            height * width,
            division.slabs,
            film["scale_row"],
            film["scale_column"],
            *((0, 0) if d_scale is None else d_scale.stride()),
            CHANNELS=channels,
            PER_GROUP=channels // groups,
            CHUNK_GROUPS=division.chunk_groups,
            WIDTH=division.width,
            GROUPS=division.padded_groups,
            SLABS=power_of_two(division.slabs),
            FILM=scale is not None,
            num_warps=shapes["num_warps"],
            enable_fp_fusion=shapes["enable_fp_fusion"],
        )
        dx_kernel[grid](c=c, dx=dx, **tiles)
    d_weight, d_bias = affine.sum(0).to(weight.dtype).unbind()
    return _laid_out_as(x, dx), d_weight, d_bias.to(bias.dtype), d_scale, d_shift


@lru_cache(maxsize=1024)
def _division(
    operation: str, tile: Tile, shape: torch.Size, groups: int
) -> tuple[Plan, dict[str, Any]]:
    """The plan of a call on an x of a shape, and what all kernels over tiles of it take."""
    batch, channels, height, width = shape
    pixels = height * width
    division = plan(batch, channels, pixels, groups, tile.elements)
    return division, {
        "pixels": pixels,
        "slabs": division.slabs,
        "slab_pixels": division.slab_pixels,
        "CHANNELS": channels,
        "PER_GROUP": channels // groups,
        "CHUNK_GROUPS": division.chunk_groups,
        "ROWS": division.rows,
        "WIDTH": division.width,
        # The last tile's offsets pass the sample's end before they are masked.
        "WIDE": (pixels + division.rows) * channels + division.width >= INDEX_LIMIT,
        **tile.options(),
    }


_NO_FILM = dict.fromkeys(("scale_row", "scale_column", "shift_row", "shift_column"), 0)


def _film(like: Tensor, scale: Tensor | None, shift: Tensor | None) -> dict[str, Any]:
    """Pointers and strides of scale and shift; `like` stands in for pointers that are not read."""
    if scale is None or shift is None:
        return {"FILM": False, "scale": like, "shift": like, **_NO_FILM}
    return {
        "FILM": True,
        "scale": scale,
        "shift": shift,
        "scale_row": scale.stride(0),
        "scale_column": scale.stride(1),
        "shift_row": shift.stride(0),
        "shift_column": shift.stride(1),
    }


def _laid_out_as(x: Tensor, channels_last: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=NHWC):
        return channels_last
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(channels_last)
