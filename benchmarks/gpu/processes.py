"""A process for each item, forked from one that has the libraries loaded, and its end."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch
from benchmarks.gpu.item import Context, Item, NotHereError, Row
from benchmarks.gpu.machine import machine_of
from benchmarks.gpu.results import End, Results, Status

Method = Literal["fork", "spawn"]
"""`fork` saves the seconds that imports take, as long as this process leaves the GPU alone."""

PRELOADED = (
    "benchmarks.gpu.networks",
    "ddpm_engine.training.trainer",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.profiler",
    "pytest",
    "hypothesis",
    "sklearn.datasets",
)
"""What forks need not import again; none of it touches a GPU."""
THREADS = 4
"""Of each item on the host, where several run at once; in a rehearsal, one."""
NOT_HERE = 4
_PR_SET_PDEATHSIG = 1
_LOG_BYTES = 20_000


@dataclass(frozen=True)
class Settings:
    """What all items of a run share."""

    out: Path
    dry: bool
    method: Method = "fork"

    @property
    def device(self) -> torch.device:
        """Where items run."""
        return torch.device("cpu" if self.dry else "cuda:0")

    @property
    def work(self) -> Path:
        """Folder of caches, data and runs; not a result."""
        return self.out / "work"


def preload() -> None:
    """Import what items will need; what is missing fails them, with its name."""
    for module in PRELOADED:
        with suppress(ImportError):
            import_module(module)


def probe(settings: Settings, command: str) -> dict[str, str] | str:
    """Learn about the machine in a process started as items are; or why its GPU cannot be used."""
    context = multiprocessing.get_context(settings.method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(  # type: ignore[attr-defined]
        target=_tell, args=(theirs, settings.device, command)
    )
    process.start()
    theirs.close()
    try:
        told: dict[str, str] | str = ours.recv()
    except EOFError:
        told = "the process that asked for it ended without a word"
    process.join()
    return told


def _tell(theirs: Connection, device: torch.device, command: str) -> None:
    try:
        theirs.send(machine_of(device, command))
    except Exception as error:
        theirs.send(str(error).splitlines()[0])


def slug(name: str) -> str:
    """Return a name that may stand in a path."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def line_of(item: str, row: Row) -> str:
    """Return a row on one line."""
    return f"{item}: " + ", ".join(f"{k} {shown(v)}" for k, v in row.items() if v is not None)


def shown(value: object) -> str:
    """Return a value for people: floats to three digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


class Running:
    """An item that runs.

    Args:
        item: what to run.
        settings: of the run.
        attempt: its number, from 1.
        limit: seconds after which it is killed, with every process that it has started.
    """

    def __init__(self, item: Item, settings: Settings, attempt: int, limit: float) -> None:
        self.item, self.attempt = item, attempt
        self.scratch = settings.work / "items" / slug(item.name)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        self.log = self.scratch / "log.txt"
        self._out = settings.out
        self._begun = time.monotonic()
        self._deadline = self._begun + limit
        sys.stdout.flush()
        context = multiprocessing.get_context(settings.method)
        process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=_run, args=(item, settings, attempt, self.scratch, self.log, os.getpid())
        )
        process.start()
        self._process = process

    def poll(self) -> End | None:
        """Return how it ended, or None while it runs; kill it if its time is over."""
        if self._process.is_alive():
            if time.monotonic() < self._deadline:
                return None
            self.kill()
            seconds = time.monotonic() - self._begun
            return self._ended("killed", f"killed after {seconds:.0f} s, its limit")
        self.kill()  # what it has left behind
        code = self._process.exitcode
        if code == 0:
            shutil.rmtree(self.scratch, ignore_errors=True)
            return self._ended("done", "")
        status: Status = "not here" if code == NOT_HERE else "failed"
        lines = [line for line in self._said().splitlines() if line.strip()]
        message = lines[-1] if lines else f"ended with status {code}"
        if code is not None and code < 0:
            message = f"ended by {signal.Signals(-code).name}: {message}"
        return self._ended(status, message)

    def kill(self) -> None:
        """End its whole process group."""
        pid = self._process.pid
        assert pid is not None
        self._process.kill()  # nothing if it has ended; it may not have made its group yet
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self._process.join()

    def _said(self) -> str:
        try:
            return self.log.read_text(errors="replace")[-_LOG_BYTES:]
        except OSError:
            return ""

    def _ended(self, status: Status, message: str) -> End:
        if status in ("failed", "killed"):
            with (self._out / "log.txt").open("a") as file:
                file.write(f"\n==== {self.item.name}: {message}\n{self._said()}\n")
        seconds = time.monotonic() - self._begun
        return End(self.item.name, self.attempt, status, seconds, message[:500])


def _run(
    item: Item, settings: Settings, attempt: int, scratch: Path, log: Path, parent: int
) -> None:
    """Be the process of an item: rows go to standard output, all else to its log."""
    os.setsid()
    _end_with(parent)
    threads = 1 if settings.dry else THREADS
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    results = Results(settings.out, settings.dry)
    sys.stdout.flush()
    terminal = os.dup(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)

    def add(row: Row) -> None:
        results.add_row(item.name, attempt, row)
        os.write(terminal, (line_of(item.name, row) + "\n").encode())

    shared = settings.work / "cache"
    shared.mkdir(parents=True, exist_ok=True)
    context = Context(
        settings.device, settings.dry, settings.out, scratch, shared, add,
        lambda name: results.rows().get(name, []),
    )  # fmt: skip
    code = 1
    try:
        module, function = item.function.split(".")
        partial(getattr(import_module(f"benchmarks.gpu.items.{module}"), function), **item.options)(
            context
        )
        code = 0
    except NotHereError as reason:
        print(reason)
        code = NOT_HERE
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a library's threads or exit handlers cannot hold it up


def _end_with(parent: int) -> None:
    """Let the kernel end this process when its parent is killed: nothing else would."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
