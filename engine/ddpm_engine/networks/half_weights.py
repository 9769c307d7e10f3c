"""Weights in half precision, so that autocast has nothing to convert."""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


def half_names(model: nn.Module) -> list[str]:
    """Name the parameters that autocast would convert at each use.

    They are those of convolutions and linear layers. Norms and embeddings are used as they are, and
    so are biases of convolutions, which the pass that follows adds in float32.
    """
    return [
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, nn.Linear) or name == "weight"
    ]


def to_half(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert those parameters for good, for a model that is not trained; autocast stays needed.

    Args:
        model: changed in place. Its outputs under autocast to `dtype` stay the same to the bit.
        dtype: bfloat16 or float16.
    """
    for name in half_names(model):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)


def in_half(network: T, dtype: torch.dtype | None) -> T:
    """Return a network with those parameters converted, for one that others go on using.

    Args:
        network: stays as it is. What is no module, or has nothing to convert, is returned itself.
        dtype: bfloat16 or float16; None: convert nothing.

    Returns:
        A network that shares all other tensors with it.
    """
    if dtype is None or not isinstance(network, nn.Module):
        return network
    wide = [network.get_parameter(name) for name in half_names(network)]
    wide = [parameter for parameter in wide if parameter.dtype != dtype]
    if not wide:
        return network
    # Tensors that deepcopy believes to have copied.
    memo = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    memo |= {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in wide}
    copied = deepcopy(network, memo)
    for original, module in zip(network.modules(), copied.modules(), strict=True):
        if original._compiled_call_impl is not None:  # which a copy loses
            module.compile(dynamic=False)
    return copied
