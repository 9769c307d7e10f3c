"""A launcher for tests: runs trainings of several ranks in forks of a process that has torch.

Reads one JSON job a line from standard input, and answers each with one line:

    {"config": PATH, "world": 2, "logs": FOLDER, "faults": [[rank, name, arguments], ...]}
    {"status": [0, -9], "ended_by_launcher": [1]}

Like torchrun it kills what is left some time after a rank has failed. Faults are the functions of
this file that take them; what they return are callbacks of that rank's run.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tests.ranks import Poisoned, environment_of, fork_ranks
from tests.recorder import AsOnAGpu, Recorded

from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.cli.options import exit_on_error
from ddpm_engine.config import RunConfig, load_config
from ddpm_engine.errors import UserError
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_engine.training.trainer import Trainer

PATIENCE_SECONDS = 14.0
"""Between the failure of a rank and the end of the others by force."""


class Counts(Callback):
    """Say which step has been started."""

    def on_step_end(self, run: Run) -> None:
        print(f"started step {run.step}", flush=True)


class Before(Callback):
    """Act before every step, or before the one that follows `step` others."""

    def __init__(self, action: Callable[[], object], step: int | None = None) -> None:
        self.action, self.step = action, step

    def on_step_begin(self, run: Run) -> None:
        if self.step in (None, run.step):
            self.action()


def at_every_event(action: Callable[[], None]) -> Callback:
    """Act before every step, and before whatever makes a checkpoint durable."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            action()
            return function(*arguments, **named)

        return call

    for holder, name in [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (dcp, "save")]:
        setattr(holder, name, watched(getattr(holder, name)))
    return Before(action)


def signal_at_event(_config: RunConfig, number: int, event: int) -> list[Callback]:
    """Send this rank a signal at its n-th event."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == event:
            os.kill(os.getpid(), number)

    return [at_every_event(count)]


def count_events(_config: RunConfig, path: str) -> list[Callback]:
    """Keep the number of events so far in a file."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        Path(path).write_text(str(seen))

    return [at_every_event(count)]


def signal_at_step(_config: RunConfig, number: int, step: int) -> list[Callback]:
    """Send this rank a signal between two steps."""
    return [Before(lambda: os.kill(os.getpid(), number), step)]


def die_while_saving(_config: RunConfig, saved: int) -> list[Callback]:
    """Be killed in the save of one step, one second after training has gone as far as it can."""
    original = CheckpointStore.save

    def save(self: CheckpointStore, step: int, *arguments: Any) -> None:
        if step == saved:
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, step, *arguments)

    CheckpointStore.save = save  # type: ignore[assignment,method-assign]
    return [Counts()]


def fail_at_step(_config: RunConfig, kind: str, step: int) -> list[Callback]:
    """Raise a UserError, or another error, between two steps."""

    def fail() -> None:
        if kind == "UserError":
            raise UserError("the dog ate the data")
        raise RuntimeError("a defect")

    return [Before(fail, step)]


def not_a_number(_config: RunConfig, position: int, value: float) -> list[Callback]:
    """Let the loss of the sample at one position be inf or nan."""

    return [Poisoned(position, value)]


def recorded(_config: RunConfig) -> list[Callback]:
    """Record the first step and replay it from then on; see tests/recorder.py."""
    return [Recorded()]


def eager(_config: RunConfig) -> list[Callback]:
    """Take the operations of a GPU, as a recorded run does."""
    return [AsOnAGpu()]


def after_saves(action: Callable[[], object]) -> Callable[[], None]:
    """Act when no checkpoint of this rank is in flight."""

    def wait_and_act() -> None:
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint"):
                thread.join()
        action()

    return wait_and_act


def no_large_files(_config: RunConfig, first: int, last: int) -> list[Callback]:
    """Let no file grow beyond 16 KiB between two steps."""

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return [
        Before(after_saves(lambda: limit(16384)), first),
        Before(after_saves(lambda: limit(resource.RLIM_INFINITY)), last),
    ]


def full_disk(config: RunConfig, first: int, last: int) -> list[Callback]:
    """Fill the file system of the run with a file of somebody else's between two steps."""
    ballast = config.out.with_name("ballast")

    def fill() -> None:
        descriptor = os.open(ballast, os.O_CREAT | os.O_WRONLY)
        for size in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    os.write(descriptor, bytes(size))
        os.close(descriptor)

    return [Before(after_saves(fill), first), Before(after_saves(ballast.unlink), last)]


def run_rank(job: dict[str, Any], rank: int, port: int) -> None:
    """Train as one rank; never returns."""
    status = 1
    try:
        os.environ |= environment_of(rank, job["world"]) | {"MASTER_PORT": str(port)}
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)
        config = load_config(Path(job["config"]))
        callbacks: list[Callback] = []
        for faulty, name, arguments in job["faults"]:
            if faulty == rank:
                callbacks += globals()[name](config, *arguments)
        with exit_on_error():
            Trainer(config, callbacks).fit()
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def launch(job: dict[str, Any]) -> dict[str, Any]:
    """Run all ranks to their end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ended = fork_ranks(
        job["world"],
        lambda rank: run_rank(job, rank, port),
        lambda rank: Path(job["logs"]) / f"rank-{rank}.txt",
        PATIENCE_SECONDS,
    )
    return vars(ended)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(launch(json.loads(line))), flush=True)
