"""Start Accelerate, and check that the run gets the hardware and precision it asked for."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from ddpm_engine.config import RunConfig
from ddpm_engine.distributed import of_main, raise_together, rank
from ddpm_engine.errors import UserError
from ddpm_engine.runtime import check_precision, use_all_cores
from ddpm_engine.training.strategies.launcher_env import Request, without_plug_ins


def start_accelerator(
    config: RunConfig, request: Request, any_precision: bool = False
) -> Accelerator:
    """Start Accelerate for a run: processes, device and trackers; the strategies do the rest.

    Args:
        config: the run.
        request: what the launcher asked for.
        any_precision: do not refuse a precision that this hardware emulates slowly.

    Raises:
        UserError: a precision that this hardware does not have, or processes that do not see each
            other and would train independently.
    """
    cpu = not torch.accelerator.is_available()
    precision = config.training.precision
    if cpu:
        use_all_cores()
        slow_bf16 = precision == "bf16" and config.training.allow_slow_bf16
        if not (any_precision or slow_bf16):
            insist = " or auto, or insist with `training.allow_slow_bf16`"
            check_precision(precision, "`training.precision`", insist)
    with without_plug_ins():
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",  # each strategy has its own way
            log_with=None if config.log.tracker == "none" else config.log.tracker,
            project_config=ProjectConfiguration(str(config.out), str(config.out)),
            # Long enough for making data and compiling; `Watchdog` covers training itself.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
        )
    if request.processes != accelerator.num_processes:
        raise UserError(
            f"the launcher started {request.processes} processes but this one sees "
            f"{accelerator.num_processes}: they would train independently. Launch with accelerate "
            "launch --config_file launch/accelerate/ddp.yaml --num_processes N, on CPUs with "
            "ACCELERATE_USE_CPU=true before it"
        )
    with raise_together(UserError):
        if of_main(precision) != precision:
            raise UserError(
                f"`training.precision` auto is {precision} on {accelerator.device} of rank "
                f"{rank()} but not on all ranks; name one that all of them have",
                "training.precision",
            )
    return accelerator
