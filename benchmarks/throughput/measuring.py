"""Figures of every way that may be timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import nan

import torch
from benchmarks.throughput.machine import peak_works
from benchmarks.throughput.sampling import Chain, Job, Parity, SamplerName, Way, all_ways, check
from benchmarks.throughput.subject import Subject
from benchmarks.throughput.timing import Spread, interleaved, rates, speed_ups, timed
from benchmarks.throughput.watching import (
    Stopwatch,
    around,
    operations_around,
    peak_tensor_bytes,
)
from torch.utils.flop_counter import FlopCounterMode

from ddpm_kernels.dispatch import force_ops


@dataclass(frozen=True)
class Operations:
    """What one step issues: the mean over two steps in the middle of a chain."""

    outside: float
    """Operations outside the network, views and allocations apart."""
    inside: float
    waits_outside: float
    """How often the host reads a value from the device."""
    waits_inside: float


@dataclass(frozen=True)
class Row:
    """A way and its figures; None where there is none to give."""

    name: str
    sampler: str
    parity: Parity
    images_per_second: Spread | None = None
    speed_up: Spread | None = None
    """Over the reference, of paired repetitions."""
    peak_mib: float | None = None
    """Of tensors, beyond the weights."""
    outside_share: Spread | None = None
    """Share of the time that is not spent in the network; CPU only."""
    peak_share: Spread | None = None
    """What the network computes a second while it runs, of the machine's peak; CPU only."""
    operations: Operations | None = None
    """As run here. A compiled network is counted as it is before compilation."""
    gpu_operations: Operations | None = None
    """The same where the engine's kernels take over, as on a GPU."""


@dataclass(frozen=True)
class Measured:
    """All rows and what they share."""

    rows: list[Row]
    flops_per_image: float
    """Float operations of one evaluation of the network for one image."""
    peak_flops: dict[str, Spread]
    """What the machine reached, a second, by work."""
    seconds: dict[str, list[float]]
    """Every repetition, by way."""

    @property
    def failed(self) -> bool:
        """Whether any way drew other pictures than it should."""
        return any(row.parity.problem for row in self.rows)


def measure(
    subject: Subject,
    job: Job,
    samplers: tuple[SamplerName, ...],
    rounds: int,
    progress: Callable[[str], None],
) -> Measured:
    """Check every way, then time those that passed, in turn."""
    ways = all_ways(subject, job, samplers)
    chains: dict[str, Chain] = {}
    parities = {}
    for way in ways:
        progress(f"checking {way.label}")
        parities[way.label] = check(way, chains, subject.device)
    sound = [way for way in ways if parities[way.label].problem is None]

    flops: dict[str, float] = {}
    memory, counts, gpu_counts = {}, {}, {}
    # Operations do not depend on the batch, the network's work is in proportion to it, and two
    # steps meet every state that memory can be in: short chains tell it all.
    few = {
        steps: by_label(subject, replace(job, batch=1, steps=steps), samplers) for steps in (2, 4)
    }
    pairs = by_label(subject, replace(job, steps=2), samplers)
    for way in sound:
        progress(f"counting {way.label}")
        flops[way.label] = flops_of(few[4][way.label]) / 4 * job.steps * job.batch
        counts[way.label] = operations(few[2][way.label], few[4][way.label], subject)
        with force_ops():
            gpu_counts[way.label] = operations(few[2][way.label], few[4][way.label], subject)
        memory[way.label] = peak_tensor_bytes(pairs[way.label].draw, subject.device)

    progress(f"timing {len(sound)} ways in turn, {rounds} rounds")
    inside: dict[str, list[float]] = {way.label: [] for way in sound}
    works = {way.label: timer(way, inside[way.label], subject.device) for way in sound}
    peaks = peak_works(subject.device)
    for warm_up in [*works.values(), *peaks.values()]:
        warm_up()
    for times in inside.values():
        times.clear()
    figures = interleaved(rounds, works | peaks)
    seconds = {label: figures[label] for label in works}
    peak = [max(pair) for pair in zip(*(figures[name] for name in peaks), strict=True)]

    rows = []
    baseline = seconds.get(ways[0].label)
    on_cpu = subject.device.type == "cpu"
    for way in ways:
        label = way.label
        row = Row(way.name, way.sampler, parities[label])
        if label in seconds:
            work = flops[label]
            row = replace(
                row,
                images_per_second=rates(seconds[label], job.batch),
                speed_up=None if baseline is None else speed_ups(baseline, seconds[label]),
                peak_mib=memory[label] / 2**20,
                outside_share=shares(seconds[label], inside[label]) if on_cpu else None,
                peak_share=Spread.of(
                    [work / i / p for i, p in zip(inside[label], peak, strict=True)]
                )
                if on_cpu
                else None,
                operations=counts[label],
                gpu_operations=gpu_counts[label],
            )
        rows.append(row)
    evaluations = job.batch * job.steps
    reference = flops.get(ways[0].label, nan)
    peak_flops = {name: Spread.of(figures[name]) for name in peaks}
    return Measured(rows, reference / evaluations, peak_flops, seconds)


def by_label(subject: Subject, job: Job, samplers: tuple[SamplerName, ...]) -> dict[str, Way]:
    """The same ways for another job."""
    return {way.label: way for way in all_ways(subject, job, samplers)}


def timer(way: Way, inside: list[float], device: torch.device) -> Callable[[], float]:
    """A work that returns its seconds, and notes those spent in the network."""

    def work() -> float:
        watch = Stopwatch()
        # On a GPU the clock would tell of launches only.
        watching = around(way.network, watch.start, watch.stop) if device.type == "cpu" else None
        with watching or nullcontext():
            seconds = timed(way.draw, device)
        inside.append(watch.seconds)
        return seconds

    return work


def shares(seconds: list[float], inside: list[float]) -> Spread:
    """Share of the time outside."""
    return Spread.of([1 - i / s for s, i in zip(seconds, inside, strict=True)])


def operations(two: Way, four: Way, subject: Subject) -> Operations:
    """Count a step: half of what four steps issue more than two; what is done once drops out.

    A compiled network is counted as it is before compilation.
    """
    counts = []
    for way in (two, four):
        way = way.uncompiled or way
        with operations_around(way.network) as counter:
            way.draw()
        counts.append(counter)
    fewer, more = counts
    outside, inside = more.outside - fewer.outside, more.inside - fewer.inside
    return Operations(
        outside.operations / 2, inside.operations / 2, outside.waits / 2, inside.waits / 2
    )


def flops_of(way: Way) -> float:
    """Float operations of one draw by convolutions, matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        (way.uncompiled or way).draw()
    return float(counter.get_total_flops())
