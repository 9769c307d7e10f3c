"""Exponential moving average of the weights: what is sampled from."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ModelT = TypeVar("ModelT", bound=nn.Module)


class EMA(Generic[ModelT]):
    """Keeps `model`, a copy of a network whose parameters trail the original's.

    Early on the average forgets faster, so that the random initialisation does not linger: the
    decay of update n is min(decay, (1 + n) / (10 + n)). Buffers are copied, never averaged. The
    copy may be sharded, in the same way as the network: each rank averages its own shards.
    """

    def __init__(self, model: ModelT, decay: float) -> None:
        self.model: ModelT = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move towards `model` once; `updates` is how many times that has been done before."""
        move_towards(
            _local(self.model.parameters()), _local(model.parameters()), self.decay, updates
        )
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


@torch.no_grad()
def move_towards(averages: list[Tensor], values: list[Tensor], decay: float, updates: int) -> None:
    """Update averages in place: a ← d·a + (1 − d)·v, d = min(decay, (1 + n) / (10 + n)).

    Args:
        averages: of any shapes.
        values: of the same shapes and dtypes.
        decay: d in the long run, in [0, 1).
        updates: n, how many times that has been done before.
    """
    torch._foreach_lerp_(averages, values, weight=1 - min(decay, (1 + updates) / (10 + updates)))


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of each tensor is on this rank."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
