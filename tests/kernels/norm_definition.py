"""`group_norm_silu` in float64, written out, and what it takes beside a map."""

from __future__ import annotations

from typing import Any

import torch
from tests.kernels.inputs import Arguments, of_group_norm_silu, per_pixel
from torch import Tensor

from ddpm_kernels import Moments
from ddpm_kernels.dropout import Dropout, keep_scale_of


def definition(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, eps: float, activation: str, *, skip: Tensor | None = None,
    before: Tensor | None = None, dropout: Dropout | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """The operation in float64, differentiable."""
    u = x.double() if skip is None else torch.cat([x.double(), skip.double()], dim=1)
    u = u if before is None else u + per_pixel(before.double())
    grouped = u.reshape(u.shape[0], groups, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, unbiased=False, keepdim=True)
    z = ((grouped - mean) / (variance + eps).sqrt()).reshape(u.shape)
    z = z * weight.double().reshape(-1, 1, 1) + bias.double().reshape(-1, 1, 1)
    if scale is not None and shift is not None:
        z = z * (1 + per_pixel(scale.double())) + per_pixel(shift.double())
    y = z / (1 + torch.exp(-z)) if activation == "silu" else z
    return y if dropout is None else y * keep_scale_of(y, dropout)


def with_options(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype = torch.float32,
    *,
    skip: int = 0,
    before: str = "none",
    drop: float = 0.0,
    slab: int = 0,
    **options: Any,
) -> Arguments:
    """What `group_norm_silu` takes for a map of a shape, of which the last channels are `skip`.

    `before` is "rows", "expanded" (one row for all samples) or "columns"; with a `slab`, moments of
    so many pixels are given, and of skip of one more.
    """
    arguments = of_group_norm_silu(shape, groups, dtype, **options)
    batch, channels = shape[:2]
    generator = torch.Generator().manual_seed(channels)
    whole = arguments["x"]
    arguments["x"] = whole[:, : channels - skip].contiguous()
    if skip:
        arguments["skip"] = whole[:, channels - skip :].contiguous()
    if before != "none":
        rows = torch.randn(batch, channels, generator=generator).to(dtype)
        arguments["before"] = {
            "rows": rows,
            "expanded": rows[:1].expand(batch, -1),
            "columns": rows.T.contiguous().T,
        }[before]
    if drop:
        key = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
        arguments["dropout"] = Dropout(drop, key)
    if slab:
        second = moments_of(arguments["skip"], slab + 1) if skip else None
        arguments["moments"] = moments_of(arguments["x"], slab), second
    return arguments


def moments_of(x: Tensor, slab_pixels: int) -> Moments:
    """Moments of each channel of an x `[N, C, H, W]`, of slabs of so many pixels."""
    found = []
    for slab in x.double().flatten(2).split(slab_pixels, dim=2):
        mean = slab.mean(2)
        first = mean.float()
        rest = (mean - first.double()).float()
        found.append(
            torch.stack([first, rest, (slab - mean[..., None]).square().sum(2).float()], 1)
        )
    return Moments(torch.stack(found, 1), slab_pixels)
