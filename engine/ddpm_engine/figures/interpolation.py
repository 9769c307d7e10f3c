"""Pictures between two pictures, and an image denoised from halfway along the chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.diffusion.process import forward
from ddpm_engine.images.grid import to_uint8
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.plots.image_rows import strip
from ddpm_engine.samplers.sampler import initial_noise, interpolated_noise, sample, skipped_steps
from ddpm_engine.samplers.timesteps import spaced_timesteps

COLUMNS = 9
STEPS = 50
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def interpolation_figure(
    trained: LoadedModel, seed: int, ends: tuple[int, int], path: Path
) -> None:
    """Show what lies between two pictures of a seed (Song et al. 2020, section 5.3).

    DDIM without fresh noise makes a picture a function of the noise it begins with; the noise is
    interpolated on the great circle.

    Args:
        trained: the network.
        seed: of both pictures.
        ends: their ids.
        path: of the PNG.
    """
    model, schedule = trained.model, trained.schedule
    weights = torch.linspace(0, 1, COLUMNS)
    pictures = sample(
        model,
        schedule,
        sample_ids=torch.arange(COLUMNS, device=device_of(model)),
        seed=seed,
        sampler="ddim",
        steps=min(STEPS, schedule.timesteps),
        prediction=trained.config.diffusion.prediction,
        labels=no_class(model, COLUMNS),
        clip=trained.clip,
        initial=interpolated_noise(seed, *ends, weights, model.sample_shape),
    )
    titles = [f"{weight:.2f}" for weight in weights.tolist()]
    titles[0], titles[-1] = (f"picture {end}" for end in ends)
    strip([("", to_uint8(pictures))], titles, "interpolation of the noise, drawn by DDIM", path)


def denoising_figure(trained: LoadedModel, image: Tensor, seed: int, path: Path) -> None:
    """Show an image noised to several points of the chain, and taken back from each.

    Once by the network's one estimate of x_0, which is the mean of all that the image might have
    been and therefore blurred; and once by the reverse process from there (Meng et al., "SDEdit",
    2022), which decides on one of them.

    Args:
        trained: the network.
        image: float32 `[C, H, W]` in [-1, 1].
        seed: of the noise.
        path: of the PNG.
    """
    schedule, device = trained.schedule, device_of(trained.model)
    steps = min(STEPS, schedule.timesteps)
    visited = spaced_timesteps(schedule.timesteps, steps)
    timesteps = [int(visited[skipped_steps(steps, share)]) for share in STRENGTHS]
    image, ids = image.to(device), torch.zeros(1, dtype=torch.int64, device=device)
    # As `sample` noises it.
    noise = initial_noise(seed, ids, trained.model.sample_shape)

    def drawn(strength: float, **options: Any) -> Tensor:
        return sample(
            trained.model,
            schedule,
            sample_ids=ids,
            seed=seed,
            sampler="ddim",
            prediction=trained.config.diffusion.prediction,
            labels=no_class(trained.model, 1),
            clip=trained.clip,
            images=image[None],
            strength=strength,
            **options,
        )

    columns = [[image[None]] * 3]
    for t, strength in zip(timesteps, STRENGTHS, strict=True):
        noisy = forward(schedule, image[None], torch.tensor([t], device=device), noise)
        # DDIM in one step returns the estimate of x_0, whatever the network predicts.
        estimate = drawn(1.0, timesteps=(t,))
        columns.append([noisy, estimate, drawn(strength, steps=steps, eta=1.0)])
    labels = ("$x_t$", r"$\hat{x}_0$", "reverse\nprocess")
    rows = [to_uint8(torch.cat(row)) for row in zip(*columns, strict=True)]
    strip(
        list(zip(labels, rows, strict=True)),
        ["$x_0$", *(f"t={t + 1}" for t in timesteps)],
        "denoising a given image",
        path,
    )


def no_class(model: UNet, count: int) -> Tensor | None:
    """Labels for unconditional pictures: int64 `[count]`, or None if the network takes none."""
    null = model.conditioning.null_class
    return None if null is None else torch.full((count,), null, device=device_of(model))


def device_of(model: UNet) -> torch.device:
    """Where a network is."""
    return next(model.parameters()).device
