"""A launcher for tests: trains runs on several ranks, which are forks of a process that has torch.

Importing torch and DeepSpeed takes longer than most runs, so it is done once. Reads one order a
line from standard input and answers each with the ranks' exit statuses:

    {"jobs": [JOB, …], "environments": [VARIABLES OF RANK 0, …], "folder": LOGS, "timeout": SECONDS}
    [0, 0]

Each rank trains the jobs one after the other and then ends as a process of its own would. A job is

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
import signal
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from ddpm_engine.cli.options import exit_on_user_error
from ddpm_engine.config import load_config
from ddpm_engine.data.dataset import Batch
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.objective import Objective
from ddpm_engine.training import accelerator, trainer
from ddpm_engine.training.strategies import loss_scale
from ddpm_engine.training.trainer import Trainer

GRACE_SECONDS = 2.0
"""Between the failure of a rank and the end of those that wait for it."""


def float64_network(config: UNetConfig) -> UNet:
    return UNet(config).double()


Loss = Callable[[Any, Batch], Tensor]


def override(objective: Objective, changed: Callable[[Loss], Loss]) -> None:
    """Let an objective compute what `changed` makes of its loss, and stay what it is otherwise."""
    loss = changed(objective.__call__)

    class Overridden(type(objective)):  # type: ignore[misc]
        def __call__(self, model: Any, batch: Batch) -> Tensor:
            return loss(model, batch)

    objective.__class__ = Overridden


def poisoned(loss: Loss, position: int) -> Loss:
    """Let the loss of the sample at one position be no number."""

    def poisoned_loss(network: Any, batch: Batch) -> Tensor:
        return loss(network, batch) * (math.nan if position in batch.positions else 1)

    return poisoned_loss


def traced(loss: Loss, file: IO[str]) -> Loss:
    """Write a line a sample: position, checksums of image and x_t, timestep, label if any."""

    def traced_loss(network: Any, batch: Batch) -> Tensor:
        def noting(x_t: Tensor, *conditions: Tensor) -> Tensor:
            for row in zip(batch.positions, batch.images, x_t, *conditions, strict=True):
                values = [
                    zlib.crc32(v.contiguous().numpy().tobytes()) if v.dim() else int(v) for v in row
                ]
                print(*values, file=file, flush=True)
            prediction: Tensor = network(x_t, *conditions)
            return prediction

        return loss(noting, batch)

    return traced_loss


def train(job: dict[str, Any]) -> None:
    """Train one run as one rank."""
    os.environ.update(job["environment"])
    trainer.UNet = float64_network if job["float64"] else UNet  # type: ignore[misc,assignment]
    # Slow, but the arithmetic is there.
    accelerator.check_precision = lambda *_: None
    if job["first_scale"] is not None:
        loss_scale.FIRST_SCALE = job["first_scale"]
    with exit_on_user_error():
        run = Trainer(load_config(Path(job["config"])))
        if job["float64"]:
            assert isinstance(run.objective, DenoisingObjective)
            run.objective._signal = run.schedule.sqrt_alpha_bar
            run.objective._sigma = run.schedule.sqrt_one_minus_alpha_bar
        if job["poisoned"] is not None:
            override(run.objective, partial(poisoned, position=job["poisoned"]))
        if job["trace"] is not None:
            file = open(f"{job['trace']}.{os.environ.get('RANK', '0')}", "w")  # noqa: SIM115
            override(run.objective, partial(traced, file=file))
        run.fit()
    for name in job["environment"]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)


def become_rank(rank: int, order: dict[str, Any]) -> None:
    """Train all jobs as one rank, in a fork."""
    log = os.open(Path(order["folder"]) / f"rank{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(order["environments"][rank])
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    for job in order["jobs"]:
        train(job)


def run_ranks(order: dict[str, Any]) -> list[int] | None:
    """Fork ranks and wait for them; returns their statuses, or None in a rank that has ended."""
    if any("ACCELERATE_USE_DEEPSPEED" in job["environment"] for job in order["jobs"]):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401
    ranks = []
    for rank in range(len(order["environments"])):
        ranks.append(os.fork())
        if ranks[rank] == 0:
            become_rank(rank, order)
            return None
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + order["timeout"]
    while len(statuses) < len(ranks):
        for pid in set(ranks) - statuses.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid]:  # one that fails leaves the others waiting for it
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for pid in set(ranks) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[pid] for pid in ranks]


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        statuses = run_ranks(json.loads(line))
        if statuses is None:
            return
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    main()
