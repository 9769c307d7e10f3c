"""Distil a trained model into one of few steps: `accelerate launch launch/distill.py --teacher RUN
--out DIR --steps 4`.

Progressive distillation (Salimans & Ho 2022) or multistep consistency distillation (Heek et al.
2024), and after one of these, moment matching (Salimans et al. 2024), by the trainer of `train.py`.
The same command resumes; the result is a run as any other, for `sample.py --checkpoint DIR`.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from tqdm.contrib.logging import logging_redirect_tqdm

from ddpm_engine.bounds import Ge, Le
from ddpm_engine.checkpoints.load import config_of
from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_error, parse_options
from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.diffusion.parameterization import Prediction
from ddpm_engine.errors import UserError
from ddpm_engine.launched import is_first
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
    """Method: two steps of the last student learned as one; consistency with oneself one step
    later; or, from a student of these, the teacher's conditional moments."""
    steps: Positive = 4
    """Steps of a sample of the result, each one network evaluation."""
    start_steps: PositiveOrNone = None
    """Steps that the first teacher takes, 2, 4, 8, … times as many; with moments, as many;
    default: 16 times, or as many."""
    student: Path | None = None
    """Run distilled to as many steps, which moments continues."""
    guidance_scale: Annotated[float, Ge(-1000), Le(1000)] | None = None
    """Guidance scale of the teacher, which the result has built in."""
    prediction: Prediction | None = None
    """Prediction of the result; default: as the teacher, but v if that predicts eps."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    log: LogConfig = field(default_factory=LogConfig)


def plan(options: Options) -> DistillationConfig:
    """Return what is distilled, with the defaults that depend on the method."""
    start = options.start_steps
    if start is None:
        start = options.steps * (1 if options.method == "moments" else 16)
    return DistillationConfig(
        options.teacher, options.method, options.steps, start, options.guidance_scale,
        options.student,
    )  # fmt: skip


def parse(arguments: list[str]) -> RunConfig:
    """Return the run that the command line asks for; what it leaves open follows the teacher.

    Raises:
        UserError: the teacher cannot be loaded, or not be distilled to such steps.
    """
    # Before anything is loaded, so that help and messages about mistakes do not wait.
    path = parse_options(Options, arguments).teacher
    teacher = config_of(path)
    # Twice more: the length of a stage, which other defaults follow from, is itself an option.
    asked = parse_options(Options, arguments, default=_defaults(teacher, path))
    timed = replace(teacher, training=replace(teacher.training, steps=asked.training.steps))
    chosen = plan(asked)
    if wrong := list(chosen.problems()):  # what follows counts stages
        raise UserError("\n       ".join(map(str, wrong)))
    run = student_config(timed, chosen, asked.out, asked.prediction)
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
    """Parse the command line and distil."""
    use_local_compile_cache()
    with exit_on_error(Options, renamed=RENAMED):
        run = parse(sys.argv[1:])
        logging.basicConfig(
            level=logging.INFO if is_first() else logging.WARNING,
            format="%(message)s",
            stream=sys.stdout,
        )
        with logging_redirect_tqdm():
            Trainer(run).fit()


if __name__ == "__main__":
    main()
