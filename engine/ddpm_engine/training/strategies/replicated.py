"""Every process holds the whole state: a single process, or torch's DistributedDataParallel."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.objectives.base import Network as Predict
from ddpm_engine.runtime import autocast_forward
from ddpm_engine.training.ema import EMA, decays
from ddpm_engine.training.optimizer import make_optimizer
from ddpm_engine.training.strategies.loss_scale import LossScale
from ddpm_engine.training.strategies.strategy import State

# Flat names, so that tensors are stored one by one and can be resharded.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class TorchStrategy:
    """A torch optimizer over a network's own parameters, which may be DTensors.

    Args:
        name: name for the log.
        network: the network to call: the model, or a wrapper of it.
        model: the model itself.
        emas: its averages, distributed like it.
        config: the run.
    """

    def __init__(
        self,
        name: str,
        network: Predict,
        model: Network,
        emas: dict[str, EMA[Network]],
        config: RunConfig,
    ) -> None:
        self.name = name
        self.capturable = False
        self.network = network
        self.model = model
        self.emas = emas
        self.optimizer = make_optimizer(model, config.optimizer)
        self._accumulation = config.training.accumulation
        self._clip_norm = config.optimizer.clip_norm
        self.loss_scale = LossScale() if config.training.precision == "fp16" else None

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """See `Strategy`."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        mean = loss / self._accumulation
        (mean if self.loss_scale is None else mean * self.loss_scale.value).backward()

    def step(self, learning_rate: Tensor, ema_weights: Tensor, skip: Tensor) -> Tensor:
        """See `Strategy`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.loss_scale is not None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.loss_scale.value)
        total = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        skipped = (~norm.isfinite()).to(torch.float32).maximum(skip)
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.grad_scale = torch.ones_like(skipped)  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.update(math.isfinite(norm))
        self.optimizer.zero_grad()
        for ema, weight in zip(self.emas.values(), ema_weights * (1 - skipped), strict=True):
            ema.update(self.model, weight)
        return norm

    def close(self) -> None:
        """See `Strategy`."""

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """See `Strategy`."""
        yield self.emas["ema"].model

    def averages(self) -> State:
        """See `Strategy`."""
        return {name: _tensors(get_model_state_dict(ema.model)) for name, ema in self.emas.items()}

    def state(self) -> State:
        """See `Strategy`; the tensors are those in use."""
        return {
            "model": _tensors(get_model_state_dict(self.model)),
            **self.averages(),
            "optimizer": _tensors(self._optimizer_state()),
        }

    def load(self, state: State) -> None:
        """See `Strategy`; weights and averages are in place already."""
        optimizer_state = {**self._optimizer_state(), **state["optimizer"]}
        set_optimizer_state_dict(self.model, self.optimizer, optimizer_state, options=_FLAT)

    def _optimizer_state(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=_FLAT)


class Replicated(TorchStrategy):
    """The whole state on each process; DDP averages the gradients of several.

    Args:
        model: network on its device, the same on every rank.
        config: the run.
        accelerator: started, with any number of processes.
    """

    def __init__(self, model: Network, config: RunConfig, accelerator: Accelerator) -> None:
        emas = {name: EMA(model, decay) for name, decay in decays(config.training).items()}
        autocast_forward(model, config.training.precision, accelerator.device)
        self._parallel = None
        if accelerator.num_processes > 1:
            devices = None if accelerator.device.type == "cpu" else [accelerator.device]
            self._parallel = DistributedDataParallel(
                model,
                device_ids=devices,
                gradient_as_bucket_view=True,
            )
        super().__init__(
            "single process" if self._parallel is None else "DDP",
            self._parallel or model,
            model,
            emas,
            config,
        )
        self.capturable = True

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """See `Strategy`; gradients are exchanged with the last micro-batch."""
        return nullcontext() if last or self._parallel is None else self._parallel.no_sync()

    def close(self) -> None:
        """See `Strategy`."""
        # DDP holds the process group in reference cycles. At interpreter exit, gloo's threads would
        # wait for a lock that nobody releases, and the process would hang.
        self._parallel, self.network = None, self.model
        gc.collect()


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and not name.startswith("param_groups.")
    }
