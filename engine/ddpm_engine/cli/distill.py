"""Distil a trained model into one of few steps: `accelerate launch launch/distill.py --teacher RUN
--out DIR --steps 4`.

Progressive distillation (Salimans & Ho 2022) or multistep consistency distillation (Heek et al.
2024), and after one of these, moment matching (Salimans et al. 2024), by the trainer of `train.py`.
The same command resumes; the result is a run as any other, and `sample.py --checkpoint DIR` draws
from it.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro
from tqdm.contrib.logging import logging_redirect_tqdm

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.cli.options import exit_on_user_error, parse_options
from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.objectives.config import DistillationConfig, DistillationMethod
from ddpm_engine.runtime import use_local_compile_cache
from ddpm_engine.training.teacher import student_config
from ddpm_engine.training.trainer import Trainer

RENAMED = {"distillation.": "", "diffusion.prediction": "prediction"}
"""Fields of a run whose options have shorter names here."""


@dataclass(frozen=True)
class Options:
    """Distil a trained model into one of few steps. Run the same command again to resume.

    The sections below are those of train.py; their defaults are the teacher's.
    """

    teacher: Path
    """A run directory, one checkpoints/step-… in it, or the folder of a diffusers pipeline."""
    out: Path
    """Directory of the distilled run."""
    method: DistillationMethod = "progressive"
    """Learn two steps of the last student at a time; to agree with oneself one step later; or, from
    a student of these, to draw what the teacher expects."""
    steps: int = 4
    """Steps, each one network evaluation, that the result draws a picture in."""
    start_steps: int | None = None
    """Most steps that a teacher takes, 2, 4, 8, … times as many; with moments, as many; default:
    16 times, or as many."""
    student: Path | None = None
    """Run distilled to as many steps, which moments goes on from."""
    guidance_scale: float | None = None
    """Guide the teacher so far towards the class; the result has it built in."""
    prediction: Literal["eps", "x0", "v", "edm"] | None = None
    """What the result predicts; default: as the teacher, but v if that predicts eps."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    log: LogConfig = field(default_factory=LogConfig)


def plan(options: Options) -> DistillationConfig:
    """What is to be distilled."""
    start = options.start_steps
    if start is None:
        start = options.steps * (1 if options.method == "moments" else 16)
    return DistillationConfig(
        options.teacher, options.method, options.steps, start, options.guidance_scale,
        options.student,
    )  # fmt: skip


def parse(arguments: list[str]) -> RunConfig:
    """The run that the command line asks for; what it leaves open follows from the teacher.

    Raises:
        UserError: the teacher cannot be loaded.
    """
    # Before anything is loaded, so that help and what is said of a mistake do not wait.
    path = parse_options(Options, arguments).teacher
    teacher = load_model(path).config
    # Twice more: the length of a stage, which other defaults follow from, is itself an option.
    asked = parse_options(Options, arguments, default=_defaults(teacher, path))
    told = replace(teacher, training=replace(teacher.training, steps=asked.training.steps))
    run = student_config(told, plan(asked), asked.out, asked.prediction)
    defaults = replace(
        asked, data=run.data, optimizer=run.optimizer, training=run.training, log=run.log
    )
    options = parse_options(Options, arguments, default=defaults)
    return replace(
        run,
        data=options.data,
        optimizer=options.optimizer,
        training=options.training,
        log=options.log,
    )


def _defaults(teacher: RunConfig, path: Path) -> Options:
    return Options(
        path,
        tyro.MISSING,
        data=teacher.data,
        optimizer=teacher.optimizer,
        training=teacher.training,
        log=teacher.log,
    )


def main() -> None:
    """Parse, distil, and leave with a message that helps if something is wrong."""
    use_local_compile_cache()
    with exit_on_user_error(Options, renamed=RENAMED):
        run = parse(sys.argv[1:])
        main_process = os.environ.get("RANK", "0") == "0"
        logging.basicConfig(
            level=logging.INFO if main_process else logging.WARNING,
            format="%(message)s",
            stream=sys.stdout,
        )
        with logging_redirect_tqdm():
            Trainer(run).fit()


if __name__ == "__main__":
    main()
