"""Weights in half precision, so that autocast has nothing to convert."""

from __future__ import annotations

import torch
from torch import nn


def half_names(model: nn.Module) -> list[str]:
    """Name the parameters that autocast would convert at each use.

    They are those of convolutions and linear layers. Norms and embeddings are used as they are.
    """
    return [
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        for name, _ in module.named_parameters(recurse=False)
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
