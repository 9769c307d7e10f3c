"""Samples generated while training, so that people can watch the model learn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.data.open import TrainingData, samples_at
from ddpm_engine.diffusion.super_resolution import downsample
from ddpm_engine.distributed import is_main, rank, world_size
from ddpm_engine.errors import UserError
from ddpm_engine.images.grid import grid, save_png
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.objectives.inputs import described
from ddpm_engine.runtime import autocast
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler
from ddpm_engine.sizes import Size
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run

logger = logging.getLogger(__name__)

PROMPTS = "prompts.txt"
"""File beside the grids: the prompts of their samples, one a line, row by row."""


class Preview(Callback):
    """Write `samples/step-….png` every `log.sample_every` steps, always of the same sample ids.

    Each rank generates its share of them. A super-resolution network is given the first images of
    the data, downsampled; one conditioned on text `log.prompts`, or the captions of those images,
    which `samples/prompts.txt` lists row by row. A grid that cannot be written is reported and does
    not end training.
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
            samples, prompts = _generate(run, model)
        if is_main():
            path = run.config.out / "samples" / f"step-{run.step:08d}.png"
            if not bool(samples.isfinite().all()):
                logger.warning("samples in %s are not finite: sampling diverged", path)
            try:
                path.parent.mkdir(exist_ok=True)
                save_png(grid(run.codec.decode(samples)), path)
                if prompts is not None:
                    _write_lines(path.parent / PROMPTS, prompts)
            except OSError as error:
                if run.finished:
                    raise UserError(
                        f"{path}, the last grid of samples, cannot be written: {error}. The run "
                        "itself is saved"
                    ) from None
                logger.error("could not write %s: %s", path, error)


def _write_lines(file: Path, prompts: Sequence[str]) -> None:
    text = "".join(f"{prompt}\n" for prompt in prompts)
    with atomic_write(file) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def _generate(run: Run, model: Network) -> tuple[Tensor, Sequence[str] | None]:
    """The samples of all ranks in the order of their ids, and their prompts, if there are any.

    Returns:
        float32 `[sample_count, C, H, W]`, and as many prompts, of the first rank.
    """
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
    prediction = config.diffusion.prediction
    bound = DiffusionModel(model, run.schedule, prediction, sampling, run.codec)
    # A captured graph would outlast the memory that training wants back.
    sampler = Sampler(bound, request, capture=False)
    conditioning = sampler.conditioning(ids.tolist())
    prompts = None
    if spec.vector is not None or spec.text is not None or given is not None:
        conditioning, prompts = _conditioned(run, spec, conditioning, ids.tolist())
    with autocast(config.training.precision, device):
        samples = sampler.sample(ids, conditioning=conditioning, only_finite=False)
    order = run.ranks.gather(ids).argsort()
    return run.ranks.gather(samples)[order][: log.sample_count], prompts


def _conditioned(
    run: Run, spec: ConditioningSpec, conditioning: Conditioning, ids: Sequence[int]
) -> tuple[Conditioning, Sequence[str] | None]:
    """Condition samples as the data's first images are, or on `log.prompts`.

    Args:
        run: the run.
        spec: of its network.
        conditioning: of the samples, `[N]` in each.
        ids: `[N]`.

    Returns:
        The conditioning, and on the first rank the captions of the whole grid, if it has any.
    """
    data, log, text = run.config.data, run.config.log, run.text
    batch = samples_at(run.dataset, ids)
    captions: Sequence[str] | None = None
    if text is not None and log.prompts:
        captions = [log.prompts[k % len(log.prompts)] for k in range(log.sample_count)]
        batch = text.with_captions(batch, [log.prompts[k % len(log.prompts)] for k in ids])
    else:
        if text is not None:
            batch = text.encoded(batch)
            if is_main():
                captions = samples_at(run.dataset, range(log.sample_count)).captions
        if spec.null_class is not None:
            conditioning = replace(conditioning, labels=batch.labels)
    given = described(batch, spec, data.vector)
    conditioning = replace(
        conditioning, text=given.text, text_mask=given.text_mask, vector=given.vector
    )
    return conditioning.to(run.device), captions


class _Downsampled:
    """The data's first images at low resolution: sample k is made from position k."""

    classes: tuple[int, ...] | None = None
    sha256 = ""

    def __init__(self, dataset: TrainingData, size: Size) -> None:
        self._dataset, self._size = dataset, size

    def of(self, ids: Sequence[int]) -> Tensor:
        return downsample(samples_at(self._dataset, list(ids)).images, self._size)
