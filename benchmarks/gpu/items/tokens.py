"""What joins the branches of a transformer, beside torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from benchmarks.gpu import textbook
from benchmarks.gpu.item import Context
from benchmarks.gpu.items.operations import measure_jobs, three_ways
from benchmarks.gpu.timing import Arguments, Job, Way
from torch import Tensor

from ddpm_kernels import modulate

_DIT = ((256, 256, 384), (256, 256, 768), (64, 256, 1152))
"""Batches of DiT-S, DiT-B and DiT-XL, of 256 tokens each."""


def shapes(dry: bool) -> tuple[tuple[int, int, int], ...]:
    """Return the shapes `[B, L, C]` that are measured."""
    return ((2, 4, 8),) if dry else _DIT


def modulate_jobs(device: torch.device, shapes: Sequence[tuple[int, int, int]]) -> Iterator[Job]:
    """Must read x and y and write r and m; backward, read dr, dm, r and y and write dx and dy.

    Gate, scale and shift are slices of one product, as in a transformer's block.
    """
    for shape in shapes:
        dtype, size = torch.bfloat16, 2 * prod(shape)
        upstream = list(torch.randn(2, *shape, dtype=dtype, device=device))

        def make(
            shape: tuple[int, int, int] = shape, dtype: torch.dtype = dtype, train: bool = False
        ) -> Arguments:
            sizes = {"x": shape, "y": shape, "rows": (shape[0], 6 * shape[2])}
            return {
                name: torch.randn(one, dtype=dtype, device=device, requires_grad=train)
                for name, one in sizes.items()
            }

        def forward(function: Way, x: Tensor, y: Tensor, rows: Tensor) -> Any:
            return function(x, y, *rows.chunk(6, dim=1)[:3])

        def both(function: Way, upstream: list[Tensor] = upstream, **given: Tensor) -> object:
            results = forward(function, **given)
            return results, torch.autograd.grad(results, list(given.values()), upstream)

        def ways(of: Callable[..., object]) -> dict[str, Way]:
            found = three_ways(modulate, textbook.modulate, device)
            return {name: partial(of, way) for name, way in found.items()}

        yield Job("modulate", shape, dtype, 4 * size, make, ways(forward))
        yield Job(
            "modulate, both passes", shape, dtype, 10 * size, partial(make, train=True), ways(both)
        )


def tokens(context: Context) -> None:
    """Join a transformer's branches with `modulate`."""
    measure_jobs(context, modulate_jobs(context.device, shapes(context.dry)))
