"""What this machine's processor can do, and how many of its cores a process may take."""

from __future__ import annotations

import os

import torch

from ddpm_engine.errors import UserError


def check_precision(precision: str, flag: str, remedy: str = "") -> None:
    """Refuse half precisions that this processor does not have or runs a hundred times slower.

    Args:
        precision: no, bf16 or fp16.
        flag: what the precision is called where it was chosen.
        remedy: what else can be done about slow bf16.

    Raises:
        UserError: fp16, or bf16 on a processor without instructions for it.
    """
    if precision == "fp16":
        raise UserError(
            f"{flag} is fp16, which needs a GPU; on this CPU use no"
            + (" or bf16" if has_fast_bf16() else "")
        )
    if precision == "bf16" and not has_fast_bf16():
        raise UserError(
            f"{flag} is bf16, but this CPU has no bfloat16 instructions (AVX512 BF16 or AMX): "
            f"convolutions would be a hundred times slower. Use no{remedy}"
        )


def use_all_cores() -> None:
    """Undo `accelerate launch`'s default of one thread, sharing the cores among local ranks."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (cores or 1) // ranks))


def has_fast_bf16() -> bool:
    """Whether there are bfloat16 instructions."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
