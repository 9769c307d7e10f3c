"""What training asks of a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from ddpm_engine.networks.base import Network
from ddpm_engine.objectives.base import Network as Predict
from ddpm_engine.training.strategies.loss_scale import LossScale

State = Mapping[str, Mapping[str, Any]]
"""Tensors and DTensors by part of a checkpoint and name, the same in all strategies.

The parts are `model`, `optimizer` and the averages of `decays`.

Names are those of `Network.named_parameters()`; the optimizer's are `state.NAME.exp_avg`,
`state.NAME.exp_avg_sq` and `state.NAME.step`.
"""


class Strategy(Protocol):
    """How weights, averages and optimizer state are distributed over the processes.

    All ranks call every method together.
    """

    name: str
    """Name for the log."""
    capturable: bool
    """Whether a whole step may be captured as one CUDA graph."""
    loss_scale: LossScale | None
    """Loss scale of a run in fp16; a part of the training state."""

    @property
    def network(self) -> Predict:
        """The network to call while training: the model, or a wrapper of it."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Enclose the forward and backward pass of one micro-batch.

        Args:
            last: whether the micro-batch completes the step, so that gradients are exchanged.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch to those of the step, inside `accumulate`.

        Args:
            loss: mean loss of this rank's micro-batch, 0-dim.
        """
        ...

    def step(self, learning_rate: Tensor, ema_weights: Tensor, skip: Tensor) -> Tensor:
        """Average the gradients over micro-batches and ranks, clip them, step, and clear them.

        Args:
            learning_rate: 0-dim float32 on the device.
            ema_weights: float32 `[K]` on the device: 1 − decay of each average.
            skip: 0-dim float32 on the device: if not zero, nothing changes.

        Returns:
            The global gradient norm before clipping, 0-dim on the device, the same on all ranks. If
            it is not finite, nothing has changed.
        """
        ...

    def averaged(self) -> AbstractContextManager[Network]:
        """Give the network with the weights of `ema`; all ranks must call it equally often."""
        ...

    def averages(self) -> State:
        """Return those parts of `state()` that are averages of the weights."""
        ...

    def state(self) -> State:
        """Return the training state, in float32 unless the network is wider.

        Sharded tensors are DTensors, so that no rank holds a whole copy. Optimizer state that does
        not exist yet is zero.
        """
        ...

    def load(self, state: State) -> None:
        """Restore a training state: what `state()` returned, with other values in its tensors."""
        ...

    def close(self) -> None:
        """Release the process group; a sharded state is lost."""
        ...
