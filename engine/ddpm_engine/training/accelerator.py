"""Starting Accelerate, and checking that the run gets the hardware and precision it asked for."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError


def start_accelerator(config: RunConfig) -> Accelerator:
    """Start Accelerate for a run.

    Raises:
        UserError: a precision that this machine cannot serve, or processes that do not see each
            other and would train independently.
    """
    cpu = not torch.accelerator.is_available()
    if cpu:
        _use_all_cores()
    precision = config.training.precision
    if cpu and precision == "fp16":
        raise UserError(
            "--training.precision is fp16, which needs a GPU; on this CPU use no"
            + (" or bf16" if _cpu_has_fast_bf16() else "")
        )
    slow = cpu and precision == "bf16" and not _cpu_has_fast_bf16()
    if slow and not config.training.allow_slow_bf16:
        raise UserError(
            "--training.precision is bf16, but this CPU has no bfloat16 instructions (AVX512 BF16 "
            "or AMX): convolutions would be a hundred times slower. Use no, or insist with "
            "--training.allow-slow-bf16"
        )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=config.training.accumulation,
        log_with=None if config.log.tracker == "none" else config.log.tracker,
        project_config=ProjectConfiguration(str(config.out), str(config.out)),
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise UserError(
            f"the launcher started {asked} processes but this one sees "
            f"{accelerator.num_processes}: they would train independently. On CPUs, launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return accelerator


def _use_all_cores() -> None:
    """Undo `accelerate launch`'s default of one thread, sharing the cores among local ranks."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (cores or 1) // ranks))


def _cpu_has_fast_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
