"""Shard weights, gradients, optimizer state and averages over the processes: torch's FSDP2."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.runtime import DTYPES
from ddpm_engine.training.ema import EMA, decays
from ddpm_engine.training.strategies.replicated import TorchStrategy


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


class FullySharded(TorchStrategy):
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

    def __init__(
        self,
        model: Network,
        config: RunConfig,
        accelerator: Accelerator,
        mesh: DeviceMesh,
        reshard_after_forward: bool = True,
    ) -> None:
        emas = {name: EMA(model, decay) for name, decay in decays(config.training).items()}
        for network in (model, *(ema.model for ema in emas.values())):
            shard_network(network, mesh, config.training.precision, reshard_after_forward)
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        if whole:
            raise RuntimeError(f"FSDP2 was asked for but did not shard {', '.join(whole[:5])}")
        super().__init__("FSDP2", model, model, emas, config)
