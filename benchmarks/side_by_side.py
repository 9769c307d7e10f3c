"""A teacher and what was distilled from it, side by side: `python benchmarks/side_by_side.py`.

Both draw the same digits, asked for by class, from the same noise; the teacher is guided, the other
has guidance built in. Above each grid stands how long it took, the median of rounds in turn, and
how many of the digits a classifier of real ones takes for what was asked for.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import numpy as np
import torch
from benchmarks.throughput.gallery import Gallery, Method, students_of
from benchmarks.throughput.report import finish, pyplot
from benchmarks.throughput.subject import subject_of
from benchmarks.throughput.timing import interleaved, timed

from ddpm_engine.cli.options import Positive, exit_on_user_error, parse_options
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import digit_classifier
from ddpm_engine.images.grid import to_uint8
from ddpm_engine.samplers.config import SamplerName

CLASSES = 10


@dataclass(frozen=True)
class Options:
    """Draw the same digits with a teacher and with what was distilled from it."""

    checkpoint: Path = Path("runs/digits-classes")
    """The teacher: a run that knows the digits' classes."""
    distilled: Path = Path("runs/digits-fast")
    """What launch/distill.py has made of it."""
    out: Path = Path("runs/digits-fast/pictures/side-by-side.png")
    """The picture."""
    sampler: SamplerName = "ddpm"
    """The teacher's."""
    steps: Positive = 100
    """The teacher's, for a picture."""
    guidance_scale: float = 2.0
    """The teacher's; 1 is no guidance."""
    count: int = 100
    """Digits, a multiple of ten."""
    rounds: Positive = 3
    """Repetitions of the timing."""


def main() -> None:
    """Draw, time, show."""
    with exit_on_user_error():
        options = parse_options(Options)
        if options.count < CLASSES or options.count % CLASSES:
            raise UserError(f"--count is {options.count}; it must be a multiple of {CLASSES}")
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        teacher = subject_of(options.checkpoint, device)
        students = students_of([options.distilled], device)
        if teacher.unet.conditioning.null_class != CLASSES:
            raise UserError(f"--checkpoint {options.checkpoint} is no model of ten digits")
        ((name, student),) = students.items()
        sampling = student.config.sampling
        few = sampling.steps or student.schedule.timesteps
        gallery = Gallery(teacher, options.out.parent, students=students)
        ways = {
            f"{options.sampler}, {options.steps} steps, guided": Method(
                options.sampler, options.steps, guidance=options.guidance_scale
            ),
            f"distilled to {few} step{'s' * (few > 1)}": Method(
                sampling.sampler, few, student=name
            ),
        }
        draws = {way: partial(gallery.draw, m, 0, 0, options.count) for way, m in ways.items()}
        drawn = {way: to_uint8(draw()) for way, draw in draws.items()}
        times = interleaved(
            options.rounds, {way: partial(timed, draw, device) for way, draw in draws.items()}
        )
        classifier = digit_classifier(teacher.unet.sample_shape[-1])
        asked = torch.arange(options.count).numpy() % CLASSES
        seconds = {way: median(each) for way, each in times.items()}
        titles = []
        for way, pictures in drawn.items():
            right = int((classifier.classify(pictures) == asked).sum())
            titles.append(
                f"{way}\n{seconds[way]:.2f} s for {options.count}, {right} classified as asked"
            )
            print(titles[-1].replace("\n", ": "))
        slow, fast = seconds.values()
        print(f"{slow / fast:.0f} times as fast; look at {options.out}")
        show(dict(zip(titles, drawn.values(), strict=True)), options.out)


def show(grids: dict[str, Any], path: Path) -> None:
    """Grids beside each other, a row for each class; pictures uint8 `[N, H, W, 1]`, by title."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(grids), figsize=(5 * len(grids), 5.6))
    for axes, (title, pictures) in zip(panels, grids.items(), strict=True):
        framed = np.pad(pictures[..., 0], ((0, 0), (1, 1), (1, 1)), constant_values=64)
        count, height, width = framed.shape
        # Picture k is of class k mod 10: each row of the grid, one class.
        rows = framed.reshape(count // CLASSES, CLASSES, height, width)
        grid = rows.transpose(1, 2, 0, 3).reshape(CLASSES * height, count // CLASSES * width)
        axes.imshow(grid, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    finish(figure, path)


if __name__ == "__main__":
    main()
