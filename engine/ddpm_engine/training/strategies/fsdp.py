"""Shard weights, gradients, optimizer state and averages over the processes: torch's FSDP2."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.objectives.base import Network as Predict
from ddpm_engine.runtime import DTYPES
from ddpm_engine.training.ema import decays, move_towards
from ddpm_engine.training.optimizer import AdamW, Clipping
from ddpm_engine.training.strategies.flat_state import is_channels_last
from ddpm_engine.training.strategies.loss_scale import LossScale, backward
from ddpm_engine.training.strategies.strategy import State

_PREFETCHED = 2
"""Blocks whose weights are on their way while one computes."""


class _ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose weight is stored as `[O, H, W, I]`.

    `fully_shard` takes contiguous weights only. As `[O, I, H, W]` they would be converted to
    channels-last for each forward and each backward pass, and their gradients back.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.permute(0, 3, 1, 2), bias)


def make_contiguous(model: Network) -> None:
    """Make all weights contiguous, whatever memory format suits the device."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


def shard_network(
    model: Network,
    mesh: DeviceMesh,
    precision: str = "no",
    reshard_after_forward: bool = True,
    trained: bool = False,
) -> None:
    """Turn a network's parameters into DTensors that are gathered while a block needs them.

    Weights of channels-last convolutions are stored as `[O, H, W, I]`; see `sharded_weights`.

    Args:
        model: network on its device, the same on every rank; changed in place.
        mesh: one-dimensional mesh.
        precision: precision of gathered weights; reductions over ranks are float32 or wider.
        reshard_after_forward: free a block's weights between forward and backward pass. Otherwise
            they are kept for the backward pass, which takes memory and saves a second gather.
        trained: whether each forward pass goes through all blocks, and a backward pass follows it.
            Blocks are then gathered ahead of their use, and what is in no block is gathered once.
    """
    if is_channels_last(model):
        for module in model.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = _ChannelsLastConv2d
                module.weight.data = module.weight.data.permute(0, 2, 3, 1)
    # Linear layers return views, on which nothing here works in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    make_contiguous(model)  # activations keep their format
    model.separate_blocks()
    policy = MixedPrecisionPolicy()
    if precision in DTYPES:
        # Inputs keep their precision, as under autocast: a noise level in bfloat16 is another one.
        policy = MixedPrecisionPolicy(
            DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    blocks = [
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        for block in model.blocks()
    ]
    root = fully_shard(
        model,
        mesh=mesh,
        mp_policy=policy,
        # Only the backward pass would free weights that stay gathered.
        reshard_after_forward=not trained,
    )
    if trained:
        for index, block in enumerate([root, *blocks]):
            block.set_modules_to_forward_prefetch(blocks[index : index + _PREFETCHED])


def sharded_weights(model: Network) -> dict[str, DTensor]:
    """The weights of a sharded network by name, detached and in use, convolutions' `[O, I, H, W]`.

    Raises:
        RuntimeError: a weight is not sharded.
    """
    return _shaped(_stored(model), _permuted(model))


def _shaped(stored: Mapping[str, DTensor], permuted: Container[str]) -> dict[str, DTensor]:
    """Give tensors the shapes of weights: those stored as `[O, H, W, I]` as `[O, I, H, W]`."""
    return {
        name: cast(DTensor, tensor.permute(0, 3, 1, 2)) if name in permuted else tensor
        for name, tensor in stored.items()
    }


def _permuted(model: Network) -> set[str]:
    """Weights stored as `[O, H, W, I]`."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, _ChannelsLastConv2d)
    }


def _stored(model: Network) -> dict[str, DTensor]:
    """The weights as they are stored."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    whole = [name for name, weight in weights.items() if not isinstance(weight, DTensor)]
    if whole:
        raise RuntimeError(f"FSDP2 was asked for but did not shard {', '.join(whole[:5])}")
    return cast(dict[str, DTensor], weights)


class FullySharded:
    """FSDP2 by torch itself, since Accelerate's plug-in silently shards nothing on CPUs.

    Its step is that of the other strategies over each rank's shards, and the host reads nothing of
    it; but FSDP2's own bookkeeping between blocks cannot be recorded as a graph.

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
        shard_network(model, mesh, training.precision, reshard_after_forward, trained=True)
        shard_network(self._averaged, mesh, training.precision)
        self._permuted = _permuted(model)
        self._weights = _stored(model)
        self._averages = {
            name: {n: cast(DTensor, weight.clone()) for n, weight in self._weights.items()}
            for name in decays(training)
        }
        self._averages["ema"] = _stored(self._averaged)
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
            _local(self._weights.values()),
            _local(self._exp_avg.values()),
            _local(self._exp_avg_sq.values()),
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
        backward(loss, self._accumulation, self.loss_scale)

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
        for moment, tensors in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq)):
            for name, tensor in _shaped(tensors, self._permuted).items():
                optimizer[f"state.{name}.{moment}"] = tensor
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

    def _with_buffers(self, stored: dict[str, DTensor]) -> dict[str, Tensor]:
        """Add the network's own buffers, which averages share: nothing is averaged in them."""
        named = _shaped(stored, self._permuted)
        return {n: named.get(n, tensor) for n, tensor in self.model.state_dict().items()}


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shard of each DTensor."""
    return [cast(DTensor, tensor).to_local() for tensor in tensors]


def _norm_over_ranks(shards: list[Tensor]) -> Tensor:
    """Global norm of what the ranks hold shards of, 0-dim; all ranks call this together."""
    square = torch.nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    return square.sqrt()
