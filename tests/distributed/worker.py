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
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from ddpm_engine.cli.options import exit_on_user_error
from ddpm_engine.config import load_config
from ddpm_engine.data.dataset import Batch
from ddpm_engine.distributed import rank
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.objectives.base import Network, Objective
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_engine.training.trainer import Trainer

GRACE_SECONDS = 2.0
"""Between the failure of a rank and the end of those that wait for it."""


class ChangedLoss(Callback):
    """Let the run's objective compute another loss, and stay what it is otherwise."""

    def on_start(self, run: Run) -> None:
        run.objective = Wrapped(run.objective, self)

    def loss(self, objective: Objective, network: Network, batch: Batch) -> Tensor:
        raise NotImplementedError


class Wrapped(Objective):
    def __init__(self, objective: Objective, changed: ChangedLoss) -> None:
        self.objective, self.changed = objective, changed
        self.begin_step, self.end_step = objective.begin_step, objective.end_step  # type: ignore[method-assign]
        self.state, self.load = objective.state, objective.load  # type: ignore[method-assign]

    def __call__(self, network: Network, batch: Batch) -> Tensor:
        return self.changed.loss(self.objective, network, batch)


class Poisoned(ChangedLoss):
    """Let the loss of the sample at one position be no number."""

    def __init__(self, position: int) -> None:
        self.position = position

    def loss(self, objective: Objective, network: Network, batch: Batch) -> Tensor:
        return objective(network, batch) * (math.nan if self.position in batch.positions else 1)


class Traced(ChangedLoss):
    """Write a line a sample: position, checksums of image and x_t, timestep, label if any."""

    def __init__(self, path: str) -> None:
        self.file = open(f"{path}.{rank()}", "w")  # noqa: SIM115

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
            run.strategy.loss_scale.value = self.value


def train(job: dict[str, Any]) -> None:
    """Train one run as one rank."""
    os.environ.update(job["environment"])
    callbacks: list[Callback] = []
    if job["first_scale"] is not None:
        callbacks.append(FirstScale(job["first_scale"]))
    if job["poisoned"] is not None:
        callbacks.append(Poisoned(job["poisoned"]))
    if job["trace"] is not None:
        callbacks.append(Traced(job["trace"]))
    dtype = torch.float64 if job["float64"] else torch.float32
    with exit_on_user_error():
        # Half precision is slow here, but the arithmetic is there.
        config = load_config(Path(job["config"]))
        Trainer(config, callbacks, dtype=dtype, any_precision=True).fit()
    for name in job["environment"]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)


def become_rank(number: int, order: dict[str, Any]) -> None:
    """Train all jobs as one rank, in a fork."""
    log = os.open(Path(order["folder"]) / f"rank{number}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(order["environments"][number])
    level = logging.INFO if number == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    for job in order["jobs"]:
        train(job)


def run_ranks(order: dict[str, Any]) -> list[int] | None:
    """Fork ranks and wait for them; returns their statuses, or None in a rank that has ended."""
    if any("ACCELERATE_USE_DEEPSPEED" in job["environment"] for job in order["jobs"]):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401
    ranks = []
    for number in range(len(order["environments"])):
        ranks.append(os.fork())
        if ranks[number] == 0:
            become_rank(number, order)
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
