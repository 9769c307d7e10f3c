"""A launcher for tests: trains runs on several ranks, which are forks of a process that has torch.

Importing torch and DeepSpeed takes longer than most runs, so it is done once. Reads one order a
line from standard input and answers each with the ranks' exit statuses:

    {"jobs": [JOB, …], "environments": [VARIABLES OF RANK 0, …], "folder": LOGS, "timeout": SECONDS}
    [0, 0]

Each rank trains the jobs one after the other and then ends as a separate process would. A job is

    {"config": FILE, "environment": {…}, "float64": bool, "poisoned": POSITION or null,
     "first_scale": NUMBER or null, "trace": FILE or null}

where the environment is what a launcher would have left besides the rank, the loss of the sample at
the poisoned position is not a number, and what becomes of each sample is written to the trace.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tests.ranks import ChangedLoss, Ended, Poisoned, fork_ranks
from torch import Tensor

from ddpm_engine.cli.options import exit_on_error
from ddpm_engine.config import load_config
from ddpm_engine.data.dataset import Batch
from ddpm_engine.distributed import rank
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.objectives.base import Network, Objective
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_engine.training.trainer import Trainer

PATIENCE_SECONDS = 2.0


class Traced(ChangedLoss):
    """Write a line a sample: position, checksums of image and x_t, timestep, label if any."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_start(self, run: Run) -> None:
        # Only now does the process know its rank.
        self.file = open(f"{self.path}.{rank()}", "w")  # noqa: SIM115
        super().on_start(run)

    def loss(self, objective: Objective, network: Network, batch: Batch) -> Tensor:
        def noting(x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
            labels = [] if conditioning.labels is None else [conditioning.labels]
            for row in zip(batch.positions, batch.images, x_t, timesteps, *labels, strict=True):
                values = [
                    zlib.crc32(v.contiguous().numpy().tobytes()) if v.dim() else int(v) for v in row
                ]
                print(*values, file=self.file, flush=True)
            return network(x_t, timesteps, conditioning)

        return objective(noting, batch)


class FirstScale(Callback):
    """Begin with another loss scale, unless the run has resumed."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_start(self, run: Run) -> None:
        if run.step == 0 and run.strategy.loss_scale is not None:
            run.strategy.loss_scale.value.fill_(self.value)


def train(job: dict[str, Any]) -> None:
    """Train one run as one rank."""
    os.environ.update(job["environment"])
    callbacks: list[Callback] = []
    if job["first_scale"] is not None:
        callbacks.append(FirstScale(job["first_scale"]))
    if job["poisoned"] is not None:
        callbacks.append(Poisoned(job["poisoned"], math.nan))
    if job["trace"] is not None:
        callbacks.append(Traced(job["trace"]))
    dtype = torch.float64 if job["float64"] else torch.float32
    with exit_on_error():
        # Half precision is slow here, but the arithmetic is there.
        config = load_config(Path(job["config"]))
        Trainer(config, callbacks, dtype=dtype, any_precision=True).fit()
    for name in job["environment"]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)


def become_rank(number: int, order: dict[str, Any]) -> None:
    """Train all jobs as one rank."""
    os.environ.clear()
    os.environ.update(order["environments"][number])
    level = logging.INFO if number == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    for job in order["jobs"]:
        train(job)


def run_ranks(order: dict[str, Any]) -> Ended | None:
    """Fork the ranks of an order and wait for them; None in a rank that has ended."""
    if any("ACCELERATE_USE_DEEPSPEED" in job["environment"] for job in order["jobs"]):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401
    return fork_ranks(
        len(order["environments"]),
        lambda number: become_rank(number, order),
        lambda number: Path(order["folder"]) / f"rank{number}",
        PATIENCE_SECONDS,
        order["timeout"],
    )


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        ended = run_ranks(json.loads(line))
        if ended is None:
            return
        print(json.dumps(ended.status), flush=True)


if __name__ == "__main__":
    main()
