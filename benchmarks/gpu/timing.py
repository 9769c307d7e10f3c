"""Achieved bandwidth of each operation: the bytes that its job cannot do without, over its time.

Each is measured beside the same job as a textbook has it, that compiled, and a copy on the device
of as many bytes. One pass calls an operation on a set of inputs whose bytes exceed every cache, and
keeps all outputs, so that nothing is found there that the pass before left. A pass is captured in a
CUDA graph: its time is the device's, without the host's launches, which are timed apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from benchmarks.gpu.item import Row
from torch import Tensor

from ddpm_engine import graphs

T = TypeVar("T")
Arguments = dict[str, Any]

Timer = Callable[[Callable[[], object]], float]
"""Runs a function and returns how long it took, in milliseconds."""

Way = Callable[..., object]

BEYOND_CACHES = 512 * 2**20
"""Bytes of a pass, at least: twice the largest last-level cache of today's GPUs (256 MiB)."""
REPEATS = 50
LAUNCHED = 24
"""Calls of a pass that is timed as the host launches it."""


@dataclass(frozen=True)
class Job:
    """One operation at one size, and the ways to do it."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    make: Callable[[], Arguments]
    """New arguments of every way."""
    ways: dict[str, Way]


def named(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def compiled(function: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """Compile in one graph; by inductor on a GPU."""
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def captured(function: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Record what a function launches as a CUDA graph, and return what replays it.

    The function is called beforehand, to compile: what it changes in place is changed. Where there
    are no graphs the function itself is returned.
    """
    if device.type != "cuda":
        return function
    outputs: list[T] = []

    def work() -> None:
        outputs[:] = [function()]

    with graphs.as_captured(device):
        for _ in range(3):
            work()
    outputs.clear()
    replay = graphs.captured(work)

    def replayed() -> T:
        replay()
        return outputs[0]

    return replayed


def cuda_timer(function: Callable[[], object]) -> float:
    """By events. A pass ahead of the clock keeps the device busy while the next is queued."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    function()
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def host_timer(function: Callable[[], object]) -> float:
    """By the host's clock, for devices that compute before they return."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def timer_of(device: torch.device) -> Timer:
    """The clock of a device."""
    return cuda_timer if device.type == "cuda" else host_timer


def interleaved(
    ways: Mapping[str, Callable[[], object]], timer: Timer, repeats: int
) -> dict[str, list[float]]:
    """Time every way in turn, each round beginning with another, after two rounds of warm-up."""
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-2, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            elapsed = timer(ways[name])
            if repeat >= 0:
                times[name].append(elapsed)
    return times


def sweep(way: Way, sets: list[Arguments]) -> list[object]:
    """One pass; the outputs are returned so that no two calls write to the same memory."""
    return [way(**arguments) for arguments in sets]


def copy_of(block: Tensor) -> Tensor:
    """The device's copy, which reads and writes the bytes of a block."""
    return block.clone()


def measure(
    job: Job, device: torch.device, timer: Timer, repeats: int, beyond: int = BEYOND_CACHES
) -> list[Row]:
    """Time every way of a job, and a copy of as many bytes. Microseconds of one call, GB/s.

    Of the device, unless it says *launched*: that is with the host's launches, one after another.
    """
    calls = max(2, -(-beyond // job.bytes))
    sets = [job.make() for _ in range(calls)]
    blocks: list[Arguments] = [
        {"block": torch.empty(job.bytes // 2, dtype=torch.uint8, device=device)} for _ in sets
    ]
    ways = {**{name: (way, sets) for name, way in job.ways.items()}, "copy": (copy_of, blocks)}
    times = interleaved(
        {name: captured(partial(sweep, *of), device) for name, of in ways.items()}, timer, repeats
    )
    few = {
        name: partial(sweep, way, arguments[:LAUNCHED]) for name, (way, arguments) in ways.items()
    }
    launched = interleaved(few, timer, max(1, repeats // 5))
    copied = median(times["copy"])
    return [
        {
            "job": f"{job.operation} {sized(job.shape)} {named(job.dtype)}",
            "way": name,
            "µs": median(found) / calls * 1e3,
            "µs, least": min(found) / calls * 1e3,
            "µs, launched": median(launched[name]) / min(calls, LAUNCHED) * 1e3,
            "GB/s": job.bytes / (median(found) / calls) / 1e6,
            "of the copy, %": 100 * copied / median(found),
            "calls": calls,
        }
        for name, found in times.items()
    ]


def sized(shape: tuple[int, ...]) -> str:
    """Return `4×3×64×64`."""
    return "×".join(map(str, shape))


def microseconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Time one call, as the host launches it: the median of some, the device kept busy."""
    return 1e3 * median(interleaved({"": function}, timer_of(device), repeats)[""])


def normals(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return normals in channels-last memory."""
    values = torch.randn(shape, dtype=dtype, device=device)
    return values.contiguous(memory_format=torch.channels_last)
