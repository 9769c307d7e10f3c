"""What training asks of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.distributed import Ranks

Network = Callable[..., Tensor]
"""`network(x, noise_level, conditioning)` → `[B, C, H, W]`; see `networks.base.Network`."""
Averaged = Callable[[], Mapping[str, Tensor]]
"""Returns the averaged weights by name, whole on every rank; a collective operation."""


class Objective(ABC):
    """The loss of a batch. To write one, inherit this and define `__call__`.

    Everything random about a sample is a pure function of the seed and the sample's position, so
    its loss does not depend on which rank or micro-batch computes it. `inputs.TrainingInputs` makes
    the choices that all objectives share. What an objective learns while training, if anything, is
    its state, which is saved with the run's.
    """

    learns_on_host: bool = False
    """Whether the host has to know how a step went before the next begins, which then waits for it:
    `end_step` is called only if so."""

    @abstractmethod
    def __call__(self, network: Network, batch: Batch) -> Tensor:
        """Compute the loss of each sample: float32 `[B]`, differentiable in the weights.

        Args:
            network: called with noisy images float32 `[B, C, H, W]`, their noise levels `[B]` and a
                `Conditioning`.
            batch: on any device.
        """

    def begin_step(self, step: int, averaged: Averaged) -> bool:
        """Prepare for an optimizer step; all ranks call this together.

        Args:
            step: number of optimizer steps done.
            averaged: to be called on all ranks or on none.

        Returns:
            Whether losses are computed otherwise from now on than by the values in the tensors that
            they were computed from before: a captured step has to be captured again.
        """
        return False

    def end_step(self, ranks: Ranks | None) -> None:
        """Learn from the losses of all ranks since the last call; all ranks call this together.

        Called after every step if `learns_on_host`.

        Args:
            ranks: collectives over all ranks; None: the step was skipped, and its losses are to be
                forgotten.
        """
        return

    def state(self) -> Mapping[str, Tensor]:
        """Return what the objective has learnt, the same on every rank; empty if nothing."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state: what `state()` returned, with other values in its tensors."""
        return
