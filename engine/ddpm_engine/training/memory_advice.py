"""Say at the start of a run what would otherwise be learnt from the allocator."""

from __future__ import annotations

import logging

import torch

from ddpm_engine.config import RunConfig
from ddpm_engine.runtime import device_memory
from ddpm_engine.training.step_memory import RESERVED, StepMemory, step_memory
from ddpm_engine.training.strategies.launcher_env import Request

logger = logging.getLogger(__name__)


def advise_on_memory(config: RunConfig, request: Request, device: torch.device) -> None:
    """Warn if a step is modelled to take more memory than the device has, and say what would fit.

    Args:
        config: the run, its precision settled.
        request: what the launcher asked for.
        device: of this rank; only of GPUs is anything known.
    """
    there = device_memory(device)
    if there is None:
        return
    sharded = request.fsdp or request.deepspeed is not None
    try:
        memory = step_memory(config, request.processes, request.processes if sharded else 1)
    # A network of somebody else's may do what meta tensors cannot; that is no reason to end a run.
    except Exception as error:
        logger.debug("the memory of a step is not known: %s: %s", type(error).__name__, error)
        return
    room = there - RESERVED
    if memory.total <= room:
        return
    logger.warning(
        "a step is modelled to take %.1f GB: %.1f of state, %.1f that the forward pass keeps and "
        "%.1f more in the backward pass; %s has %.1f, of which libraries take some. If that is not "
        "enough, %s",
        *(n / 1e9 for n in (memory.total, memory.state, memory.kept, memory.backward)),
        device, there / 1e9, _remedy(config, request, memory, room),
    )  # fmt: skip


def _remedy(config: RunConfig, request: Request, memory: StepMemory, room: int) -> str:
    """What costs least: micro-batches, then recomputation, then sharing the state."""
    training = config.training
    images = training.batch_size // (request.processes * training.accumulation)
    for pieces in range(2, images + 1):
        if images % pieces == 0 and (fits := memory.divided(pieces)).total <= room:
            return (
                f"let `training.accumulation` be {pieces * training.accumulation} "
                f"({fits.total / 1e9:.1f} GB)"
            )
    if training.recompute != "blocks":
        return "let `training.recompute` be blocks"
    return "share the state among processes, with launch/accelerate/fsdp2.yaml"
