"""Samples generated while training, so that people can watch the model learn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_engine.data.open import TrainingData, samples_at
from ddpm_engine.diffusion.super_resolution import downsample
from ddpm_engine.distributed import is_main, rank, world_size
from ddpm_engine.errors import UserError
from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.images.grid import grid, save_png
from ddpm_engine.networks.base import Network
from ddpm_engine.runtime import autocast
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run

logger = logging.getLogger(__name__)


class Preview(Callback):
    """Write `samples/step-….png` every `log.sample_every` steps, always of the same sample ids.

    Each rank generates its share of them. A super-resolution network is given the first images of
    the data, downsampled. A grid that cannot be written is reported and does not end training.
    """

    def on_step_end(self, run: Run) -> None:
        """See `Callback`.

        Raises:
            UserError: the run is saved, but its last grid could not be written.
        """
        if run.step % run.config.log.sample_every or run.interrupted:
            return
        run.watchdog.doing("generating preview samples", limited=False)
        with run.strategy.averaged() as model:
            samples = _generate(run, model)
        if is_main():
            path = run.config.out / "samples" / f"step-{run.step:08d}.png"
            if not bool(samples.isfinite().all()):
                logger.warning("samples in %s are not finite: sampling diverged", path)
            try:
                path.parent.mkdir(exist_ok=True)
                save_png(grid(PixelCodec().decode(samples)), path)
            except OSError as error:
                if run.finished:
                    raise UserError(
                        f"{path}, the last grid of samples, cannot be written: {error}. The run "
                        "itself is saved"
                    ) from None
                logger.error("could not write %s: %s", path, error)


def _generate(run: Run, model: Network) -> Tensor:
    """The samples of all ranks in the order of their ids, float32 `[sample_count, C, H, W]`."""
    config, log, device = run.config, run.config.log, run.device
    sampling = replace(config.sampling, steps=log.sample_steps)
    if sampling.variance == "fixed_large":
        # The smaller variance suits the few steps that a preview takes.
        sampling = replace(sampling, variance="fixed_small")
    share = -(-log.sample_count // world_size())
    ids = torch.arange(share, device=device) * world_size() + rank()
    spec, given = model.conditioning, None
    if spec.low_resolution is not None:
        given = _Downsampled(run.dataset, spec.low_resolution)
    # Its precision is that of training, below.
    request = SampleRequest(seed=config.training.seed, low_resolution=given, precision="no")
    bound = DiffusionModel(model, run.schedule, config.diffusion.prediction, sampling)
    # A captured graph would outlast the memory that training wants back.
    sampler = Sampler(bound, request, capture=False)
    conditioning = sampler.conditioning(ids.tolist())
    if given is not None and spec.null_class is not None:
        labels = samples_at(run.dataset, ids.tolist()).labels
        conditioning = replace(conditioning, labels=None if labels is None else labels.to(ids))
    with autocast(config.training.precision, device):
        samples = sampler.sample(ids, conditioning=conditioning, only_finite=False)
    order = run.ranks.gather(ids).argsort()
    return run.ranks.gather(samples)[order][: log.sample_count]


class _Downsampled:
    """The data's first images at low resolution: sample k is made from position k."""

    classes: tuple[int, ...] | None = None
    sha256 = ""

    def __init__(self, dataset: TrainingData, side: int) -> None:
        self._dataset, self._side = dataset, side

    def of(self, ids: Sequence[int]) -> Tensor:
        return downsample(samples_at(self._dataset, list(ids)).images, self._side)
