"""Pictures between two pictures, and an image denoised from halfway along the chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.evaluation.figures.strips import strip
from ddpm_engine.evaluation.pictures import to_uint8
from ddpm_engine.prediction import to_x0
from ddpm_engine.pretrained import Pretrained
from ddpm_engine.process import forward
from ddpm_engine.samplers import initial_noise, interpolated_noise, sample, spaced_timesteps
from ddpm_engine.samplers.loop import skipped_steps
from ddpm_engine.unet import UNet

COLUMNS = 9
STEPS = 50
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def interpolation_figure(trained: Pretrained, seed: int, ends: tuple[int, int], path: Path) -> None:
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


def denoising_figure(trained: Pretrained, image: Tensor, seed: int, path: Path) -> None:
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
    model, schedule = trained.model, trained.schedule
    prediction = trained.config.diffusion.prediction
    steps = min(STEPS, schedule.timesteps)
    visited = spaced_timesteps(schedule.timesteps, steps)
    timesteps = torch.stack([visited[skipped_steps(steps, share)] for share in STRENGTHS])
    count, device = len(timesteps), device_of(model)
    timesteps, image = timesteps.to(device), image.to(device)
    ids = torch.zeros(count, dtype=torch.int64, device=device)
    images = image.expand(count, -1, -1, -1)
    # As `sample` noises them.
    noisy = forward(schedule, images, timesteps, initial_noise(seed, ids, model.sample_shape))
    labels = no_class(model, count)
    with torch.inference_mode():
        output = model(noisy, timesteps, *(() if labels is None else (labels,)))
    a, s = (
        table.to(device, torch.float32)[timesteps][:, None, None, None]
        for table in (schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar)
    )
    # Behind the prediction there may be one of the variance.
    estimates = to_x0(prediction, output[:, : len(image)], noisy, a, s)
    drawn = [
        sample(
            model, schedule, sample_ids=ids[:1], seed=seed, sampler="ddim", steps=steps, eta=1.0,
            prediction=prediction, labels=no_class(model, 1), clip=trained.clip, images=image[None],
            strength=share,
        )
        for share in STRENGTHS
    ]  # fmt: skip
    rows = [("$x_t$", noisy), (r"$\hat{x}_0$", estimates), ("reverse\nprocess", torch.cat(drawn))]
    original = to_uint8(image[None])
    strip(
        [(label, np.concatenate([original, to_uint8(pictures)])) for label, pictures in rows],
        ["$x_0$", *(f"t={t + 1}" for t in timesteps.tolist())],
        "denoising a given image",
        path,
    )


def no_class(model: UNet, count: int) -> Tensor | None:
    """Labels for unconditional pictures: int64 `[count]`, or None if the network takes none."""
    null = model.null_class
    return None if null is None else torch.full((count,), null, device=device_of(model))


def device_of(model: UNet) -> torch.device:
    """Where a network is."""
    return next(model.parameters()).device
