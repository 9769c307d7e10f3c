"""Layers of weights, applied so that fewer passes go over their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpm_engine.networks.recipes import keeping_recipe
from ddpm_kernels.dispatch import takes_op, traces_gradients


def split_bias(layer: nn.Conv2d | nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Apply a layer without its bias, for the pass that follows to add.

    Args:
        layer: has a bias.
        x: `[B, C', H, W]` for a convolution, `[…, C']` for a linear layer.

    Returns:
        The output, with C channels, and the bias, `[C]`; or on a CPU, which adds a bias at no cost,
        the whole output and None.
    """
    with keeping_recipe(x):
        if not takes_op(x):
            return layer(x), None
        if isinstance(layer, nn.Linear):
            y = F.linear(x, layer.weight)
        else:
            y = layer._conv_forward(x, layer.weight, None)
    return y, _bias(layer, y.dtype)


def apply_together(
    layers: Sequence[nn.Linear], x: Tensor, added: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """Apply several layers to one input, on GPUs as one matrix product.

    Args:
        layers: all with biases, or all without.
        x: `[…, in]`.
        added: `[out]` for each layer, added to its output; or nothing.

    Returns:
        `[…, out]` of each layer, on GPUs as views of one tensor.
    """
    if not takes_op(x):
        with keeping_recipe(x):
            outputs = tuple(layer(x) for layer in layers)
        return tuple(y + more for y, more in zip(outputs, added, strict=True)) if added else outputs
    weight = torch.cat([layer.weight for layer in layers])
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    with keeping_recipe(x):
        y = F.linear(x, weight, bias)
    if added:
        y = y + torch.cat(list(added)).to(y.dtype)
    return y.split([layer.out_features for layer in layers], dim=-1)


def project(layer: nn.Conv2d, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a 1×1 convolution to channels that lie in several tensors, without its bias.

    Args:
        layer: a 1×1 convolution with a bias.
        inputs: `[B, C_i, H, W]` each, the sum of all C_i being what the layer takes.

    Returns:
        `[B, C, H, W]`, and the bias, `[C]`.
    """
    dtype = inputs[0].dtype
    weight = layer.weight
    if weight.shape[1] == layer.in_channels:  # by FSDP2 it is stored as [O, 1, 1, I]
        weight = weight.permute(0, 2, 3, 1)
    product = _product if traces_gradients(inputs[0]) else _apply_product
    return product(weight.flatten(1).to(dtype), *inputs), _bias(layer, dtype)


def _product(weight: Tensor, *inputs: Tensor) -> Tensor:
    """Multiply `[O, C]` with maps `[B, C_i, H, W]` as if concatenated: `[B, O, H, W]`."""
    parts = weight.split([x.shape[1] for x in inputs], dim=1)
    y = torch.mm(_rows(inputs[0]), parts[0].t())
    for x, part in zip(inputs[1:], parts[1:], strict=True):
        y = y.addmm_(_rows(x), part.t())
    return _map(y, inputs[0])


class _Product(torch.autograd.Function):
    """`_product`, of whose parts the gradients are written where they belong in the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *inputs)
        return _product(weight, *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        needs_weight, *needed = ctx.needs_input_grad
        rows, first = _rows(dy), 0
        d_weight = torch.empty_like(weight) if needs_weight else None
        gradients = []
        for x, needs in zip(inputs, needed, strict=True):
            part = slice(first, first := first + x.shape[1])
            gradients.append(_map(torch.mm(rows, weight[:, part]), x) if needs else None)
            if d_weight is not None:
                torch.mm(rows.t(), _rows(x), out=d_weight[:, part])
        return d_weight, *gradients


# Without a search for transformations, which have taken `_product` itself.
_apply_product = super(torch.autograd.Function, _Product).apply


def _rows(x: Tensor) -> Tensor:
    """From `[B, C, H, W]`, channels-last, to `[B H W, C]`."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """From `[B H W, C]` to `[B, C, H, W]`, with the pixels of `like`."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _bias(layer: nn.Conv2d | nn.Linear, dtype: torch.dtype) -> Tensor:
    """A layer's bias for whoever adds it: that of a linear layer as autocast rounds it."""
    assert layer.bias is not None
    return layer.bias.to(dtype) if isinstance(layer, nn.Linear) else layer.bias
