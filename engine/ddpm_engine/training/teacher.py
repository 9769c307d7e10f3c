"""Distillation of a trained network: its default configuration, and loading the teacher."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from ddpm_engine.checkpoints.lazy_codec import LazyCodec
from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.parameterization import Prediction, parameterization, see_the_same
from ddpm_engine.errors import UserError
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.registry import same_network
from ddpm_engine.objectives.config import DistillationConfig, ObjectiveConfig
from ddpm_engine.objectives.distillation.teacher import Teacher

MOMENTS_RATE = 0.15
"""Learning rate of moment matching relative to the teacher's."""


def student_config(
    teacher: RunConfig,
    plan: DistillationConfig,
    out: Path,
    prediction: Prediction | None = None,
) -> RunConfig:
    """Make the configuration that distils a teacher, with the teacher's settings where possible.

    Students of a teacher that predicts ε predict v: at the highest noise levels, which few steps
    depend on, ε̂ says nothing about the image (Salimans & Ho 2022, section 4). EMA and warm-up are
    shortened to a tenth of a stage, so that the EMA does not reach back to the stage before.

    Moment matching uses a lower learning rate and no momentum, because student and critic chase
    each other; Adam's settings are those of Salimans et al. (2024, appendix).

    Args:
        teacher: configuration of the run that trained the teacher.
        plan: method, steps and guidance of the distillation.
        out: directory of the new run.
        prediction: prediction of the students; None: the teacher's, but v instead of ε.
    """
    if prediction is None:
        prediction = "v" if teacher.diffusion.prediction == "eps" else teacher.diffusion.prediction
    training, optimizer = teacher.training, teacher.optimizer
    stage = max(1, training.steps // max(1, plan.stages))
    shorter = replace(
        training, ema_decay=min(training.ema_decay, max(0.0, 1 - 10 / stage)), ema_sigma_rel=()
    )
    optimizer = replace(optimizer, warmup_steps=min(optimizer.warmup_steps, stage // 10))
    if plan.method == "moments":
        rate = MOMENTS_RATE * optimizer.learning_rate
        optimizer = replace(optimizer, learning_rate=rate, betas=(0.0, 0.99))
    return RunConfig(
        out=out,
        data=teacher.data,
        model=teacher.model,
        diffusion=replace(teacher.diffusion, prediction=prediction),
        objective=ObjectiveConfig(learned_variance=teacher.objective.learned_variance),
        optimizer=optimizer,
        training=shorter,
        sampling=replace(plan.sampling, clip_x0=teacher.sampling.clip_x0),
        log=replace(teacher.log, sample_steps=plan.steps),
        distillation=plan,
    )


def load_teacher(config: RunConfig, device: torch.device | str = "cpu") -> Teacher:
    """Load the teacher of a run onto a device.

    Raises:
        UserError: there is none, or its network or diffusion process is not the students'.
    """
    path = config.distillation.teacher
    if path is None:
        raise UserError("`distillation.teacher` is not given, and there is nothing to distil")
    teacher = load_model(path, device)
    theirs, ours = teacher.config, config
    if not same_network(theirs.model, ours.model):
        raise UserError(
            f"`distillation.teacher` {path} is another network than the model fields describe; "
            "students have their teacher's",
            "distillation.teacher",
        )
    known, wanted = theirs.diffusion.prediction, ours.diffusion.prediction
    if replace(theirs.diffusion, prediction=wanted) != ours.diffusion:
        raise UserError(
            f"`distillation.teacher` {path} was trained on another noise schedule than the "
            "diffusion fields describe; students have their teacher's",
            "distillation.teacher",
        )
    schedule = ours.diffusion.build_schedule()
    if not see_the_same(
        parameterization(known, schedule), parameterization(wanted, schedule), schedule
    ):
        raise UserError(
            f"`diffusion.prediction` is {wanted}, but `distillation.teacher` {path} predicts "
            f"{known}, from another input; only eps, x0 and v turn into each other",
            "diffusion.prediction",
        )
    if theirs.clips_x0 != ours.clips_x0:
        raise UserError(
            f"`sampling.clip_x0` is {ours.clips_x0}, but `distillation.teacher` {path} is "
            f"sampled {'with' if theirs.clips_x0 else 'without'} clipping; students do as "
            "their teacher",
            "sampling.clip_x0",
        )
    if theirs.distillation.teacher is not None:
        raise UserError(
            f"`distillation.teacher` {path} has been distilled already, to "
            f"{theirs.sampling.steps} steps; distil its own teacher, "
            f"{theirs.distillation.teacher}, to fewer",
            "distillation.teacher",
        )
    if config.distillation.method != "moments":
        return Teacher(
            teacher.network, known, classes=teacher.classes, autoencoder=_autoencoder(teacher)
        )
    critic = deepcopy(teacher.network).requires_grad_(True)
    student = _load_student(config, device)
    return Teacher(teacher.network, known, student, critic, teacher.classes, _autoencoder(teacher))


def _autoencoder(model: LoadedModel) -> str | None:
    codec = model.codec
    return codec.fingerprint or "" if isinstance(codec, LazyCodec) else None


def _load_student(config: RunConfig, device: torch.device | str) -> Network:
    """Load the student that moment matching starts from."""
    path = config.distillation.student
    assert path is not None, "validated"
    student = load_model(path, device)
    theirs, ours = student.config, config
    if theirs.distillation.teacher is None or theirs.sampling.steps != ours.distillation.steps:
        raise UserError(
            f"`distillation.student` {path} has not been distilled to "
            f"{ours.distillation.steps} steps, which moments goes on from; distil the teacher to "
            "as many by progressive distillation first",
            "distillation.student",
        )
    if not same_network(theirs.model, ours.model) or theirs.diffusion != ours.diffusion:
        raise UserError(
            f"`distillation.student` {path} is not a student of `distillation.teacher`: its "
            "network, noise schedule or prediction is another; name one that the same teacher was "
            "distilled to, with `diffusion.prediction` as it was then",
            "distillation.student",
        )
    return student.network
