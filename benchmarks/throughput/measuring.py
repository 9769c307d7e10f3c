"""Figures of every way of sampling that may be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.throughput.memory import peak_tensor_bytes
from benchmarks.throughput.report import aligned, figure
from benchmarks.throughput.sampling import Job, Parity, Recording, SamplerName, all_ways, check
from benchmarks.throughput.subject import Subject
from benchmarks.throughput.timing import Spread, interleaved, rates, speed_ups, timed

LEGEND = """\
images/s: median [quartiles]. ×ref: over the reference, median [quartiles] of paired repetitions.
MiB: peak of tensors beyond the weights. error: largest difference at any step from the sampler's
standard (cached: from caching by hand), relative where values exceed one."""


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


@dataclass(frozen=True)
class Measured:
    """All rows, and every repetition."""

    rows: list[Row]
    seconds: dict[str, list[float]]
    """By way."""

    @property
    def failed(self) -> bool:
        """Whether any way computed other samples than it should."""
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
    recordings: dict[str, Recording] = {}
    parities = {}
    for way in ways:
        progress(f"checking {way.label}")
        parities[way.label] = check(way, recordings, subject.device)
    recordings.clear()
    sound = [way for way in ways if parities[way.label].problem is None]
    # Two steps meet every state that memory can be in.
    short = {way.label: way for way in all_ways(subject, replace(job, steps=2), samplers)}
    memory = {
        way.label: peak_tensor_bytes(short[way.label].sample, subject.device) for way in sound
    }
    progress(f"timing {len(sound)} ways in turn, {rounds} rounds")
    works = {way.label: partial(timed, way.sample, subject.device) for way in sound}
    for warm_up in works.values():
        warm_up()
    seconds = interleaved(rounds, works)
    baseline = seconds.get(ways[0].label)
    rows = []
    for way in ways:
        row = Row(way.name, way.sampler, parities[way.label])
        if (found := seconds.get(way.label)) is not None:
            row = replace(
                row,
                images_per_second=rates(found, job.batch),
                speed_up=None if baseline is None else speed_ups(baseline, found),
                peak_mib=memory[way.label] / 2**20,
            )
        rows.append(row)
    return Measured(rows, seconds)


def table(measured: Measured) -> list[str]:
    """All rows, the failures in words, and what the columns mean."""
    lines = aligned(["way", "images/s", "×ref", "MiB", "error"], [*map(_cells, measured.rows)])
    lines.append("")
    for row in measured.rows:
        if row.parity.problem is not None:
            lines.append(f"FAILED {row.sampler}: {row.name}: {row.parity.problem}")
    return [*lines, *LEGEND.splitlines()]


def _cells(row: Row) -> list[str]:
    """A row of the table; a way that must not be timed has no figures."""
    name, parity, rate = f"{row.sampler}: {row.name}", row.parity, row.images_per_second
    if parity.problem is not None or rate is None or row.peak_mib is None:
        return [name, *["–"] * 3, "FAILED"]
    error = "standard" if parity.difference is None else f"{parity.difference:.0e}"
    digits = 1 if rate.median >= 10 else 3
    return [name, figure(rate, digits), figure(row.speed_up, 2), f"{row.peak_mib:.1f}", error]
