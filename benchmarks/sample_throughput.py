"""Images a second: `python benchmarks/sample_throughput.py`.

The same pictures, from the same weights and the same number of network evaluations, are drawn by a
textbook loop, by diffusers' pipelines if it is installed, and by the engine: eager, compiled, and
compiled with cached features (which makes other pictures, those of caching by hand). Every way is
first given the engine's noise and compared at every step; one that draws anything else gets no
figure, and the exit status is 1. Then they are timed in turn, so that a busy machine is as busy for
all of them.

By default the network is that of the preset with random weights: speed does not depend on them.
With `--equal-quality`, which takes about an hour and a trained model of the digits, the question is
how many steps each sampler, and each model distilled from it, needs for the quality of a thousand.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import torch
from benchmarks.throughput import equal_quality as quality
from benchmarks.throughput.gallery import students_of
from benchmarks.throughput.machine import facts
from benchmarks.throughput.measuring import Measured, measure
from benchmarks.throughput.profile import evaluation, shares_by_operation
from benchmarks.throughput.profile import table as profile_table
from benchmarks.throughput.report import plot_bars, plot_quality, table, write_json
from benchmarks.throughput.sampling import Job, SamplerName
from benchmarks.throughput.subject import Subject, preset_subject, subject_of

from ddpm_engine.cli.options import (
    Device,
    Positive,
    PositiveOrNone,
    exit_on_user_error,
    parse_options,
)
from ddpm_engine.errors import UserError

JOBS = {"digits": Job(16, 50), "photos": Job(8, 20), "cifar10": Job(2, 5), "celebahq256": Job(1, 2)}
"""Minutes of two cores at most. Speeds of longer chains are not extrapolated from them."""


@dataclass(frozen=True)
class Options:
    """Images a second of the engine, a textbook loop and diffusers."""

    preset: Literal["digits", "photos", "cifar10", "celebahq256"] = "digits"
    """Whose network, with random weights."""
    checkpoint: Path | None = None
    """A run directory: its network instead, with its weights."""
    batch: PositiveOrNone = None
    """Pictures at once; default: 16, 8, 2 or 1, by preset."""
    steps: PositiveOrNone = None
    """Network evaluations a picture, a divisor of T; default: 50, 20, 5 or 2, by preset."""
    samplers: tuple[SamplerName, ...] = ("ddpm", "ddim", "dpm++2m")
    """Which samplers."""
    rounds: Positive = 7
    """Repetitions of each way."""
    device: Device = "cpu"
    """Where, such as cuda."""
    json: Path | None = None
    """Write everything here."""
    plot: Path | None = None
    """Write a plot here."""
    profile: bool = False
    """Show which operations of the network take the time (on a CPU)."""
    equal_quality: bool = False
    """Find the steps that each sampler needs, and write benchmarks/results/equal_quality.json."""
    distilled: tuple[Path, ...] = ()
    """With `--equal-quality`: what launch/distill.py has made of the run, too."""
    thoroughness: quality.Settings = field(default_factory=quality.Settings)
    """Of `--equal-quality`."""


def progress(line: str) -> None:
    """Say what is going on, apart from the report."""
    print(line, file=sys.stderr, flush=True)


def subject_asked_for(options: Options, device: torch.device) -> Subject:
    """A preset's network, or that of a run."""
    if options.checkpoint is None:
        return preset_subject(options.preset, device)
    return subject_of(options.checkpoint, device)


def compare_speed(options: Options) -> Measured:
    """Measure, print, write."""
    device = torch.device(options.device)
    default = JOBS[options.preset]
    job = Job(options.batch or default.batch, options.steps or default.steps)
    subject = subject_asked_for(options, device)
    machine = facts(device)
    measured = measure(subject, job, options.samplers, options.rounds, progress)
    machine["load_average_after"] = facts(device)["load_average"]
    title = f"{subject.name}: batch {job.batch}, {job.steps} evaluations a picture"
    print(f"{title}; {machine['device']}, {machine['threads']} threads")
    print(f"load average {machine['load_average']} → {machine['load_average_after']}\n")
    print("\n".join(table(measured)))
    if options.profile:
        shares = shares_by_operation(evaluation(subject, job.batch))
        print("\n" + "\n".join(profile_table("the eager network", shares)))
    earlier = quality.committed()
    if earlier is not None:
        print("\nMeasured earlier, not now:\n" + "\n".join(quality.table(earlier)))
    if options.json is not None:
        write_json(
            options.json,
            {"machine": machine, "subject": subject.name, "job": job, "measured": measured},
        )
    if options.plot is not None:
        plot_bars(
            options.plot,
            title,
            {
                f"{row.sampler}: {row.name}": row.images_per_second
                for row in measured.rows
                if row.images_per_second is not None
            },
        )
    return measured


def compare_quality(options: Options) -> None:
    """Draw, compare with real digits, print, write."""
    if options.checkpoint is None:
        raise UserError(
            "--equal-quality needs a trained model of the digits: train one with `make demo`, and "
            "give --checkpoint runs/digits"
        )
    device = torch.device(options.device)
    subject = subject_of(options.checkpoint, device)
    students = students_of(options.distilled, device)
    folder = options.checkpoint / "pictures-by-method"
    found = quality.run(subject, students, folder, options.thoroughness, progress)
    print("\n".join(quality.table(found)))
    write_json(options.json or quality.RESULT, found)
    if options.plot is not None:
        reference = {**found["reference"], "name": quality.REFERENCE}
        plot_quality(options.plot, subject.name, [reference, *found["peers"], *found["points"]])


def main() -> int:
    """Run one of the two comparisons."""
    with exit_on_user_error():
        options = parse_options(Options)
        if options.equal_quality:
            compare_quality(options)
            return 0
        return int(compare_speed(options).failed)
    return 1


if __name__ == "__main__":
    sys.exit(main())
