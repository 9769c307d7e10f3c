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
`state.NAME.exp_avg_sq` and `state.NAME.step`, which may be one tensor for all names.
"""


class Strategy(Protocol):
    """How weights, averages and optimizer state are distributed over the processes.

    All ranks call every method together.
    """

    name: str
    """Name for the log."""
    loss_scale: LossScale | None
    """Loss scale of a run in fp16; a part of the training state."""
    capturable: bool
    """Whether a whole step, from the batch to the averages, may be recorded as one CUDA graph."""

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

        The averages move towards the new weights. All of it happens on the device, and the host
        reads nothing, unless the strategy says otherwise. A step whose gradients are not finite
        changes nothing but the loss scale.

        Args:
            learning_rate: 0-dim, float32 or wider.
            ema_weights: `[K]`, float32 or wider: 1 − decay of each average of `decays`, in its
                order.
            skip: 0-dim float32. Unless it is zero, nothing at all changes; gradients are cleared.

        Returns:
            The global norm of the gradients before clipping, 0-dim float32, the same on all ranks.
        """
        ...

    def averaged(self) -> AbstractContextManager[Network]:
        """Give the network with the weights of `ema`; all ranks must call it equally often.

        They may be in half precision where the run is, so it is called under its autocast.
        """
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
