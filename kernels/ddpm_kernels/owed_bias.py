"""A bias that was added without autograd's knowledge, and is owed its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_kernels.dispatch import traces_gradients


def owe(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x`, which already contains `bias`, so that the bias gets its gradient.

    That is the sum of the gradient of x over samples and pixels: one pass. Where a norm follows,
    `group_norm_silu_residual` sums it in the kernel that writes the gradient.

    Args:
        x: `[N, C, H, W]`.
        bias: `[C]`; None where none is owed anything.

    Returns:
        x, as a view `[N, C, H, W]`.
    """
    if bias is None or not bias.requires_grad:
        return x
    return (_Owe.apply if traces_gradients(x) else _apply)(x, bias)


class _Owe(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum((0, 2, 3), dtype=ctx.dtype)


# `Function.apply` itself first looks for transformations, which takes longer than all else here.
_apply = super(torch.autograd.Function, _Owe).apply
