"""Moving averages of the weights: what is sampled from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddpm_engine.checkpoints.power_ema import gamma_of, part_of, power_decay
from ddpm_engine.config import TrainingConfig

ModelT = TypeVar("ModelT", bound=nn.Module)

Decay = Callable[[int], float]
"""From the number of updates done before to the share of the average that the next one keeps."""


def warmed_up(decay: float) -> Decay:
    """An exponential average that forgets faster at first: min(decay, (1 + n) / (10 + n)).

    So that the random initialisation does not linger.
    """
    return lambda updates: min(decay, (1 + updates) / (10 + updates))


def decays(training: TrainingConfig) -> dict[str, Decay]:
    """Every average that a run keeps, by its part of a checkpoint: `ema`, and `ema-LENGTH` each."""
    profiles = {part_of(length): power_decay(gamma_of(length)) for length in training.ema_sigma_rel}
    return {"ema": warmed_up(training.ema_decay), **profiles}


class EMA(Generic[ModelT]):
    """Keeps `model`, a copy of a network whose parameters trail the original's.

    Buffers are copied, never averaged. The copy may be sharded, in the same way as the network:
    each rank averages its own shards.

    Args:
        model: copied.
        decay: how much of the average each update keeps.
    """

    def __init__(self, model: ModelT, decay: Decay) -> None:
        self.model: ModelT = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move towards `model` once; `updates` is how many times that has been done before."""
        move_towards(
            _local(self.model.parameters()), _local(model.parameters()), self.decay(updates)
        )
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


@torch.no_grad()
def move_towards(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Update averages in place: a ← d·a + (1 − d)·v.

    Args:
        averages: of any shapes.
        values: of the same shapes and dtypes.
        decay: d in [0, 1].
    """
    torch._foreach_lerp_(averages, values, weight=1 - decay)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of each tensor is on this rank."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
