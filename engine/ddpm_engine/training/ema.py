"""Exponential moving average of the weights: what is sampled from."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


class EMA(Generic[ModelT]):
    """Keeps `model`, a copy of a network whose parameters trail the original's.

    Early on the average forgets faster, so that the random initialisation does not linger: the
    decay of update n is min(decay, (1 + n) / (10 + n)). Buffers are copied, never averaged.
    """

    def __init__(self, model: ModelT, decay: float) -> None:
        self.model: ModelT = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move towards `model` once; `updates` is how many times that has been done before."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(
            list(self.model.parameters()), list(model.parameters()), weight=1 - decay
        )
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
