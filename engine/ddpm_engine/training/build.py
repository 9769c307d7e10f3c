"""From a configuration to a run in force: the only place that knows all of its parts."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ddpm_engine.config import RunConfig
from ddpm_engine.data.classes import check_same_classes, match_classes
from ddpm_engine.data.open import TrainingData, make_missing_shards, open_dataset
from ddpm_engine.distributed import is_main, raise_together, world_size
from ddpm_engine.errors import UserError
from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.objectives.distillation.teacher import Teacher
from ddpm_engine.rules import validate
from ddpm_engine.runtime import Numerics, autocast_forward, local_device
from ddpm_engine.training.accelerator import start_accelerator
from ddpm_engine.training.build_objective import build_objective
from ddpm_engine.training.callbacks.autoencoders import AutoencoderFolder, Reconstructions
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.callbacks.checkpoints import Checkpoints, Snapshots
from ddpm_engine.training.callbacks.console import Console
from ddpm_engine.training.callbacks.metrics_file import MetricsFile
from ddpm_engine.training.callbacks.preview import Preview
from ddpm_engine.training.callbacks.trackers import Trackers
from ddpm_engine.training.capture import choose_capture
from ddpm_engine.training.latents import check_teachers_latents, open_latents
from ddpm_engine.training.memory_advice import advise_on_memory
from ddpm_engine.training.precision import settle_precision
from ddpm_engine.training.precompile import precompile
from ddpm_engine.training.reports import Reports
from ddpm_engine.training.run import Run
from ddpm_engine.training.run_directory import check_run_directory, claim_run_directory
from ddpm_engine.training.starting_weights import start_from_model
from ddpm_engine.training.strategies.build import start_strategy
from ddpm_engine.training.strategies.launcher_env import read_request
from ddpm_engine.training.teacher import load_teacher
from ddpm_engine.training.text import open_text
from ddpm_engine.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


def build_run(
    config: RunConfig, *, dtype: torch.dtype = torch.float32, any_precision: bool = False
) -> Run:
    """Start the processes, open the data, build network and objective, claim the directory.

    Args:
        config: the run. Its directory is made, or continued if it holds the same run.
        dtype: of the weights and of the objective's arithmetic.
        any_precision: run in a precision that this hardware emulates slowly, instead of refusing.

    Raises:
        UserError: the configuration, the data, the directory or the launch is wrong.
    """
    validate(config)
    training = config.training
    numerics = Numerics(training.tf32, training.cudnn_benchmark, training.deterministic)
    numerics.apply()  # before anything uses a GPU
    config = settle_precision(config, local_device())
    with raise_together(UserError):
        if is_main():
            check_run_directory(config)
    request = read_request(config.training)
    accelerator = start_accelerator(config, request, any_precision)
    device = accelerator.device
    if is_main():
        advise_on_memory(config, request, device)

    torch.manual_seed(config.training.seed)
    model = build_network(config.model).to(dtype)
    with raise_together(UserError):
        start_from_model(model, config)
    teacher = _start_from_teacher(model, config, device)
    dataset = _open_data(config, model.conditioning, device)
    with raise_together(UserError):
        text = open_text(config, dataset, model.conditioning, device)
        latents = open_latents(config, dataset, device)
    if latents is not None:
        config = latents.settled(config)
    classes = None if config.model.num_class_embeds is None else dataset.classes
    if teacher is not None:
        _check_classes(teacher, dataset, model.conditioning.null_class)
        check_teachers_latents(teacher.autoencoder, latents)
    with raise_together(UserError):
        if is_main():
            check_run_directory(config, dataset.fingerprint, classes)

    model.to(device)
    model.recompute(config.training.recompute)
    if config.training.compile:
        model.compile_blocks()
    schedule = config.diffusion.build_schedule()
    objective = build_objective(
        config, schedule, device, model.conditioning, teacher, dtype,
        None if text is None else text.null,
        None if latents is None else latents.space,
    )  # fmt: skip
    if device.type != "cpu" and world_size() > 1:
        # What the first process of a node compiles, the others find in the cache.
        with accelerator.local_main_process_first():
            replicated = request.deepspeed is None and not request.fsdp
            length = None if text is None else text.length
            precompile(
                model, objective, config, device, half_weights=replicated, text_length=length,
                latents=latents is not None,
            )  # fmt: skip
    strategy = start_strategy(model.train(), request, config, accelerator)
    capture = choose_capture(config, objective, strategy, device)
    lock = None
    with raise_together(UserError):
        # By one process: of two that write one file at a time, one would lose it.
        if is_main():
            lock = claim_run_directory(config, dataset.fingerprint, classes)
    logger.info(
        "%s: %d process(es), first on %s, precision %s%s",
        strategy.name, world_size(), device, config.training.precision,
        "" if device.type == "cpu" else f", {numerics}",
    )  # fmt: skip
    watchdog = Watchdog(config.training.timeout_seconds)
    return Run(
        config, accelerator, dataset, schedule, objective, strategy, watchdog,
        Reports(device, dtype), capture, lock, text=text, latents=latents,
    )  # fmt: skip


def _open_data(config: RunConfig, spec: ConditioningSpec, device: torch.device) -> TrainingData:
    """Open the training data, which rank 0 makes first, on its device, if it is missing."""
    model = config.model
    with raise_together(UserError):
        if is_main():
            make_missing_shards(config.data, model.sample_size, device)
    with raise_together(UserError):
        return open_dataset(
            config.data,
            size=model.sample_size,
            channels=model.in_channels,
            classes=None if model.num_class_embeds is None else model.num_class_embeds - 1,
            seed=config.training.seed,
            check=is_main(),
            text=spec.text,
            vector=spec.vector,
        )


def _check_classes(teacher: Teacher, dataset: TrainingData, count: int | None) -> None:
    """Check that a number means the same class to the teacher and in the data."""
    if count is None or dataset.classes is None:
        return
    if match_classes(teacher.classes, count, dataset.classes, "the data", "the teacher") != list(
        range(len(dataset.classes))
    ):
        teachers = "`distillation.teacher`"
        check_same_classes(teacher.classes, teachers, dataset.classes, "the data")


def build_callbacks(config: RunConfig) -> list[Callback]:
    """What a run does besides stepping; its log lines come first, since saving reads the meters."""
    callbacks: list[Callback] = [Console(), MetricsFile()]
    if config.log.tracker != "none":
        callbacks.append(Trackers())
    callbacks.append(Checkpoints())
    if config.training.ema_sigma_rel:
        callbacks.append(Snapshots())
    if isinstance(config.model, AutoencoderKLConfig):
        callbacks.append(AutoencoderFolder())
        if config.log.sample_every:
            callbacks.append(Reconstructions())
    elif config.log.sample_every and config.data.diffuse == "images":
        callbacks.append(Preview())
    return callbacks


def _start_from_teacher(
    student: Network, config: RunConfig, device: torch.device
) -> Teacher | None:
    """Load what distillation needs, if the run distils; the student starts from those weights."""
    if config.distillation.teacher is None:
        return None
    with raise_together(UserError):
        teacher = load_teacher(config, device)
    student.load_state_dict((teacher.student or teacher.network).state_dict())
    for network in filter(None, (teacher.network, teacher.critic)):
        autocast_forward(network, config.training.precision, device)
        if config.training.compile:
            network.compile_blocks()
    # The student has been copied; it would stay in memory as long as the run.
    return replace(teacher, student=None)
