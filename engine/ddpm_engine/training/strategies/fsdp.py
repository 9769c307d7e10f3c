"""Weights, gradients, optimizer and averages are sharded over the processes: torch's FSDP2."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.runtime import DTYPES
from ddpm_engine.training.ema import EMA, decays
from ddpm_engine.training.strategies.replicated import TorchStrategy


def make_contiguous(model: UNet) -> None:
    """Lay out weights as their shapes say, whatever the device likes best."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


def shard_network(
    model: UNet, mesh: DeviceMesh, precision: str = "no", reshard_after_forward: bool = True
) -> None:
    """Make a network's parameters DTensors, gathered for the time that each block needs them.

    Args:
        model: the same on every rank, on its device; changed in place.
        mesh: of one dimension.
        precision: that of gathered weights; sums over ranks are float32 or wider.
        reshard_after_forward: free a block's weights between forward and backward pass; else they
            stay for the backward pass, which costs their memory and saves gathering them again.
    """
    make_contiguous(model)  # fully_shard takes no others; activations are laid out as ever
    policy = MixedPrecisionPolicy()
    if precision in DTYPES:
        policy = MixedPrecisionPolicy(DTYPES[precision], torch.float32)
    for block in [*model.blocks(), model]:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)


class FullySharded(TorchStrategy):
    """FSDP2, by torch itself: Accelerate's plug-in shards nothing on CPUs, without a word.

    Gradients are reduced with every piece of a step: summed up unsharded until the last, they would
    take the memory that sharding saves.

    Args:
        model: on its device, the same on every rank.
        config: of the run.
        accelerator: started.
        mesh: over all processes, of one dimension.
        reshard_after_forward: as in `shard_network`.
    """

    def __init__(
        self,
        model: UNet,
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
