"""A run's precision, as each strategy applies it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the network's arithmetic; any other precision means that of the weights."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Compute in a precision within the block."""
    if precision in DTYPES:
        return torch.autocast(device.type, DTYPES[precision])
    return nullcontext()


def autocast_forward(model: nn.Module, precision: str, device: torch.device) -> None:
    """Let every call of a model compute in a precision, whatever surrounds the call."""
    if precision in DTYPES:
        model.forward = torch.autocast(device.type, DTYPES[precision])(model.forward)
