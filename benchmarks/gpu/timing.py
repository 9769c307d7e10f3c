"""Achieved bandwidth of each operation: the bytes that its job cannot do without, over its time.

Each is measured beside the same job as a textbook has it, that compiled, and a copy on the device
of as many bytes. One pass calls an operation on a set of inputs whose bytes exceed every cache, and
keeps all outputs, so that nothing is found there that the pass before left. A pass is captured in a
CUDA graph: its time is the device's, without the host's launches, which are timed apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median
from typing import Any, Literal, TypeVar

import torch
from benchmarks.gpu import textbook
from torch import Tensor

from ddpm_kernels import Column, denoising_loss, group_norm_silu, q_sample, reverse_step

T = TypeVar("T")
Arguments = dict[str, Any]
Extent = Literal["full", "quick", "tiny"]
"""How much is measured: all, the middle size, or what a CPU can do in seconds."""

Timer = Callable[[Callable[[], object]], float]
"""Runs a function and returns how long it took, in milliseconds."""

Way = Callable[..., object]

BEYOND_CACHES = 512 * 2**20
"""Bytes of a pass, at least: twice the largest last-level cache of today's GPUs (256 MiB)."""
REPEATS = 50
LAUNCHED = 24
"""Calls of a pass that is timed as the host launches it."""


@dataclass(frozen=True)
class Measurement:
    """One way of doing one job. Times are of one call, in microseconds."""

    operation: str
    shape: tuple[int, ...]
    dtype: str
    way: str
    bytes: int
    """What the job must read and write."""
    median: float
    """Of the device."""
    least: float
    """Of the device."""
    launched: float
    """Median with the host's launches, one call after the other."""
    calls: int
    """Calls in a pass, each on separate tensors."""
    repeats: int
    """Passes."""

    @property
    def bandwidth(self) -> float:
        """GB/s, by the median."""
        return self.bytes / self.median / 1e3


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
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()

    def replay() -> T:
        graph.replay()
        return outputs

    return replay


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
) -> list[Measurement]:
    """Time every way of a job, and a copy of as many bytes."""
    calls = max(2, -(-beyond // job.bytes))
    sets = [job.make() for _ in range(calls)]
    blocks: list[Arguments] = [
        {"block": torch.empty(job.bytes // 2, dtype=torch.uint8, device=device)} for _ in sets
    ]
    jobs = {**{name: (way, sets) for name, way in job.ways.items()}, "copy": (copy_of, blocks)}
    times = interleaved(
        {name: captured(partial(sweep, *of), device) for name, of in jobs.items()}, timer, repeats
    )
    few = {
        name: partial(sweep, way, arguments[:LAUNCHED]) for name, (way, arguments) in jobs.items()
    }
    launched = interleaved(few, timer, max(1, repeats // 5))
    return [
        Measurement(
            job.operation, job.shape, named(job.dtype), name, job.bytes,
            median(found) / calls * 1e3, min(found) / calls * 1e3,
            median(launched[name]) / min(calls, LAUNCHED) * 1e3,
            calls, repeats,
        )
        for name, found in times.items()
    ]  # fmt: skip


# --- The jobs

IMAGES: dict[Extent, tuple[tuple[int, ...], ...]] = {
    "full": ((64, 3, 32, 32), (256, 3, 64, 64), (64, 3, 256, 256)),
    "quick": ((256, 3, 64, 64),),
    "tiny": ((2, 3, 8, 8),),
}
FEATURES: dict[Extent, tuple[tuple[int, ...], ...]] = {
    "full": ((64, 512, 8, 8), (64, 256, 32, 32), (16, 128, 128, 128)),
    "quick": ((64, 256, 32, 32),),
    "tiny": ((2, 64, 4, 4),),
}
STEPS = 1000


def sizes(
    shapes: tuple[tuple[int, ...], ...],
) -> Iterator[tuple[tuple[int, ...], torch.dtype, int]]:
    """Each shape in bfloat16, of several the middle one in float32; with the bytes of a tensor."""
    for shape in shapes:
        yield shape, torch.bfloat16, 2 * prod(shape)
    if len(shapes) > 1:
        middle = shapes[len(shapes) // 2]
        yield middle, torch.float32, 4 * prod(middle)


def three_ways(ours: Way, textbook: Callable[..., object], device: torch.device) -> dict[str, Way]:
    """Return ours, the textbook's, and that compiled."""
    return {"engine": ours, "textbook": textbook, "compiled": compiled(textbook, device)}


def normals(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return normals in channels-last memory."""
    values = torch.randn(shape, dtype=dtype, device=device)
    return values.contiguous(memory_format=torch.channels_last)


def training_batch(shape: tuple[int, ...], device: torch.device) -> Arguments:
    """Return what the forward process and its loss share, images as a loader leaves them."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    ids = torch.arange(shape[0], device=device)
    return {
        "images": images.contiguous(memory_format=torch.channels_last),
        "timesteps": ids * 17 % STEPS,
        "seed": torch.full((), 5, device=device),
        "sample_ids": ids,
    }


def q_sample_jobs(device: torch.device, extent: Extent) -> Iterator[Job]:
    """Must read the images and write x_t."""
    alpha_bar = torch.linspace(0.99, 0.01, STEPS, device=device)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    for shape, dtype, size in sizes(IMAGES[extent]):
        shared = training_batch(shape, device)

        def make(given: Arguments = shared) -> Arguments:
            return {**given, "images": given["images"].clone()}

        def ours(
            images: Tensor, timesteps: Tensor, dtype: torch.dtype = dtype, **given: Any
        ) -> object:
            return q_sample(images, timesteps, signal, sigma, **given, dtype=dtype)

        def theirs(
            images: Tensor, timesteps: Tensor, dtype: torch.dtype = dtype, **_: Any
        ) -> object:
            return textbook.q_sample(images, signal[timesteps], sigma[timesteps], dtype)

        ways = three_ways(ours, theirs, device)
        yield Job("q_sample", shape, dtype, prod(shape) + size, make, ways)


def denoising_loss_jobs(device: torch.device, extent: Extent) -> Iterator[Job]:
    """Loss of the noise, and its gradient: must read the prediction and write the gradient."""
    ones = torch.ones(STEPS, device=device)
    for shape, dtype, size in sizes(IMAGES[extent]):
        shared = training_batch(shape, device)
        shared["weights"] = torch.ones(shape[0], device=device)

        def make(
            given: Arguments = shared, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> Arguments:
            prediction = normals(shape, dtype, device).requires_grad_()
            return {**given, "prediction": prediction, "noise": normals(shape, dtype, device)}

        def ours(noise: Tensor, prediction: Tensor, **given: Any) -> object:
            loss = denoising_loss(prediction, target_x0=None, target_noise=ones, **given)
            return torch.autograd.grad(loss.mean(), prediction)

        def theirs(
            prediction: Tensor, noise: Tensor, weights: Tensor, loss: Way = textbook.loss, **_: Any
        ) -> object:
            losses: Any = loss(prediction, noise, weights)
            return torch.autograd.grad(losses.mean(), prediction)

        ways: dict[str, Way] = {
            "engine": ours,
            "textbook": theirs,
            "compiled": partial(theirs, loss=compiled(textbook.loss, device)),
        }
        yield Job("denoising_loss and gradient", shape, dtype, 2 * size, make, ways)


def reverse_step_jobs(device: torch.device, extent: Extent) -> Iterator[Job]:
    """Must read the output, and read and write the state, which is float32."""
    for shape, dtype, size in sizes(IMAGES[extent]):
        shared = {
            # A chain that stays in bounds, however often it is stepped.
            "table": torch.full((5, Column.HISTORY), 0.25, device=device),
            "row": torch.full((), 3, device=device),
            "seed": torch.full((), 5, device=device),
            "sample_ids": torch.arange(shape[0], device=device),
        }

        def make(
            given: Arguments = shared, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> Arguments:
            x, output = normals(shape, torch.float32, device), normals(shape, dtype, device)
            return {"x": x, "output": output, **given}

        def theirs(x: Tensor, output: Tensor, table: Tensor, row: Tensor, **_: Any) -> Tensor:
            return textbook.reverse_step(x, output, table.index_select(0, row[None])[0])

        ways = three_ways(partial(reverse_step, in_place=True), theirs, device)
        yield Job("reverse_step", shape, dtype, 8 * prod(shape) + size, make, ways)


def group_norm_silu_jobs(device: torch.device, extent: Extent) -> Iterator[Job]:
    """With scale and shift. Must read x and write y; backward, read x and dy and write dx."""
    for shape, dtype, size in sizes(FEATURES[extent]):
        weight, bias = torch.randn(2, shape[1], dtype=dtype, device=device)
        scale, shift = torch.randn(2, *shape[:2], dtype=dtype, device=device)
        shared = {
            "groups": 32, "weight": weight, "bias": bias, "scale": scale, "shift": shift,
            "eps": 1e-5,
        }  # fmt: skip
        upstream = normals(shape, dtype, device)

        def make(
            given: Arguments = shared, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> Arguments:
            return {"x": normals(shape, dtype, device), **given}

        def make_leaves(make: Callable[[], Arguments] = make) -> Arguments:
            return {
                k: v.clone().requires_grad_() if isinstance(v, Tensor) else v
                for k, v in make().items()
            }

        def both(function: Callable[..., Any], upstream: Tensor = upstream, **given: Any) -> object:
            y = function(**given)
            leaves = [value for value in given.values() if isinstance(value, Tensor)]
            return y, torch.autograd.grad(y, leaves, upstream)

        ways = three_ways(group_norm_silu, textbook.group_norm_silu, device)
        yield Job("group_norm_silu", shape, dtype, 2 * size, make, ways)
        again = three_ways(group_norm_silu, textbook.group_norm_silu, device)
        ways = {name: partial(both, way) for name, way in again.items()}
        yield Job("group_norm_silu and gradient", shape, dtype, 5 * size, make_leaves, ways)


JOBS: tuple[Callable[[torch.device, Extent], Iterator[Job]], ...] = (
    q_sample_jobs,
    denoising_loss_jobs,
    reverse_step_jobs,
    group_norm_silu_jobs,
)
