"""GroupNorm with what is fused with it, and the residual sum, beside torch's own operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.gpu import textbook
from benchmarks.gpu.item import Context
from benchmarks.gpu.items.operations import Shapes, measure_jobs, three_ways
from benchmarks.gpu.networks import NormCall, heaviest_norms
from benchmarks.gpu.timing import Arguments, Job, Way, compiled, normals
from torch import Tensor

from ddpm_kernels import group_norm_silu, group_norm_silu_residual, residual_sum
from ddpm_kernels.dropout import Dropout
from ddpm_kernels.group_norm_silu.plan import fits_on_chip


def arguments(
    call: NormCall, device: torch.device, leaves: bool, dtype: torch.dtype = torch.bfloat16
) -> Arguments:
    """Make the tensors of a call, those of float32 weights and of activations in `dtype`.

    Args:
        call: of a network.
        device: of the tensors.
        leaves: whether gradients are wanted.
        dtype: of the maps.
    """
    batch, channels, height, width = call.shape
    given: Arguments = {"x": normals((batch, channels - call.skip, height, width), dtype, device)}
    if call.skip:
        given["skip"] = normals((batch, call.skip, height, width), dtype, device)
    else:
        given["nchw"] = given["x"].contiguous()
    if call.before:
        given["before"] = torch.randn(batch, channels, dtype=dtype, device=device)
    given["weight"], given["bias"] = (torch.randn(channels, device=device) for _ in range(2))
    moments = [
        residual_sum(given[name], torch.zeros_like(given[name]))[1] if call.kept else None
        for name in ("x", "skip") if name in given
    ]  # fmt: skip
    given = {name: value.requires_grad_(leaves) for name, value in given.items()}
    return {**given, "moments": (*moments, None)[:2]}


def engine(call: NormCall, device: torch.device, residual: bool = False) -> Way:
    """Return a call of the operation; with `residual`, of the one that hands its inputs on."""
    key = torch.arange(call.shape[0], device=device)
    dropout = Dropout(call.dropout, key) if call.dropout else None
    function: Any = group_norm_silu_residual if residual else group_norm_silu

    def way(x: Tensor, weight: Tensor, bias: Tensor, nchw: object = None, **options: Any) -> object:
        return function(
            x, call.groups, weight, bias, eps=call.eps, activation=call.activation,
            dropout=dropout, **options,
        )  # fmt: skip

    return way


def of_torch(call: NormCall) -> Way:
    """Return the same call as a textbook makes it, with another mask of dropout."""

    def way(
        x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None = None,
        before: Tensor | None = None, **_: object,
    ) -> Tensor:  # fmt: skip
        x = x if skip is None else torch.cat([x, skip], dim=1)
        x = x if before is None else x + before[:, :, None, None]
        y = textbook.group_norm_silu(x, call.groups, weight, bias, call.eps, call.activation)
        return F.dropout(y, call.dropout) if call.dropout else y

    return way


def in_nchw(way: Way) -> Way:
    """Return the same in torch's own layout."""

    def other(x: Tensor, nchw: Tensor, **given: Any) -> object:
        return way(x=nchw, **given)

    return other


def with_inputs(way: Way) -> Way:
    """Return the same, which hands its inputs on as they are: autograd adds up their gradients."""

    def both(**given: Any) -> object:
        return way(**given), given["x"], given.get("skip")

    return both


def gradients(way: Way, **given: Any) -> object:
    """Return y, and the gradients where that of every output, maps handed on included, is one."""
    outputs: Any = way(**given)
    outputs = [output for output in outputs if output is not None]
    leaves = [value for value in given.values() if isinstance(value, Tensor)]
    ones = [torch.ones_like(output) for output in outputs]
    # Of the two layouts of x each way uses one.
    return outputs[0], torch.autograd.grad(outputs, leaves, ones, allow_unused=True)


def norm_jobs(device: torch.device, calls: Sequence[NormCall]) -> Iterator[Job]:
    """Must read the maps and write y; backward, read these, dy and a residual's, and write dx.

    Weights are float32, activations bfloat16, as in mixed precision.
    """
    for call in calls:
        plain = of_torch(call)
        theirs: dict[str, Way] = {"torch, NHWC": plain, "inductor": compiled(plain, device)}
        if not call.skip:
            theirs["torch, NCHW"] = in_nchw(plain)
        handing_on = {"engine": engine(call, device, residual=True)}
        handing_on |= {name: with_inputs(way) for name, way in theirs.items()}
        name, maps = f"group_norm_silu{call.options}", 2 * prod(call.shape)
        yield Job(
            name, call.shape, torch.bfloat16, 2 * maps, partial(arguments, call, device, False),
            {"engine": engine(call, device), **theirs},
        )  # fmt: skip
        yield Job(
            f"{name}, both passes", call.shape, torch.bfloat16, 6 * maps,
            partial(arguments, call, device, True),
            {name: partial(gradients, way) for name, way in handing_on.items()},
        )  # fmt: skip


def residual_sum_jobs(device: torch.device, shapes: Shapes) -> Iterator[Job]:
    """Must read both branches and write their sum, whose moments the textbook reads it for."""
    for shape in shapes:
        dtype, size = torch.bfloat16, 2 * prod(shape)
        bias = torch.randn(shape[1], dtype=dtype, device=device)

        def make(shape: tuple[int, ...] = shape, bias: Tensor = bias) -> Arguments:
            h, x = (normals(shape, torch.bfloat16, device) for _ in range(2))
            return {"h": h, "x": x, "bias": bias}

        def theirs(h: Tensor, x: Tensor, bias: Tensor) -> object:
            y = x + (h + bias[:, None, None])
            return y, torch.var_mean(y, (2, 3))

        yield Job(
            "residual_sum", shape, dtype, 3 * size, make, three_ways(residual_sum, theirs, device)
        )


def norms(context: Context) -> None:
    """Compare GroupNorm with SiLU at the shapes where networks move most bytes through it.

    And, at those that do not fit on chip, the residual sum that takes its moments.
    """
    calls = heaviest_norms(context.dry)
    measure_jobs(context, norm_jobs(context.device, calls))
    large = dict.fromkeys(c.shape for c in calls if not fits_on_chip(prod(c.shape[2:])))
    shapes: Shapes = ((2, 16, 40, 40),) if context.dry else tuple(large)
    measure_jobs(context, residual_sum_jobs(context.device, shapes))
