"""How tokens are divided among programs, and the launches of the Triton functions.

What a call launches follows from the shape of x and a few options; it is worked out once for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of
from ddpm_kernels.modulate.kernels import (
    modulate_backward_kernel,
    modulate_kernel,
    modulate_sums_kernel,
)
from ddpm_kernels.tiles import Tile, tile_for

Launch = Callable[..., None]
"""A kernel with its grid and all arguments but tensors."""
MAX_WARPS = 16
"""1024 threads on AMD, the most that a program may have."""
LINE = 128
"""Channels of a program that adds partial sums."""


def launch_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; arguments and results as in `modulate_reference`."""
    gate, scale, shift = _rows(gate), _rows(scale), _rows(shift)
    tile = tile_for("modulate", x)
    options = _options(gate, scale, shift, weight, norm, eps)
    launch = _forward_launch(tile, x.shape, options)
    dense = x.contiguous()
    r, m = x, torch.empty_like(dense)
    if y is not None:
        y, r = y.contiguous(), torch.empty_like(dense)
    weight = None if weight is None else weight.contiguous()
    with on_device_of(x):
        launch(dense, y, gate, scale, shift, weight, r, m)
    return r, m


def launch_backward(
    dr: Tensor | None,
    dm: Tensor,
    r: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Launch the backward pass; see `modulate_backward_reference`.

    Returns:
        dx and dy `[B, L, C]`, dgate, dscale and dshift `[B, C]`, dweight `[C]`; None where the
        reference returns an empty tensor.
    """
    gate, scale = _rows(gate), _rows(scale)
    weight = None if weight is None else weight.contiguous()
    tile = tile_for("modulate_backward", r)
    options = _options(gate, scale, scale, weight, norm, eps)
    launches = _backward_launches(tile, r.shape, dr is not None, options)
    dr = None if dr is None else dr.contiguous()
    dm, r = dm.contiguous(), r.contiguous()
    dx = torch.empty_like(r)
    d_scale, d_shift = (scale.new_empty(scale.shape) for _ in range(2))
    dy = d_gate = d_weight = None
    if y is not None and gate is not None:
        y = y.contiguous()
        dy, d_gate = torch.empty_like(y), gate.new_empty(gate.shape)
    partials = r.new_empty(launches.partials, dtype=torch.float32)
    if weight is not None:
        d_weight = partials.new_empty(scale.shape)
    with on_device_of(r):
        launches.pass_(dr, dm, r, y, gate, scale, weight, dx, dy, partials)
        launches.sums(partials, scale, weight, d_gate, d_scale, d_shift, d_weight)
    if weight is not None and d_weight is not None:
        d_weight = d_weight.sum(0).to(weight.dtype)
    return dx, dy, d_gate, d_scale, d_shift, d_weight


class Division(NamedTuple):
    """How the tokens of a call are divided among programs."""

    rows: int
    """Tokens of a tile, a power of two."""
    width: int
    """Channels of a tile: all of a token's, padded to a power of two."""
    block_tokens: int
    """Tokens of a program, a multiple of `rows`; the last of a sample may have fewer."""
    blocks: int
    """Programs of a sample."""
    warps: int
    """Of a program: as many elements a thread as the tile has."""


@lru_cache(maxsize=1024)
def divide(batch: int, length: int, channels: int, tile: Tile) -> Division:
    """Divide `batch` samples of `length` tokens of `channels` channels, as a tile would have it.

    Programs of more warps than the tile's are fewer, so that as many warps are under way.
    """
    width = _power_of_two(channels)
    rows = min(max(1, tile.elements // width), _power_of_two(length))
    warps = min(max(1, tile.warps * rows * width // tile.elements), MAX_WARPS)
    programs = max(1, tile.programs * tile.warps // warps)
    tiles = -(-length // rows)
    blocks = min(-(-programs // batch), tiles)
    block_tokens = -(-tiles // blocks) * rows
    return Division(rows, width, block_tokens, -(-length // block_tokens), warps)


class _Backward(NamedTuple):
    pass_: Launch
    """Writes dx and dy, and sums over the tokens of each program."""
    sums: Launch
    """Adds these of each sample."""
    partials: tuple[int, ...]
    """Shape."""


Options = tuple[tuple[str, Any], ...]
"""Values of the kernels' parameters by name."""


def _options(
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
) -> Options:
    return (
        ("gate_row", 0 if gate is None else gate.stride(0)),
        ("scale_row", scale.stride(0)),
        ("shift_row", shift.stride(0)),
        ("eps", eps),
        ("GATED", gate is not None),
        ("WEIGHTED", weight is not None),
        ("LAYER", norm == "layer"),
    )


@lru_cache(maxsize=1024)
def _forward_launch(tile: Tile, shape: torch.Size, options: Options) -> Launch:
    division, values = _values(tile, shape, options)
    return _launch(modulate_kernel, shape[0] * division.blocks, tile, division.warps, values)


@lru_cache(maxsize=1024)
def _backward_launches(
    tile: Tile, shape: torch.Size, residual: bool, options: Options
) -> _Backward:
    division, values = _values(tile, shape, options)
    batch, _, channels = shape
    programs = batch * division.blocks
    values |= {
        "RESIDUAL": residual,
        "BLOCKS": min(8, _power_of_two(division.blocks)),
        "LINE": LINE,
    }
    return _Backward(
        _launch(modulate_backward_kernel, programs, tile, division.warps, values),
        _launch(modulate_sums_kernel, batch * -(-channels // LINE), tile, 1, values),
        (programs, 3, channels),
    )


def _values(tile: Tile, shape: torch.Size, options: Options) -> tuple[Division, dict[str, Any]]:
    batch, length, channels = shape
    division = divide(batch, length, channels, tile)
    return division, {
        **dict(options),
        "length": length,
        "blocks": division.blocks,
        "block_tokens": division.block_tokens,
        "CHANNELS": channels,
        "ROWS": division.rows,
        "WIDTH": division.width,
        "STAGES": tile.stages,
    }


def _launch(kernel: Any, programs: int, tile: Tile, warps: int, values: dict[str, Any]) -> Launch:
    """Bind all but a kernel's tensors, which come first; by position, which is quicker."""
    rest = [values[name] for name in kernel.arg_names if name in values]
    options = tile._replace(warps=warps).options()
    # `kernel[grid]` without the function that it would make.
    return lambda *tensors: kernel.run(*tensors, *rest, grid=(programs,), warmup=False, **options)


def _rows(tensor: Tensor | None) -> Any:
    """Return `[B, C]` of unit column stride, which slices of a product have, or None."""
    if tensor is None or tensor.stride(1) == 1:
        return tensor
    return tensor.contiguous()


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
