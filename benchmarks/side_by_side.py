"""A teacher and a model distilled from it, side by side: `python benchmarks/side_by_side.py`.

Both generate the same digits, conditioned on the class, from the same noise; the teacher is guided,
the other has guidance built in. Above each grid stands how long it took, the median of rounds in
turn, and how many of the digits a classifier of real ones assigns to their class.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import numpy as np
from benchmarks.throughput.digits import DigitMetrics, in_turn, load, load_distilled
from benchmarks.throughput.timing import interleaved, timed

from ddpm_engine.cli.options import Positive, exit_on_error, parse_options
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import CLASSES
from ddpm_engine.evaluation.metrics import classified_as_conditioned
from ddpm_engine.images.grid import class_grid
from ddpm_engine.plots.style import saved, show_image
from ddpm_engine.runtime import local_device
from ddpm_engine.samplers.config import SamplerName
from ddpm_engine.samplers.sampler import Sampler


@dataclass(frozen=True)
class Options:
    """Generate the same digits with a teacher and with a model distilled from it."""

    checkpoint: Path = Path("runs/digits-classes")
    """Run directory of the teacher, a class-conditional model of the digits."""
    distilled: Path = Path("runs/digits-fast")
    """Run directory of the distilled model."""
    out: Path = Path("runs/digits-fast/pictures/side-by-side.png")
    """File for the figure."""
    sampler: SamplerName = "ddpm"
    """Sampler of the teacher."""
    steps: Positive = 100
    """Steps per sample of the teacher."""
    guidance_scale: float = 2.0
    """Guidance scale of the teacher; 1 is no guidance."""
    count: Positive = 100
    """Number of digits, a multiple of ten."""
    rounds: Positive = 3
    """Repetitions of the timing."""


def main() -> None:
    """Sample, time, plot."""
    with exit_on_error(Options):
        options = parse_options(Options)
        if options.count < CLASSES or options.count % CLASSES:
            raise UserError(
                f"`count` is {options.count}; it must be a multiple of {CLASSES}", field="count"
            )
        device = local_device()
        teacher = load(options.checkpoint, device)
        ((_, student),) = load_distilled([options.distilled], device).items()
        if teacher.spec.null_class != CLASSES:
            raise UserError(
                f"`checkpoint` {options.checkpoint} is no model of ten digits", field="checkpoint"
            )
        few = student.sampling.steps or student.schedule.timesteps
        guided = teacher.request(
            sampler=options.sampler, steps=options.steps, guidance=options.guidance_scale
        )
        samplers = {
            f"{options.sampler}, {options.steps} steps, guided": Sampler(teacher, guided),
            f"distilled to {few} step{'s' * (few > 1)}": Sampler(student, student.request()),
        }
        works = {
            way: partial(sampler.images, range(options.count), batch_size=options.count)
            for way, sampler in samplers.items()
        }
        images = {way: work() for way, work in works.items()}
        times = interleaved(
            options.rounds, {way: partial(timed, work, device) for way, work in works.items()}
        )
        digits = DigitMetrics.of_size(teacher.shape[-1])
        labels = in_turn(options.count)
        seconds = {way: median(each) for way, each in times.items()}
        grids = {}
        for way, found in images.items():
            right = int(classified_as_conditioned(digits.features(found, labels)).sum())
            title = f"{way}\n{seconds[way]:.2f} s for {options.count}, {right} of their class"
            grids[title] = np.asarray(class_grid(found, labels))
            print(title.replace("\n", ": "))
        slow, fast = seconds.values()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with saved(options.out, 10, 5.6, 1, 2) as (_, axes):
            for panel, (title, grid) in zip(axes[0], grids.items(), strict=True):
                show_image(panel, grid)
                panel.set_title(title)
        print(f"{slow / fast:.0f} times as fast; look at {options.out}")


if __name__ == "__main__":
    main()
