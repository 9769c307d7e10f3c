"""Shard weights, gradients, optimizer state and averages over the processes: torch's FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.objectives.base import Network as Predict
from ddpm_engine.runtime import DTYPES
from ddpm_engine.training.ema import decays, move_towards
from ddpm_engine.training.optimizer import AdamW, Clipping
from ddpm_engine.training.strategies.loss_scale import LossScale
from ddpm_engine.training.strategies.strategy import State


def make_contiguous(model: Network) -> None:
    """Make all weights contiguous, whatever memory format suits the device."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


def shard_network(
    model: Network, mesh: DeviceMesh, precision: str = "no", reshard_after_forward: bool = True
) -> None:
    """Turn a network's parameters into DTensors that are gathered while a block needs them.

    Args:
        model: network on its device, the same on every rank; changed in place.
        mesh: one-dimensional mesh.
        precision: precision of gathered weights; reductions over ranks are float32 or wider.
        reshard_after_forward: free a block's weights between forward and backward pass. Otherwise
            they are kept for the backward pass, which takes memory and saves a second gather.
    """
    make_contiguous(model)  # fully_shard needs it; activations keep their format
    policy = MixedPrecisionPolicy()
    if precision in DTYPES:
        policy = MixedPrecisionPolicy(DTYPES[precision], torch.float32)
    for block in [*model.blocks(), model]:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)


class FullySharded:
    """FSDP2 by torch itself, since Accelerate's plug-in silently shards nothing on CPUs.

    Gradients are reduced with every micro-batch: accumulated unsharded until the last one, they
    would take the memory that sharding saves.

    Args:
        model: network on its device, the same on every rank.
        config: the run.
        accelerator: started.
        mesh: one-dimensional mesh of all processes.
        reshard_after_forward: as in `shard_network`.
    """

    name = "FSDP2"
    capturable = False

    def __init__(
        self,
        model: Network,
        config: RunConfig,
        accelerator: Accelerator,
        mesh: DeviceMesh,
        reshard_after_forward: bool = True,
    ) -> None:
        training = config.training
        self.model = model
        self._averaged = copy.deepcopy(model).eval().requires_grad_(False)
        shard_network(model, mesh, training.precision, reshard_after_forward)
        # Weights that stay gathered would go on without what the average learns.
        shard_network(self._averaged, mesh, training.precision)
        weights = dict(model.named_parameters())
        whole = [name for name, p in weights.items() if not isinstance(p, DTensor)]
        if whole:
            raise RuntimeError(f"FSDP2 was asked for but did not shard {', '.join(whole[:5])}")
        self._weights = {name: cast(DTensor, p.detach()) for name, p in weights.items()}
        self._averages = {
            name: {n: cast(DTensor, weight.clone()) for n, weight in self._weights.items()}
            for name in decays(training)
        }
        self._averages["ema"] = {
            name: cast(DTensor, p.detach()) for name, p in self._averaged.named_parameters()
        }
        self._exp_avg, self._exp_avg_sq = (
            {
                name: cast(DTensor, torch.zeros_like(weight))
                for name, weight in self._weights.items()
            }
            for _ in range(2)
        )
        self._step = torch.zeros((), device=accelerator.device)
        self._adamw = AdamW(
            config.optimizer,
            *(_local(d.values()) for d in (self._weights, self._exp_avg, self._exp_avg_sq)),
            self._step,
        )
        self._accumulation = training.accumulation
        self._clip_norm = config.optimizer.clip_norm
        self.loss_scale = LossScale(accelerator.device) if training.precision == "fp16" else None

    @property
    def network(self) -> Predict:
        """See `Strategy`."""
        return self.model

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """See `Strategy`."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        if self._accumulation > 1:
            loss = loss / self._accumulation
        (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()

    @torch.no_grad()
    def step(self, learning_rate: Tensor, ema_weights: Tensor, skip: Tensor) -> Tensor:
        """See `Strategy`."""
        gradients = _local(self._gradients())
        divisor = 1 if self.loss_scale is None else self.loss_scale.value
        clipping = Clipping.of(_norm_over_ranks(gradients), divisor, self._clip_norm, skip)
        self._adamw.update(gradients, clipping, learning_rate)
        values = _local(self._weights.values())
        shares = (ema_weights * (1 - clipping.skip)).to(values[0].dtype)
        for average, share in zip(self._averages.values(), shares.unbind(), strict=True):
            move_towards(_local(average.values()), values, share)
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.loss_scale is not None:
            self.loss_scale.update(clipping.finite, skip)
        return clipping.norm.float()

    def close(self) -> None:
        """See `Strategy`."""

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """See `Strategy`."""
        yield self._averaged

    def averages(self) -> State:
        """See `Strategy`."""
        return {name: self._with_buffers(average) for name, average in self._averages.items()}

    def state(self) -> State:
        """See `Strategy`; the tensors are those in use."""
        optimizer: dict[str, Tensor] = {}
        for name in self._weights:
            optimizer[f"state.{name}.exp_avg"] = self._exp_avg[name]
            optimizer[f"state.{name}.exp_avg_sq"] = self._exp_avg_sq[name]
            optimizer[f"state.{name}.step"] = self._step
        return {
            "model": self._with_buffers(self._weights),
            **self.averages(),
            "optimizer": optimizer,
        }

    def load(self, state: State) -> None:
        """See `Strategy`; everything is in place already."""

    def _gradients(self) -> list[Tensor]:
        """Gradients of all weights; zero where there is none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]

    def _with_buffers(self, parameters: dict[str, DTensor]) -> dict[str, Tensor]:
        return {n: parameters.get(n, tensor) for n, tensor in self.model.state_dict().items()}


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shard of each DTensor."""
    return [cast(DTensor, tensor).to_local() for tensor in tensors]


def _norm_over_ranks(shards: list[Tensor]) -> Tensor:
    """Global norm of what the ranks hold shards of, 0-dim; all ranks call this together."""
    square = torch.nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    return square.sqrt()
