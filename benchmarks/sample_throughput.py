"""Images per second of sampling: `python benchmarks/sample_throughput.py`.

The same samples, from the same weights and the same number of network evaluations, are computed by
a textbook loop, by diffusers' pipelines if it is installed, and by the engine: eager, compiled, and
with cached features (which gives other samples, those of caching by hand). Every way first gets the
engine's noise and is compared at every step; one that computes anything else gets no figure, and
the exit status is 1. Then they are timed in turn, so that a busy machine is as busy for all.

By default the network is that of the preset with random weights: speed does not depend on them.
With `--equal-quality`, which needs about an hour and a trained model of the digits, it finds how
many steps each sampler, and each distilled model, needs for the quality of a thousand.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import torch
from benchmarks.throughput import equal_quality as quality
from benchmarks.throughput.digits import load, load_distilled
from benchmarks.throughput.machine import facts
from benchmarks.throughput.measuring import Measured, measure, table
from benchmarks.throughput.profile import evaluation, shares_by_operation
from benchmarks.throughput.profile import table as profile_table
from benchmarks.throughput.report import plot_bars, plot_quality, write_json
from benchmarks.throughput.sampling import Job, SamplerName
from benchmarks.throughput.subject import Subject, preset_subject, subject_of

from ddpm_engine.cli.options import (
    Device,
    Positive,
    PositiveOrNone,
    exit_on_error,
    parse_options,
)
from ddpm_engine.errors import UserError

JOBS = {"digits": Job(16, 50), "photos": Job(8, 20), "cifar10": Job(2, 5), "celebahq256": Job(1, 2)}
"""Minutes of two cores at most. Speeds of longer chains are not extrapolated from them."""


@dataclass(frozen=True)
class Options:
    """Images per second of the engine, a textbook loop and diffusers."""

    preset: Literal["digits", "photos", "cifar10", "celebahq256"] = "digits"
    """Network of this preset, with random weights."""
    checkpoint: Path | None = None
    """Run directory whose network and weights to use instead."""
    batch: PositiveOrNone = None
    """Samples at once; default: 16, 8, 2 or 1, by preset."""
    steps: PositiveOrNone = None
    """Network evaluations per sample, a divisor of T; default: 50, 20, 5 or 2, by preset."""
    samplers: tuple[SamplerName, ...] = ("ddpm", "ddim", "dpm++2m")
    """Samplers to measure."""
    rounds: Positive = 7
    """Repetitions of each way."""
    device: Device = "cpu"
    """Device, such as cuda."""
    json: Path | None = None
    """File for everything, as JSON."""
    plot: Path | None = None
    """File for a plot."""
    profile: bool = False
    """Print which operations of the network take the time (on a CPU)."""
    equal_quality: bool = False
    """Find the steps that each sampler needs, and write benchmarks/results/equal_quality.json."""
    distilled: tuple[Path, ...] = ()
    """Runs distilled from it, for `--equal-quality`."""
    thoroughness: quality.Settings = field(default_factory=quality.Settings)
    """Settings of `--equal-quality`."""


def progress(line: str) -> None:
    """Print progress, apart from the report."""
    print(line, file=sys.stderr, flush=True)


def subject_asked_for(options: Options, device: torch.device) -> Subject:
    """A preset's network, or that of a run."""
    if options.checkpoint is None:
        return preset_subject(options.preset, device)
    return subject_of(load(options.checkpoint, device))


def compare_speed(options: Options) -> Measured:
    """Measure, print, write."""
    device = torch.device(options.device)
    default = JOBS[options.preset]
    job = Job(options.batch or default.batch, options.steps or default.steps)
    subject = subject_asked_for(options, device)
    machine = facts(device)
    measured = measure(subject, job, options.samplers, options.rounds, progress)
    machine["load_average_after"] = facts(device)["load_average"]
    title = f"{subject.name}: batch {job.batch}, {job.steps} evaluations per sample"
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
    """Sample, compare with the real digits, print, write."""
    if options.checkpoint is None:
        raise UserError(
            "`equal_quality` needs a trained model of the digits: train the preset digits, and "
            "give its run as `checkpoint`",
            field="checkpoint",
        )
    device = torch.device(options.device)
    study = quality.Study(
        load(options.checkpoint, device),
        load_distilled(options.distilled, device),
        options.checkpoint / "samples-by-method",
        options.thoroughness,
    )
    found = quality.run(study, progress)
    print("\n".join(quality.table(found)))
    write_json(options.json or quality.RESULT, found)
    if options.plot is not None:
        reference = {**found["reference"], "name": quality.REFERENCE}
        plot_quality(options.plot, found["subject"], [reference, *found["peers"], *found["points"]])


def main() -> int:
    """Run one of the two comparisons."""
    with exit_on_error():
        options = parse_options(Options)
        if options.equal_quality:
            compare_quality(options)
            return 0
        return int(compare_speed(options).failed)
    return 1


if __name__ == "__main__":
    sys.exit(main())
