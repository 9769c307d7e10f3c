"""What launchers leave in the environment of the processes that they start."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ddpm_engine.errors import UserError

# World size and rank, by precedence: torchrun and accelerate, Open MPI, PMI and SLURM. A process
# that one of them has started has both.
_VARIABLES = (
    ("WORLD_SIZE", "RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_OF_SLURM = ("PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_PTY = ("SLURM_PTY_PORT", "SLURM_PTY_WIN_COL", "SLURM_PTY_WIN_ROW")
_INTERACTIVE_STEP = str(0xFFFFFFFA)


def launched_as(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the rank of this process and the number of processes that were started with it.

    Without a launcher that is (0, 1). So it is in a shell that SLURM has opened, by `srun --pty` or
    by salloc: what is typed there inherits the variables of a step of many tasks, but is started
    once.

    Raises:
        UserError: the variables hold something else than a rank and a number of ranks.
    """
    shell = any(name in environment for name in _PTY)
    shell = shell or environment.get("SLURM_STEP_ID") == _INTERACTIVE_STEP
    for size, rank in _VARIABLES:
        if size not in environment or rank not in environment or (shell and size in _OF_SLURM):
            continue
        try:
            number, total = int(environment[rank]), int(environment[size])
        except ValueError:
            number, total = -1, 0
        if number < 0 or total < 1:
            raise UserError(
                f"{rank} is {environment[rank]!r} and {size} {environment[size]!r} in the "
                "environment; launchers set them to a rank from 0 and to the number of ranks. If "
                "none was used, unset both"
            )
        # The tasks of a job array with gaps have higher numbers than there are tasks.
        return number % total, total
    return 0, 1


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what all ranks would say is this process's to say."""
    try:
        return launched_as(environment)[0] == 0
    except UserError:
        return True


def check_launched_precision(
    precision: str, field: str | None, environment: Mapping[str, str] = os.environ
) -> None:
    """Check that a launcher was not told another precision than the one that is computed in.

    Args:
        precision: no, bf16 or fp16.
        field: dotted name of the field that sets it; None: there is none, it is always `no`.
        environment: of this process.

    Raises:
        UserError: the launcher's would be ignored.
    """
    name = "ACCELERATE_MIXED_PRECISION"
    theirs = environment.get(name, "no")
    if theirs in ("no", precision):
        return
    if field is None:
        raise UserError(
            f"the launcher asks for {name}={theirs}, but this is always computed in float32; leave "
            "it out of the launcher's file or command"
        )
    raise UserError(
        f"the launcher asks for {name}={theirs} but `{field}` is {precision}; set `{field}` to "
        f"{theirs}, or leave it out of the launcher's file or command",
        field,
    )
