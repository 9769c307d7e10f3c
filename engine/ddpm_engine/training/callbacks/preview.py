"""Samples generated while training, so that people can watch the model learn."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_engine.data.open import samples_at
from ddpm_engine.diffusion.super_resolution import shrink
from ddpm_engine.distributed import is_main, rank, world_size
from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.images.grid import grid, save_png
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.runtime import autocast
from ddpm_engine.samplers.sampler import sample
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run

logger = logging.getLogger(__name__)


class Preview(Callback):
    """Write `samples/step-….png` every `log.sample_every` steps, always of the same sample ids.

    Each rank generates its share of them. A super-resolution network is given the first images of
    the data, downsampled. A grid that cannot be written is reported and does not end training.
    """

    def on_step_end(self, run: Run) -> None:
        """See `Callback`."""
        if run.step % run.config.log.sample_every or run.interrupted:
            return
        run.watchdog.doing("generating preview samples", limited=False)
        with run.strategy.averaged() as model:
            samples = _generate(run, model)
        if is_main():
            path = run.config.out / "samples" / f"step-{run.step:08d}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                save_png(grid(PixelCodec().decode(samples)), path)
            except OSError as error:
                logger.error("could not write %s: %s", path, error)


def _generate(run: Run, model: UNet) -> Tensor:
    """The samples of all ranks in the order of their ids, float32 `[sample_count, C, H, W]`."""
    config, log, device = run.config, run.config.log, run.device
    sampling = replace(config.sampling, steps=log.sample_steps)
    if sampling.variance == "fixed_large":
        # The smaller variance suits the few steps that a preview takes.
        sampling = replace(sampling, variance="fixed_small")
    share = -(-log.sample_count // world_size())
    ids = torch.arange(share, device=device) * world_size() + rank()
    null_class = model.conditioning.null_class
    labels = None if null_class is None else ids % null_class
    low_resolution = None
    if model.conditioning.low_resolution is not None:
        real = samples_at(run.dataset, ids.tolist())
        low_resolution = shrink(real.images, model.conditioning.low_resolution)
        labels = None if null_class is None or real.labels is None else real.labels.to(ids)
    with autocast(config.training.precision, device):
        samples = sample(
            model,
            run.schedule,
            sample_ids=ids,
            seed=config.training.seed,
            prediction=config.diffusion.prediction,
            clip=sampling.clip_x0,
            labels=labels,
            low_resolution=low_resolution,
            capture=False,  # a graph would outlast the memory that training wants back
            **sampling.table_options(),
        )
    order = run.ranks.gather(ids).argsort()
    return run.ranks.gather(samples)[order][: log.sample_count]
