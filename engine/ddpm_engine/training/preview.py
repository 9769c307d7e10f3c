"""Pictures drawn while training, so that people can watch the model learn."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

import torch
from accelerate import Accelerator

from ddpm_engine.config import RunConfig
from ddpm_engine.data.open import TrainingData, samples_at
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.diffusion.super_resolution import shrink
from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.images.grid import grid, save_png
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.runtime import autocast
from ddpm_engine.samplers.sampler import sample

logger = logging.getLogger(__name__)


def draw_preview(
    model: UNet,
    schedule: NoiseSchedule,
    config: RunConfig,
    step: int,
    accelerator: Accelerator,
    dataset: TrainingData,
) -> None:
    """Write `samples/step-….png`: always the same ids, each rank drawing its share of them.

    A network that enlarges is given the first images of the data, made small. A grid that cannot be
    written is reported and does not end training.
    """
    log, ranks = config.log, accelerator.num_processes
    sampling = replace(config.sampling, steps=log.sample_steps)
    if sampling.variance == "fixed_large":
        # The smaller variance suits the few steps that a preview takes.
        sampling = replace(sampling, variance="fixed_small")
    share = -(-log.sample_count // ranks)
    ids = torch.arange(share, device=accelerator.device) * ranks + accelerator.process_index
    labels = None if model.conditioning.null_class is None else ids % model.conditioning.null_class
    small = None
    if model.conditioning.low_resolution is not None:
        real = samples_at(dataset, ids.tolist())
        small = shrink(real.images, model.conditioning.low_resolution)
        labels = (
            None
            if model.conditioning.null_class is None or real.labels is None
            else real.labels.to(ids)
        )
    with autocast(config.training.precision, accelerator.device):
        pictures = sample(
            model,
            schedule,
            sample_ids=ids,
            seed=config.training.seed,
            prediction=config.diffusion.prediction,
            clip=config.diffusion.clip,
            labels=labels,
            low_resolution=small,
            capture=False,  # a graph would outlast the memory that training wants back
            **asdict(sampling),
        )
    gathered, gathered_ids = accelerator.gather((pictures, ids))
    if not accelerator.is_main_process:
        return
    in_order = gathered[gathered_ids.argsort()][: log.sample_count]
    path = config.out / "samples" / f"step-{step:08d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        save_png(grid(PixelCodec().decode(in_order)), path)
    except OSError as error:
        logger.error("could not write %s: %s", path, error)
