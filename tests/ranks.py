"""Ranks of a run as forks of a process that has torch already, and what tests do to their runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.objectives.base import Network, Objective
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run


@dataclass(frozen=True)
class Ended:
    """How forked ranks ended."""

    status: list[int]
    """Exit status of each rank, or minus the signal that ended it."""
    ended_by_launcher: list[int]
    """Ranks that did not end by themselves in time."""


def fork_ranks(
    world: int,
    train: Callable[[int], None],
    log_of: Callable[[int], Path],
    patience: float,
    timeout: float = float("inf"),
) -> Ended | None:
    """Fork ranks, as torchrun starts processes, and wait for them.

    Args:
        world: number of ranks.
        train: what each rank does, given its number.
        log_of: file that gets a rank's output.
        patience: seconds between the failure of a rank and the end of the others by force.
        timeout: seconds after which all ranks are ended by force.

    Returns:
        How they ended; None in a rank itself, once it has trained.
    """
    pids: dict[int, int] = {}
    for rank in range(world):
        pids[rank] = os.fork()
        if pids[rank] == 0:
            log = os.open(log_of(rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            train(rank)
            return None
    status: dict[int, int] = {}
    ended_by_launcher: list[int] = []
    deadline = time.monotonic() + timeout
    while len(status) < world:
        for rank in pids.keys() - status.keys():
            pid, code = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                status[rank] = os.waitstatus_to_exitcode(code)
                if status[rank]:  # one that fails leaves the others waiting for it
                    deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline and not ended_by_launcher:
            ended_by_launcher = sorted(pids.keys() - status.keys())
            for rank in ended_by_launcher:
                os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.02)
    return Ended([status[rank] for rank in range(world)], ended_by_launcher)


def environment_of(rank: int, world: int) -> dict[str, str]:
    """The variables that torchrun sets, but for the port; none for a process alone."""
    if world == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
    }


class ChangedLoss(Callback):
    """Let the run's objective compute another loss, and stay what it is otherwise."""

    def on_start(self, run: Run) -> None:
        run.objective = _Changed(run.objective, self)

    def loss(self, objective: Objective, network: Network, batch: Batch) -> Tensor:
        """The loss instead of `objective(network, batch)`."""
        raise NotImplementedError


class _Changed(Objective):
    def __init__(self, objective: Objective, changed: ChangedLoss) -> None:
        self.objective, self.changed = objective, changed
        self.learns_on_host = objective.learns_on_host
        self.begin_step, self.end_step = objective.begin_step, objective.end_step  # type: ignore[method-assign]
        self.state, self.load = objective.state, objective.load  # type: ignore[method-assign]

    def __call__(self, network: Network, batch: Batch) -> Tensor:
        return self.changed.loss(self.objective, network, batch)


class Poisoned(ChangedLoss):
    """Multiply the loss of the sample at one position by a value that is not finite."""

    def __init__(self, position: int, value: float) -> None:
        self.position, self.value = position, value

    def loss(self, objective: Objective, network: Network, batch: Batch) -> Tensor:
        loss = objective(network, batch)
        return loss * torch.where(batch.positions == self.position, self.value, 1.0)
