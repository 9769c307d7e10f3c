"""Interpolation between two samples, and an image denoised from halfway along the chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.diffusion.process import add_noise
from ddpm_engine.plots.image_rows import strip
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.initial_noise import initial_noise, skipped_steps
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.samples import sample
from ddpm_engine.samplers.timesteps import spaced_timesteps

COLUMNS = 9
STEPS = 50
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def interpolation_figure(
    trained: LoadedModel, seed: int, ends: tuple[int, int], path: Path
) -> None:
    """Plot the interpolation between two samples of a seed (Song et al. 2020, section 5.3).

    DDIM without fresh noise makes a sample a function of its initial noise; the noise is
    interpolated on the great circle.

    Args:
        trained: the network.
        seed: of both samples.
        ends: their ids.
        path: of the PNG.
    """
    steps = min(STEPS, trained.schedule.timesteps)
    sampling = SamplingConfig(sampler="ddim", steps=steps, clip_x0=trained.sampling.clip_x0)
    samples = sample(
        unrestricted(trained), COLUMNS, progress=False, seed=seed, sampling=sampling,
        interpolate=(*ends, COLUMNS),
    )  # fmt: skip
    titles = [f"{weight:.2f}" for weight in np.linspace(0, 1, COLUMNS).tolist()]
    titles[0], titles[-1] = (f"sample {end}" for end in ends)
    images = trained.codec.decode(samples.tensor)
    strip([("", images)], titles, "interpolation of the noise, sampled by DDIM", path)


def denoising_figure(trained: LoadedModel, image: Tensor, seed: int, path: Path) -> None:
    """Plot an image noised to several timesteps and denoised from each.

    One row has the network's single estimate of x_0, which is the mean of all images it might have
    been and therefore blurred; the next has the result of the reverse process from there (Meng et
    al., "SDEdit", 2022), which settles on one of them.

    Args:
        trained: the network.
        image: float32 `[C, H, W]` in [-1, 1].
        seed: of the noise.
        path: of the PNG.
    """
    model, schedule, device = unrestricted(trained), trained.schedule, trained.device
    steps = min(STEPS, schedule.timesteps)
    visited = spaced_timesteps(schedule.timesteps, steps)
    timesteps = [int(visited[skipped_steps(steps, share)]) for share in STRENGTHS]
    image, ids = image.to(device), torch.zeros(1, dtype=torch.int64, device=device)
    clean = trained.codec.from_images(image[None])
    # As `Sampler` noises it.
    noise = initial_noise(seed, ids, model.shape)

    def denoised(strength: float, steps: int | None, eta: float, **options: Any) -> Tensor:
        clip_x0 = trained.sampling.clip_x0
        sampling = SamplingConfig(sampler="ddim", steps=steps, eta=eta, clip_x0=clip_x0)
        return sample(
            model, 1, progress=False, seed=seed, sampling=sampling, images=image[None],
            strength=strength, **options,
        ).tensor  # fmt: skip

    columns = [[clean] * 3]
    for t, strength in zip(timesteps, STRENGTHS, strict=True):
        noisy = add_noise(schedule, clean, torch.tensor([t], device=device), noise)
        # DDIM in one step returns the estimate of x_0, whatever the network predicts.
        estimate = denoised(1.0, None, 0.0, timesteps=(t,))
        columns.append([noisy, estimate, denoised(strength, steps, 1.0)])
    labels = ("$x_t$", r"$\hat{x}_0$", "reverse\nprocess")
    rows = [trained.codec.decode(torch.cat(row)) for row in zip(*columns, strict=True)]
    strip(
        list(zip(labels, rows, strict=True)),
        ["$x_0$", *(f"t={t + 1}" for t in timesteps)],
        "denoising a given image",
        path,
    )


def unrestricted(trained: LoadedModel) -> DiffusionModel:
    """Return the model without what it refuses: figures take other steps than distilled ones."""
    return DiffusionModel(
        trained.network, trained.schedule, trained.prediction, trained.sampling, trained.codec
    )
