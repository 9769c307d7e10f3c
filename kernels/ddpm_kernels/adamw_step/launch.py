"""Launches of the Triton functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.adamw_step.checks import check_buffers
from ddpm_kernels.adamw_step.kernels import (
    begin_kernel,
    root_kernel,
    squares_kernel,
    update_kernel,
)
from ddpm_kernels.adamw_step.tables import GRADIENT_DTYPES, divide
from ddpm_kernels.dispatch import on_device_of
from ddpm_kernels.tiles import tile_for
from ddpm_kernels.triton_shim import tl

PROGRAMS = 2048
"""Of a launch that sums squares, at most: a wave of 16 per multiprocessor on 132."""

_TYPES = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in GRADIENT_DTYPES}


def launch_gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Launch what `gradient_norm` specifies."""
    first = gradients[0]
    tile = tile_for("gradient_norm", first)
    shares, addresses = divide(gradients, None, 0, 0, tile.elements, 8, first.device)
    programs = [min(len(share.rows), PROGRAMS) for share in shares]
    total = sum(programs)
    sums = torch.empty(total, dtype=torch.float32, device=first.device)
    norm = torch.empty((), dtype=torch.float32, device=first.device)
    if total == 0:
        return norm.zero_()
    with on_device_of(first):
        for share, count, part in zip(shares, programs, sums.split(programs), strict=True):
            squares_kernel[(count,)](
                addresses,
                share.rows,
                len(share.rows),
                part,
                GRADIENT=_TYPES[share.dtype],
                ALIGNMENT=share.alignment,
                TILE=tile.elements,
                **tile.options(),
            )
        padded = 1 << (total - 1).bit_length()
        root_kernel[(1,)](sums, norm, COUNT=total, PADDED=padded, **tile.options())
    return norm


def launch_adamw_step(
    gradients: list[Tensor],
    offsets: list[int],
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: Tensor,
    shadow: Tensor | None,
    *rest: Any,
) -> None:
    """Launch what `adamw_step` specifies on float32 buffers."""
    step, learning_rate, ema_weights, gradient_scale, skip, beta1, beta2, eps, weight_decay = rest
    check_buffers(weights, exp_avg, exp_avg_sq, averages, shadow, ema_weights)
    half = 0 if shadow is None else shadow.numel()
    tile = tile_for("adamw_step", weights)
    shares, addresses = divide(
        gradients, offsets, weights.numel(), half, tile.elements, 4, weights.device
    )
    numbers = torch.empty(4, dtype=torch.float32, device=weights.device)
    with on_device_of(weights):
        begin_kernel[(1,)](
            step,
            learning_rate,
            gradient_scale,
            skip,
            numbers,
            LOG_BETA1=_log(beta1),
            LOG_BETA2=_log(beta2),
            WEIGHT_DECAY=weight_decay,
            num_warps=1,
        )
        for share in shares:
            update_kernel[(len(share.rows),)](
                addresses,
                share.rows,
                weights,
                exp_avg,
                exp_avg_sq,
                averages,
                averages.stride(0),
                shadow,
                half,
                numbers,
                ema_weights,
                skip,
                WEIGHT1=1 - beta1,
                WEIGHT2=1 - beta2,
                EPS=eps,
                AVERAGES=averages.shape[0],
                GRADIENT=_TYPES[share.dtype],
                ALIGNMENT=share.alignment,
                TILE=tile.elements,
                **tile.options(),
            )


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
