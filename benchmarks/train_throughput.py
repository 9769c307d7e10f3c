"""Images per second of training: `python benchmarks/train_throughput.py`.

A full step, from a batch in memory to new weights and their average: draw timesteps and noise, mix,
run the network, loss, gradient, clip, AdamW, moving average. It is taken by a loop as tutorials
write it, by the recipe of diffusers' example if diffusers is installed, and by the engine, eager
and compiled, all from the same weights with the same figures for the optimizer. Reading images is
in none of them; those of the first two come normalised, those of the engine as bytes.

Losses and gradient norms of the first steps, with the engine's timesteps and noise, are compared
before anything is timed; a way that computes others gets no figure, and the exit status is 1. Every
way is timed on its own network, in turn. Dropout is off, so that all compute the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import torch
from benchmarks.throughput import training
from benchmarks.throughput.machine import facts
from benchmarks.throughput.memory import peak_tensor_bytes
from benchmarks.throughput.profile import shares_by_operation
from benchmarks.throughput.profile import table as profile_table
from benchmarks.throughput.report import aligned, figure, plot_bars, write_json
from benchmarks.throughput.subject import Subject, preset_subject
from benchmarks.throughput.timing import Spread, interleaved, rates, speed_ups, timed

from ddpm_engine.cli.options import (
    Device,
    Positive,
    PositiveOrNone,
    exit_on_error,
    parse_options,
)

BATCHES = {"digits": 64, "photos": 32, "cifar10": 4, "celebahq256": 1}


@dataclass(frozen=True)
class Options:
    """Images per second of training steps."""

    preset: Literal["digits", "photos", "cifar10", "celebahq256"] = "digits"
    """Preset of the network and optimizer."""
    batch: PositiveOrNone = None
    """Images per step; default: 64 (the preset's), 32, 4 or 1, by preset."""
    rounds: Positive = 15
    """Repetitions of each way."""
    steps: Positive = 2
    """Training steps of a repetition."""
    device: Device = "cpu"
    """Device, such as cuda."""
    json: Path | None = None
    """File for everything, as JSON."""
    plot: Path | None = None
    """File for a plot."""
    profile: bool = False
    """Print which operations of the engine's eager step take the time (on a CPU)."""


@dataclass(frozen=True)
class Row:
    """A way and its figures; None where there is none to give."""

    name: str
    difference: float | None = None
    """Of the first losses and gradient norms from the plain loop's, relative."""
    problem: str | None = None
    """Why it must not be timed."""
    images_per_second: Spread | None = None
    speed_up: Spread | None = None
    """Over the plain loop, of paired repetitions."""
    peak_mib: float | None = None
    """Of tensors, beyond weights, averages and the optimizer's state."""


def check(way: training.Way, found: list[float], standard: list[float]) -> Row:
    """Compare losses and gradient norms."""
    error = training.difference(found, standard)
    problem = None
    if not error <= training.TOLERANCE:
        problem = (
            f"its losses and gradient norms {found} differ from {standard} by more than "
            f"{training.TOLERANCE:g}"
        )
    return Row(way.name, error, problem)


def measure(subject: Subject, options: Options, size: int) -> tuple[list[Row], list[list[float]]]:
    """Check every way, then time those that passed, in turn; also returns what was compared."""
    batch = training.batch_of(subject, size)
    ways = training.all_ways(subject, batch)
    first = []
    for way in ways:
        print(f"checking {way.name}", file=sys.stderr, flush=True)
        first.append(training.first_steps(way, batch, subject, 3))
    rows = [check(way, found, first[0]) for way, found in zip(ways, first, strict=True)]
    sound = [way for way, row in zip(ways, rows, strict=True) if row.problem is None]

    memory = {way.name: peak_tensor_bytes(way.step, subject.device) for way in sound}

    def repetition(way: training.Way) -> float:
        def steps() -> None:
            for _ in range(options.steps):
                way.step()

        return timed(steps, subject.device)

    print(f"timing {len(sound)} ways in turn, {options.rounds} rounds", file=sys.stderr)
    seconds = interleaved(options.rounds, {way.name: partial(repetition, way) for way in sound})
    baseline = seconds.get(ways[0].name)
    for place, row in enumerate(rows):
        if row.name in seconds:
            rows[place] = replace(
                row,
                images_per_second=rates(seconds[row.name], options.steps * size),
                speed_up=None if baseline is None else speed_ups(baseline, seconds[row.name]),
                peak_mib=memory[row.name] / 2**20,
            )
    return rows, first


def cells(row: Row) -> list[str]:
    """A row of the table."""
    if row.images_per_second is None or row.peak_mib is None:
        return [row.name, "–", "–", "–", "FAILED"]
    return [
        row.name,
        figure(row.images_per_second, 1 if row.images_per_second.median >= 10 else 3),
        figure(row.speed_up, 2),
        f"{row.peak_mib:.1f}",
        f"{row.difference:.0e}",
    ]


def main() -> int:
    """Measure, print, write."""
    with exit_on_error():
        options = parse_options(Options)
        device = torch.device(options.device)
        subject = preset_subject(options.preset, device)
        model = replace(subject.config.model, dropout=0.0)
        subject = replace(subject, config=replace(subject.config, model=model))
        size = options.batch or BATCHES[options.preset]
        machine = facts(device)
        rows, first = measure(subject, options, size)
        machine["load_average_after"] = facts(device)["load_average"]
        title = f"training {subject.name}: batch {size}"
        print(f"{title}; {machine['device']}, {machine['threads']} threads")
        print(f"load average {machine['load_average']} → {machine['load_average_after']}\n")
        header = ["way", "images/s", "×plain", "MiB", "error"]
        print("\n".join(aligned(header, [cells(row) for row in rows])))
        print(
            "\nimages/s: median [quartiles]; ×plain: of paired repetitions; MiB: peak of tensors in"
            "\na step beyond weights, averages and optimizer; error: of losses and gradient norms"
            "\nof three steps with the same noise, relative to the plain loop's."
        )
        for row in rows:
            if row.problem is not None:
                print(f"FAILED {row.name}: {row.problem}")
        if options.profile:
            way = training.engine_way(subject, training.batch_of(subject, size), compiled=False)
            shares = shares_by_operation(way.step)
            print("\n" + "\n".join(profile_table("the engine's eager step", shares, rows=16)))
        if options.json is not None:
            found = {"rows": rows, "losses_and_gradient_norms": first}
            about = {"machine": machine, "subject": subject.name, "batch": size}
            write_json(options.json, about | found)
        if options.plot is not None:
            timed_rows = {r.name: r.images_per_second for r in rows if r.images_per_second}
            plot_bars(options.plot, title, timed_rows)
        return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
