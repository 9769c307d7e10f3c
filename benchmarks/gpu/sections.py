"""What is run: a section for each operation, in a process of its own.

A kernel that goes astray takes its process's device context with it, and the compiler may take the
process; the other sections are not to suffer for it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import torch
from benchmarks.gpu import checks, loop, timing
from benchmarks.gpu.checks import Check, Extent
from benchmarks.gpu.compare import Comparison
from benchmarks.gpu.timing import Measurement

from ddpm_kernels.dispatch import force_ops

SECTIONS = (*checks.CHECKS, "loop")
LIMIT = 300.0
"""Seconds that a section may take before it is given up."""


@dataclass(frozen=True)
class Finding:
    """What came of one check."""

    section: str
    name: str
    passed: bool
    comparisons: tuple[Comparison, ...] = ()
    message: str = ""
    """Of the exception, where the check did not end."""

    @property
    def worst(self) -> Comparison | None:
        """The comparison that fails, or comes nearest to it."""
        return min(self.comparisons, key=lambda c: (c.passed, c.allowed - c.error), default=None)


@dataclass(frozen=True)
class Plan:
    """What to run."""

    device: str
    extent: Extent
    measure: bool = True


Result = Finding | Measurement
Emit = Callable[[Result], None]


def run_check(section: str, check: Check) -> Finding:
    """Run one check; an exception fails it."""
    name, function = check
    try:
        comparisons = tuple(function())
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Finding(section, name, False, message=message)
    return Finding(section, name, all(c.passed for c in comparisons), comparisons)


def run_section(section: str, plan: Plan, emit: Emit) -> None:
    """Run a section's checks, then its measurements, handing each result on as it comes."""
    device = torch.device(plan.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with force_ops():
        all_checks = loop.loop_checks if section == "loop" else checks.CHECKS[section]
        for check in all_checks(device, plan.extent):
            emit(run_check(section, check))
        if plan.measure:
            measure_section(section, plan, emit)


def measure_section(section: str, plan: Plan, emit: Emit) -> None:
    """Run a section's measurements; one that fails is a finding, and the next goes on."""
    device = torch.device(plan.device)
    timer = timing.timer_of(device)
    repeats, beyond = timing.REPEATS, timing.BEYOND_CACHES
    if plan.extent == "tiny":
        repeats, beyond = 2, 1

    def emit_all(name: str, measure: Callable[[], list[Measurement]]) -> None:
        try:
            for measured in measure():
                emit(measured)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            emit(Finding(section, f"time of {name}", False, message=message))

    if section == "loop":
        emit_all("loop", lambda: loop.measure_loop(device, plan.extent, timer))
    if section in timing.JOBS:
        for job in timing.JOBS[section](device, plan.extent):
            name = f"{job.operation} {checks.sized(job.shape)} {checks.named(job.dtype)}"
            emit_all(name, partial(timing.measure, job, device, timer, repeats, beyond))


def _child(section: str, plan: Plan, connection: Connection) -> None:
    """The other process of `isolated`."""
    run_section(section, plan, connection.send)
    connection.close()


def isolated(section: str, plan: Plan) -> Iterator[Result]:
    """The results of a section that runs in a process of its own, as they come."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(section, plan, theirs))
    process.start()
    theirs.close()
    deadline = time.monotonic() + LIMIT
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            yield ours.recv()
        process.kill()
        yield Finding(section, "time", False, message=f"given up after {LIMIT:.0f} s")
    except EOFError:
        process.join(30)
        if process.exitcode:
            message = f"its process ended with status {process.exitcode}"
            yield Finding(section, "process", False, message=message)
    finally:
        process.kill()
        process.join()


def in_process(section: str, plan: Plan) -> Iterator[Result]:
    """The results of a section that runs here; for tests."""
    found: list[Result] = []
    run_section(section, plan, found.append)
    yield from found
