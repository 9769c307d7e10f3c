"""Every process holds the whole state: a single process, or several that share the batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.objectives.base import Network as Predict
from ddpm_engine.runtime import DTYPES, autocast_forward
from ddpm_engine.training.ema import decays
from ddpm_engine.training.strategies.flat_optimizer import FlatOptimizer
from ddpm_engine.training.strategies.flat_state import FlatState
from ddpm_engine.training.strategies.gradients import Gradients, LocalGradients, SummedGradients
from ddpm_engine.training.strategies.loss_scale import LossScale, backward
from ddpm_engine.training.strategies.strategy import State


class Replicated:
    """The whole state on each process, in flat buffers; several average their gradients.

    Args:
        model: network on its device, the same on every rank.
        config: the run.
        device: device of the network.
        ranks: number of processes; of several, the process group is started.
    """

    capturable = True

    def __init__(
        self, model: Network, config: RunConfig, device: torch.device, ranks: int = 1
    ) -> None:
        training = config.training
        self.name = "single process" if ranks == 1 else "DDP"
        self.model = model
        self.loss_scale = LossScale(device) if training.precision == "fp16" else None
        # Its parameters become views of the first average.
        self._averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self._state = FlatState(model, decays(training), DTYPES.get(training.precision))
        self._state.bind(self._averaged, self._state.averages[0], None)
        if ranks > 1:
            self._state.broadcast()
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        autocast_forward(model, training.precision, device)
        self._accumulation, self._ranks = training.accumulation, ranks
        self._gradients: Gradients = (
            LocalGradients(model, self._state)
            if ranks * training.accumulation == 1
            else SummedGradients(model, self._state, ranks)
        )
        self._optimizer = FlatOptimizer(self._state, config.optimizer, self._gradients.whole)

    @property
    def network(self) -> Predict:
        """See `Strategy`."""
        return self.model

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """See `Strategy`; ranks exchange gradients during the last backward pass."""
        return self._gradients.accumulate(last)

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        backward(loss, self._accumulation, self.loss_scale)

    @torch.no_grad()
    def step(self, learning_rate: Tensor, ema_weights: Tensor, skip: Tensor) -> Tensor:
        """See `Strategy`."""
        # Gradients are sums over ranks; only what the optimizer divides by knows how many.
        divisor = self._ranks if self.loss_scale is None else self.loss_scale.value * self._ranks
        clipping = self._optimizer.update(
            self._gradients.take(), divisor, learning_rate, ema_weights, skip
        )
        self._gradients.clear()
        if self.loss_scale is not None:
            self.loss_scale.update(clipping.finite, skip)
        return clipping.norm.float()

    def close(self) -> None:
        """See `Strategy`."""
        self._gradients.close()

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """See `Strategy`; in half precision, weights are rounded once, and autocast is needed."""
        average = self._state.averages[0]
        self._state.bind(self._averaged, average, self._state.halved(average))
        self._copy_buffers()
        try:
            yield self._averaged
        finally:
            self._state.bind(self._averaged, average, None)

    def averages(self) -> State:
        """See `Strategy`."""
        named = self._state.named_averages()
        return {name: self._with_buffers(average) for name, average in named.items()}

    def state(self) -> State:
        """See `Strategy`; the tensors are those in use."""
        return {
            "model": self._with_buffers(self._state.views(self._state.weights)),
            **self.averages(),
            "optimizer": self._state.optimizer_state(),
        }

    def load(self, state: State) -> None:
        """See `Strategy`; weights, moments and averages are in place already."""
        self._state.load_step(state["optimizer"])
        self._state.refresh()

    def _with_buffers(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the network's own buffers, which averages share: nothing is averaged in them."""
        return {n: parameters.get(n, tensor) for n, tensor in self.model.state_dict().items()}

    def _copy_buffers(self) -> None:
        for ours, theirs in zip(self._averaged.buffers(), self.model.buffers(), strict=True):
            ours.copy_(theirs)
