"""What the trainer asks of an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.distributed import Ranks

Network = Callable[..., Tensor]
"""`network(x, noise_level, conditioning)` → `[B, C, H, W]`; see `networks.base.Network`."""
Averaged = Callable[[], Mapping[str, Tensor]]


class Objective(Protocol):
    """The loss of a batch. To write one, inherit this and define `__call__`.

    Everything random about a sample is a pure function of the seed and the sample's position, so a
    step's loss does not depend on which rank or micro-batch computes it. What an objective learns
    while training, if anything, is its state; it is saved with the run's.
    """

    def __call__(self, model: Network, batch: Batch) -> Tensor:
        """Per-sample loss of one batch: float32 `[B]`, differentiable in the weights.

        Args:
            model: called with the noisy images float32 `[B, C, H, W]`, the noise level `[B]`, and
                whatever `Conditions.told` says.
            batch: on any device.
        """
        ...

    def begin_step(self, step: int, averaged: Averaged) -> None:
        """Prepare for an optimizer step; all ranks call this together.

        Args:
            step: how many have been done.
            averaged: gives the averaged weights by name, whole on every rank; to be called on all
                of them or on none.
        """
        return

    def end_step(self, ranks: Ranks | None) -> None:
        """Learn from the losses since the last call, those of all ranks, which call this together.

        Args:
            ranks: collectives over all ranks; None: the step was skipped, and its losses are to be
                forgotten.
        """
        return

    def state(self) -> Mapping[str, Tensor]:
        """What the objective has learnt, the same on every rank; empty if it learns nothing."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take on a state: what `state()` gave, with other values in its tensors."""
        return
