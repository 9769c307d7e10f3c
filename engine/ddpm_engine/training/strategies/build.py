"""From a launcher's request to a strategy in force."""

from __future__ import annotations

import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.training.strategies.fsdp import FullySharded
from ddpm_engine.training.strategies.launcher_env import Request
from ddpm_engine.training.strategies.replicated import Replicated
from ddpm_engine.training.strategies.strategy import Strategy
from ddpm_engine.training.strategies.zero import Zero3, Zero12


def start_strategy(
    model: Network, request: Request, config: RunConfig, accelerator: Accelerator
) -> Strategy:
    """Distribute a network and its training state over the processes.

    Args:
        model: network on its device, the same on every rank; the strategy owns it from now on.
        request: what the launcher asked for.
        config: the run.
        accelerator: started with as many processes as the request says.

    Raises:
        UserError: the strategy is not available here; the message says why.
    """
    if request.deepspeed is not None:
        zero = Zero3 if request.deepspeed["zero_optimization"]["stage"] == 3 else Zero12
        return zero(model, config, accelerator, _mesh(accelerator), request.deepspeed)
    if request.fsdp:
        return FullySharded(
            model, config, accelerator, _mesh(accelerator), request.reshard_after_forward
        )
    return Replicated(model, config, accelerator.device, accelerator.num_processes)


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    """A one-dimensional mesh of all processes, or of a single one."""
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if accelerator.device.type == "cpu" else None,
            store=dist.HashStore(), rank=0, world_size=1,
        )  # fmt: skip
    return init_device_mesh(accelerator.device.type, (dist.get_world_size(),))
