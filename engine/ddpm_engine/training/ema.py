"""Moving averages of the weights, which samples are generated from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddpm_engine.checkpoints.power_ema import gamma_from_sigma_rel, part_of, power_decay
from ddpm_engine.config import TrainingConfig

ModelT = TypeVar("ModelT", bound=nn.Module)

Decay = Callable[[int], float]
"""Decay of the next update, in [0, 1], as a function of the number of updates done before."""


def warmed_up(decay: float) -> Decay:
    """Exponential decay with a warm-up, min(decay, (1 + n) / (10 + n)) after n updates.

    Without it the random initialisation would linger in the average.
    """
    return lambda updates: min(decay, (1 + updates) / (10 + updates))


def decays(training: TrainingConfig) -> dict[str, Decay]:
    """Decay of every average that a run keeps, by part of a checkpoint (`ema`, `ema-0.1`, ...)."""
    profiles = {
        part_of(sigma_rel): power_decay(gamma_from_sigma_rel(sigma_rel))
        for sigma_rel in training.ema_sigma_rel
    }
    return {"ema": warmed_up(training.ema_decay), **profiles}


class EMA(Generic[ModelT]):
    """A copy of a network whose parameters are moving averages of the original's.

    Buffers are copied, never averaged. The copy may be sharded in the same way as the network: each
    rank averages its own shards.

    Args:
        model: network to copy.
        decay: share of the average that each update keeps.
    """

    def __init__(self, model: ModelT, decay: Decay) -> None:
        self.model: ModelT = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, weight: Tensor) -> None:
        """Move towards `model` once, by a weight on the device."""
        for ours, theirs in zip(
            _local(self.model.parameters()), _local(model.parameters()), strict=True
        ):
            ours.lerp_(theirs, weight.to(ours.dtype))
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


@torch.no_grad()
def move_towards(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Update averages in place: a ← d·a + (1 − d)·v.

    Args:
        averages: tensors of any shapes.
        values: tensors of the same shapes and dtypes.
        decay: d in [0, 1].
    """
    torch._foreach_lerp_(averages, values, weight=1 - decay)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shard of each tensor."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
