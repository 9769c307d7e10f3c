"""What both passes' launches share: values of the kernels' parameters, and binding them.

What a call launches follows from the shapes of x and skip and a few options; it is worked out once
for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dropout import Dropout
from ddpm_kernels.group_norm_silu.plan import Plan, power_of_two
from ddpm_kernels.tiling import INDEX_LIMIT

NHWC = torch.channels_last
Launch = Callable[..., None]
"""A kernel with its grid and all arguments but tensors."""
Strides = tuple[int, ...]
_STRIDES = (
    "scale_row", "scale_column", "shift_row", "shift_column", "d_scale_row", "d_scale_column"
)  # fmt: skip
MOST_WARPS = 16
"""Of 64 threads, as many as AMD allows a program."""


class Variant(NamedTuple):
    """What a call has besides x, weight and bias: all that a launch depends on but shapes."""

    activation: str
    film: Strides | None = None
    """Row and column strides of scale, of shift and, in the backward pass, of their gradients."""
    skip: int = 0
    """Channels of skip."""
    before: Strides | None = None
    """Row and column strides."""
    threshold: int = 0
    """`Dropout.threshold`; 0 where nothing is dropped."""


def values_of(division: Plan, shape: torch.Size, groups: int, variant: Variant) -> dict[str, Any]:
    """Values of the kernels' parameters by name, for an x of a shape `[N, C₁, H, W]`."""
    _, own, height, width = shape
    pixels, channels = height * width, own + variant.skip
    before_row, before_column = variant.before or (0, 0)
    return {
        "pixels": pixels,
        "slabs": division.slabs,
        "slab_pixels": division.slab_pixels,
        **dict(zip(_STRIDES, variant.film or (0,) * len(_STRIDES), strict=False)),
        "before_row": before_row,
        "before_column": before_column,
        "CHANNELS": channels,
        "SKIP": variant.skip,
        "PER_GROUP": channels // groups,
        "CHUNK_GROUPS": division.chunk_groups,
        "ROWS": division.rows,
        "WIDTH": division.width,
        "GROUPS": division.padded_groups,
        "SLABS": power_of_two(division.slabs),
        "ON_CHIP": division.on_chip,
        # The last tile's offsets pass the sample's end before they are masked.
        "WIDE": (pixels + division.rows) * channels + division.width >= INDEX_LIMIT,
        "FILM": variant.film is not None,
        "BEFORE": variant.before is not None,
        "SILU": variant.activation == "silu",
        "THRESHOLD": variant.threshold,
    }


def bind(
    kernel: Any, grid: tuple[int], values: dict[str, Any], options: dict[str, int | bool]
) -> Launch:
    """Bind all but a kernel's tensors, which come first; by position, which is quicker."""
    rest = [values[name] for name in kernel.arg_names if name in values]
    # `kernel[grid]` without the function that it would make.
    return lambda *tensors: kernel.run(*tensors, *rest, grid=grid, warmup=False, **options)


def warps_on_chip(division: Plan, elements: int) -> int:
    """Warps of a program that keeps a tile, of so many elements each."""
    return max(1, min(MOST_WARPS, division.rows * division.width // elements))


def dropped(key: Tensor | None, probability: float) -> int:
    """`Dropout.threshold`; 0 without a key `[N]`."""
    return 0 if key is None else Dropout(probability, key).threshold


def in_nchw(channels_last: Tensor) -> Tensor:
    """Lay a map `[N, C, H, W]` out contiguously."""
    plain = torch.empty_like(channels_last, memory_format=torch.contiguous_format)
    return plain.copy_(channels_last)
