"""The registered operations of `group_norm_silu`, their gradients, and both without a dispatcher.

Their arguments are those of the references, one by one: an operation takes no tuples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddpm_kernels.dispatch import differentiable, runs_triton, skips_dispatcher
from ddpm_kernels.group_norm_silu.launch_backward import launch_backward
from ddpm_kernels.group_norm_silu.launch_forward import launch_forward
from ddpm_kernels.group_norm_silu.reference import (
    compute_dtype,
    group_norm_silu_backward_reference,
    group_norm_silu_reference,
    memory_format_of,
)


def _takes_kernel(x: Tensor) -> bool:
    return runs_triton(x) and x.dtype != torch.float64 and x.numel() > 0


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if _takes_kernel(x):
        return launch_forward(x, *rest)
    y, statistics = group_norm_silu_reference(x, *rest)
    return y.contiguous(memory_format=memory_format_of(x)), statistics


def _backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    run = launch_backward if _takes_kernel(x) else group_norm_silu_backward_reference
    return run(dy, x, *rest)


def _backward_of_op(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The same with empty tensors for None, which an operation cannot return."""
    gradients = _backward(dy, *rest)
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in gradients)


_op = torch.library.custom_op(
    "ddpm::group_norm_silu",
    _forward,
    mutates_args=(),
    schema=torch.library.infer_schema(group_norm_silu_reference, mutates_args=()),
)
_backward_op = torch.library.custom_op(
    "ddpm::group_norm_silu_backward",
    _backward_of_op,
    mutates_args=(),
    schema=torch.library.infer_schema(group_norm_silu_backward_reference, mutates_args=()),
)


@_op.register_fake
def _(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, eps: float, activation: str, skip: Tensor | None = None, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, channels, height, width = x.shape
    channels += 0 if skip is None else skip.shape[1]
    y = torch.empty(
        (batch, channels, height, width),
        dtype=x.dtype, device=x.device, memory_format=memory_format_of(x),
    )  # fmt: skip
    return y, x.new_empty((batch, 3, groups), dtype=compute_dtype(x))


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, statistics: Tensor, activation: str, needs_dx: bool = True,
    skip: Tensor | None = None, before: Tensor | None = None, dropout_key: Tensor | None = None,
    dropout_probability: float = 0.0, residual: Tensor | None = None,
    skip_residual: Tensor | None = None, owes: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    def nothing() -> Tensor:
        return x.new_empty(0)

    def map_like(like: Tensor | None) -> Tensor:
        if like is None or not needs_dx:
            return nothing()
        return torch.empty_like(like, memory_format=memory_format_of(like))

    return (
        map_like(x),
        torch.empty_like(weight),
        torch.empty_like(bias),
        nothing() if scale is None else torch.empty_like(scale),
        nothing() if scale is None else torch.empty_like(scale),
        map_like(skip),
        nothing() if before is None else before.new_empty(before.shape),
        x.new_empty(dy.shape[1], dtype=compute_dtype(x)) if owes else nothing(),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, scale, shift, _, ctx.activation, *options = inputs
    skip, before, key, ctx.probability = options[:4] or (None, None, None, 0.0)
    _, statistics = output
    ctx.save_for_backward(x, weight, bias, scale, shift, statistics, skip, before, key)


def _differentiate(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients, _ = _gradients(ctx, dy, None, None, ctx.needs_input_grad, owes=False)
    return gradients


def _gradients(
    ctx: Any, dy: Tensor | None, residual: Tensor | None, skip_residual: Tensor | None,
    needs: tuple[bool, ...], owes: bool,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:  # fmt: skip
    """Of the operation's arguments, those that were left out having none; and of owed biases."""
    if dy is None:
        return (residual, *(None,) * 7, skip_residual, *(None,) * 7), None
    x, weight, bias, scale, shift, statistics, skip, before, key = ctx.saved_tensors
    needs_dx = needs[0] or (skip is not None and needs[8])
    arguments: tuple[Any, ...] = (
        dy, x, ctx.groups, weight, bias, scale, shift, statistics, ctx.activation, needs_dx
    )  # fmt: skip
    if owes or not (skip is before is key is residual is skip_residual is None):
        arguments += (skip, before, key, ctx.probability, residual, skip_residual, owes)
    call = _backward if skips_dispatcher(dy) else torch.ops.ddpm.group_norm_silu_backward.default
    dx, d_weight, d_bias, d_scale, d_shift, d_skip, d_before, d_owed = call(*arguments)
    if not needs_dx:
        dx = d_skip = None
    if scale is None:
        d_scale = d_shift = None
    return (
        dx, None, d_weight, d_bias, d_scale, d_shift, None, None,
        None if skip is None else d_skip, None if before is None else d_before, *(None,) * 6,
    ), d_owed  # fmt: skip


without_dispatcher = differentiable(_op, _forward, _save, _differentiate)
"""The operation as a function of the same arguments that returns y alone."""


class _WithResidual(torch.autograd.Function):
    """y, and x and skip, whose own gradients are added where theirs from y are written."""

    @staticmethod
    def forward(
        ctx: Any, owed: Tensor | None, skip_owed: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, skip = arguments[0], arguments[8] if len(arguments) > 8 else None
        run = _forward if skips_dispatcher(x) else torch.ops.ddpm.group_norm_silu.default
        output = run(*arguments)
        ctx.set_materialize_grads(False)
        _save(ctx, arguments, output)
        ctx.channels = x.shape[1]
        ctx.owed = tuple(None if bias is None else bias.dtype for bias in (owed, skip_owed))
        return output[0], x, skip

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, residual: Tensor | None, skip_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Gradients are enabled where a graph of the backward pass is wanted.
        call = _refuse_twice if torch.is_grad_enabled() else _gradients_with_residual
        return call(ctx, dy, residual, skip_residual)


def _gradients_with_residual(
    ctx: Any, dy: Tensor | None, residual: Tensor | None, skip_residual: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs_owed, needs_skip_owed, *needs = ctx.needs_input_grad
    owes = needs_owed or needs_skip_owed
    gradients, sums = _gradients(ctx, dy, residual, skip_residual, tuple(needs), owes)
    channels, (dtype, skip_dtype) = ctx.channels, ctx.owed
    d_owed = d_skip_owed = None
    if needs_owed:
        d_owed = _owed(dtype, residual, None if sums is None else sums[:channels])
    if needs_skip_owed:
        d_skip_owed = _owed(skip_dtype, skip_residual, None if sums is None else sums[channels:])
    return d_owed, d_skip_owed, *gradients


def _owed(dtype: torch.dtype, residual: Tensor | None, sums: Tensor | None) -> Tensor | None:
    """The gradient of a bias in its dtype; there are no `sums` where y has no gradient."""
    if sums is None and residual is not None:
        sums = residual.sum((0, 2, 3))
    return None if sums is None else sums.to(dtype)


_refuse_twice = once_differentiable(_gradients_with_residual)

# `apply` itself first looks for functorch, which does not come here.
with_residual = super(torch.autograd.Function, _WithResidual).apply
"""The same that returns y, x and skip; before its arguments come the biases that x and skip owe."""
