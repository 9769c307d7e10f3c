"""Train for a few steps with the Trainer itself, and measure each of them."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.gpu.trace import ON_DEVICE, Summary, keep, summarised
from torch.profiler import ProfilerActivity, profile

from ddpm_engine.config import RunConfig
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.source import array_source
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_engine.training.trainer import Trainer

WATCHED, PROFILED = 2, 3
"""Steps in which waits are counted, and that are profiled."""


@dataclass
class Measured:
    """What was seen. Times are of one step, in milliseconds."""

    milliseconds: float = float("nan")
    host: float = float("nan")
    """Time that the host spends in a step, its waits for the device among them."""
    waits: float = float("nan")
    """Times that the host waits for the device."""
    peak_gib: float | None = None
    """Memory that tensors took at most."""
    reserved_gib: float | None = None
    """Memory that torch took from the device at most."""
    data_wait: float | None = None
    """Share of the time in which data were waited for, in percent."""
    summary: Summary | None = None
    where: list[str] = field(default_factory=list)
    """Messages of the waits."""


class _Enough(BaseException):
    """All is measured; the run need not be saved."""


class _Meter(Callback):
    """Times the steps after `warm`, watches the next for waits, and profiles some more."""

    def __init__(self, warm: int, steps: int, trace: Path | None) -> None:
        self.found = Measured()
        self._timed, self._watched = range(warm, warm + steps), warm + steps + WATCHED
        self._end = self._watched + PROFILED
        self._trace = trace
        self._began = self._step_began = self._host = self._reading = 0.0
        self._stack = ExitStack()
        self._warned: list[warnings.WarningMessage] = []
        self._profile: Any = None

    def on_step_begin(self, run: Run) -> None:
        """Start what begins with this step."""
        number = run.step - run.start
        if number == self._timed.start:
            _wait(run.device)
            self._reading = run.meters.waiting
            self._began = time.perf_counter()
        elif number == self._timed.stop:
            self._warned = self._stack.enter_context(_watching(run.device))
        elif number == self._watched:
            self._profile = self._stack.enter_context(_profiling(run.device))
        self._step_began = time.perf_counter()

    def on_step_end(self, run: Run) -> None:
        """End what ends with this step."""
        number, found = run.step - run.start - 1, self.found
        if number in self._timed:
            self._host += time.perf_counter() - self._step_began
        if number == self._timed.stop - 1:
            _wait(run.device)
            took, steps = time.perf_counter() - self._began, len(self._timed)
            found.milliseconds = took / steps * 1e3
            found.host = self._host / steps * 1e3
            found.data_wait = 100 * (run.meters.waiting - self._reading) / took
            _note_memory(found, run.device)
        elif number == self._watched - 1:
            self._stack.close()
            _note_waits(found, self._warned)
        elif number == self._end - 1:
            _wait(run.device)
            self._stack.close()
            found.summary = _summary(self._profile, run.device, run.config.out, self._trace)
            raise _Enough

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Leave no profiler on."""
        self._stack.close()


def measured_run(config: RunConfig, warm: int, steps: int, trace: Path | None = None) -> Measured:
    """Train, measure, and leave off without saving.

    Args:
        config: the run; its number of steps, and what it logs and saves, are replaced.
        warm: steps beforehand: they compile and capture.
        steps: that are timed.
        trace: file for the profiler's trace, `.json.gz`.
    """
    meter = _Meter(warm, steps, trace)
    last = 10 * (warm + steps + WATCHED + PROFILED)
    config = replace(
        config,
        training=replace(config.training, steps=last),
        log=replace(config.log, every=last, checkpoint_every=last, sample_every=0, tracker="none"),
    )
    try:
        Trainer(config, [meter], any_precision=True).fit()
    except _Enough:
        return meter.found
    raise AssertionError("the run ended before all was measured")


def random_shards(folder: Path, size: int, count: int) -> Path:
    """Pack smooth random RGB images, which compress like photographs; once in a folder.

    Decoding them costs what decoding costs; neither speed nor memory depends on what they show.
    """
    shards = folder / f"random-{size}-{count}"
    if not (shards / "manifest.json").exists():
        generator = np.random.default_rng(0)
        coarse = generator.integers(0, 256, (count, size // 8, size // 8, 3), dtype=np.uint8)
        images = coarse.repeat(8, axis=1).repeat(8, axis=2)
        source = array_source("random", images, None, None, f"random {size} {count}")
        write_shards(source, shards, per_shard=-(-count // 16))
    return shards


def measured_steps(
    step: Callable[[], object], device: torch.device, warm: int, steps: int, scratch: Path
) -> Measured:
    """Measure a function in the same way.

    Args:
        step: the function.
        device: that it uses.
        warm: calls beforehand.
        steps: calls that are timed.
        scratch: folder for the profiler.
    """
    found = Measured()
    for _ in range(warm):
        step()
    _wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    found.host = (time.perf_counter() - began) / steps * 1e3
    _wait(device)
    found.milliseconds = (time.perf_counter() - began) / steps * 1e3
    _note_memory(found, device)
    with _watching(device) as warned:
        for _ in range(WATCHED):
            step()
    _note_waits(found, warned)
    _wait(device)
    with _profiling(device) as profiler:
        for _ in range(PROFILED):
            step()
        _wait(device)
    found.summary = _summary(profiler, device, scratch, None)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _note_memory(found: Measured, device: torch.device) -> None:
    if device.type == "cuda":
        found.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
        found.reserved_gib = torch.cuda.max_memory_reserved(device) / 2**30


def _note_waits(found: Measured, warned: Sequence[warnings.WarningMessage]) -> None:
    found.where = [str(w.message) for w in warned if "synchroniz" in str(w.message)]
    found.waits = len(found.where) / WATCHED


@contextmanager
def _watching(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """Collect warnings, of which torch gives one for everything that waits for the device."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.set_warn_always(True)
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield warned
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                torch.set_warn_always(False)


def _profiling(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def _summary(profiler: profile, device: torch.device, folder: Path, kept: Path | None) -> Summary:
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    if kept is not None:
        keep(kept, trace)
    on_device = ON_DEVICE if device.type == "cuda" else frozenset({"cpu_op"})
    return summarised(trace["traceEvents"], PROFILED, on_device)
