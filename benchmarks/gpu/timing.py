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
from statistics import median
from typing import Any

import torch
from benchmarks.gpu import inputs
from benchmarks.gpu.capture import captured
from benchmarks.gpu.checks import Extent, compiled, named
from benchmarks.gpu.inputs import Arguments, values_of
from torch import Tensor

from ddpm_kernels import denoising_loss, group_norm_silu, q_sample, reverse_step

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
    """Calls in a pass, each on tensors of its own."""
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


def sizes(
    shapes: tuple[tuple[int, ...], ...],
) -> Iterator[tuple[tuple[int, ...], torch.dtype, int]]:
    """Each shape in bfloat16, of several the middle one in float32; with the bytes of a tensor."""
    for shape in shapes:
        yield shape, torch.bfloat16, 2 * values_of(shape)
    if len(shapes) > 1:
        middle = shapes[len(shapes) // 2]
        yield middle, torch.float32, 4 * values_of(middle)


def three_ways(ours: Way, textbook: Callable[..., object], device: torch.device) -> dict[str, Way]:
    """Ours, the textbook's, and that compiled."""
    return {"engine": ours, "textbook": textbook, "compiled": compiled(textbook, device)}


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normals in channels-last memory."""
    values = torch.randn(shape, dtype=dtype, device=device)
    return values.contiguous(memory_format=torch.channels_last)


def training_batch(shape: tuple[int, ...], device: torch.device) -> Arguments:
    """What the forward process takes, with uint8 images as a loader leaves them."""
    given = inputs.moved(inputs.of_q_sample(shape, torch.uint8), device)
    given["images"] = given["images"].contiguous(memory_format=torch.channels_last)
    given["flip"] = None
    return given


def q_sample_jobs(device: torch.device, extent: Extent) -> Iterator[Job]:
    """Must read the images and write x_t."""
    for shape, dtype, size in sizes(IMAGES[extent]):
        shared = training_batch(shape, device)

        def make(given: Arguments = shared) -> Arguments:
            return {**given, "images": given["images"].clone()}

        def ours(dtype: torch.dtype = dtype, **given: Any) -> object:
            return q_sample(**given, dtype=dtype)

        def textbook(
            images: Tensor, timesteps: Tensor, sqrt_alpha_bar: Tensor,
            sqrt_one_minus_alpha_bar: Tensor, dtype: torch.dtype = dtype, **_: Any,
        ) -> object:  # fmt: skip
            signal, sigma = sqrt_alpha_bar[timesteps], sqrt_one_minus_alpha_bar[timesteps]
            return inputs.textbook_q_sample(images, signal, sigma, dtype)

        ways = three_ways(ours, textbook, device)
        yield Job("q_sample", shape, dtype, values_of(shape) + size, make, ways)


def denoising_loss_jobs(device: torch.device, extent: Extent) -> Iterator[Job]:
    """Loss and gradient on the noise: must read the prediction and write the gradient."""
    for shape, dtype, size in sizes(IMAGES[extent]):
        shared = training_batch(shape, device)
        shared["weights"] = torch.ones(shape[0], device=device)

        def make(
            given: Arguments = shared, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> Arguments:
            prediction = draw(shape, dtype, device).requires_grad_()
            return {**given, "prediction": prediction, "noise": draw(shape, dtype, device)}

        def gradient(function: Callable[..., Tensor], prediction: Tensor, **given: Any) -> object:
            loss = function(prediction=prediction, **given)
            return torch.autograd.grad(loss.mean(), prediction)

        def ours(noise: Tensor, **given: Any) -> object:
            return gradient(denoising_loss, **given)

        by_textbook = partial(with_noise, gradient, inputs.textbook_loss)
        by_compiled = partial(with_noise, gradient, compiled(inputs.textbook_loss, device))
        ways: dict[str, Way] = {"engine": ours, "textbook": by_textbook, "compiled": by_compiled}
        yield Job("denoising_loss and gradient", shape, dtype, 2 * size, make, ways)


def with_noise(
    gradient: Way, loss: Way, prediction: Tensor, noise: Tensor, weights: Tensor, **_: Any
) -> object:
    """The textbook's loss, of the noise that it has kept."""
    return gradient(loss, prediction=prediction, noise=noise, weights=weights)


def reverse_step_jobs(device: torch.device, extent: Extent) -> Iterator[Job]:
    """Must read the output, and read and write the state, which is float32."""
    for shape, dtype, size in sizes(IMAGES[extent]):
        shared = inputs.moved(inputs.of_reverse_step(shape, dtype), device)
        for unused in ("unconditional", "rescale", "threshold", "history"):
            del shared[unused]
        # A chain that stays in bounds, however often it is stepped.
        shared["table"] = torch.full_like(shared["table"], 0.25)

        def make(
            given: Arguments = shared, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> Arguments:
            x, output = draw(shape, torch.float32, device), draw(shape, dtype, device)
            return {**given, "x": x, "output": output}

        def textbook(x: Tensor, output: Tensor, table: Tensor, row: Tensor, **_: Any) -> Tensor:
            return inputs.textbook_reverse_step(x, output, table.index_select(0, row[None])[0])

        ways = three_ways(partial(reverse_step, in_place=True), textbook, device)
        yield Job("reverse_step", shape, dtype, 8 * values_of(shape) + size, make, ways)


def group_norm_silu_jobs(device: torch.device, extent: Extent) -> Iterator[Job]:
    """With scale and shift. Must read x and write y; backward, read x and dy and write dx."""
    for shape, dtype, size in sizes(FEATURES[extent]):
        given = inputs.of_group_norm_silu((shape[0], shape[1], 1, 1), 32, dtype, True)
        shared = inputs.moved(given, device)
        upstream = draw(shape, dtype, device)

        def make(
            given: Arguments = shared, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> Arguments:
            return {**given, "x": draw(shape, dtype, device)}

        def make_leaves(make: Callable[[], Arguments] = make) -> Arguments:
            given = make()
            leaves = ("x", "weight", "bias", "scale", "shift")
            return {k: v.clone().requires_grad_() if k in leaves else v for k, v in given.items()}

        def both(function: Callable[..., Any], upstream: Tensor = upstream, **given: Any) -> object:
            y = function(**given)
            return y, torch.autograd.grad(y, [v for v in given.values() if needs_grad(v)], upstream)

        textbook = inputs.textbook_group_norm
        ways = three_ways(group_norm_silu, textbook, device)
        yield Job("group_norm_silu", shape, dtype, 2 * size, make, ways)
        again = three_ways(group_norm_silu, textbook, device)
        ways = {name: partial(both, way) for name, way in again.items()}
        yield Job("group_norm_silu and gradient", shape, dtype, 5 * size, make_leaves, ways)


def needs_grad(value: Any) -> bool:
    """Whether an argument is a tensor to differentiate by."""
    return isinstance(value, Tensor) and value.requires_grad


JOBS: dict[str, Callable[[torch.device, Extent], Iterator[Job]]] = {
    "q_sample": q_sample_jobs,
    "denoising_loss": denoising_loss_jobs,
    "reverse_step": reverse_step_jobs,
    "group_norm_silu": group_norm_silu_jobs,
}
