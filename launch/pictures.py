"""Show the diffusion process of a trained run: `python launch/pictures.py --checkpoint RUN`.

Writes what a reader of the paper would want to see: real images beside drawn ones, a real image
dissolving into noise, a picture emerging from it, and the loss curve.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from ddpm_engine.compile_cache import use_local_compile_cache
from ddpm_engine.data import ShardStream
from ddpm_engine.errors import UserError, exit_on_user_error
from ddpm_engine.evaluation.pictures import loss_curve, side_by_side, strip, to_uint8
from ddpm_engine.pretrained import Pretrained, load_pretrained
from ddpm_engine.samplers import build_table, sampling_steps
from ddpm_engine.training.dataset import dataset_of
from ddpm_kernels import q_sample

_COLUMNS = 11


@dataclass(frozen=True)
class Options:
    """Show the diffusion process of a trained run."""

    checkpoint: Path
    """A run directory."""
    samples: Path
    """Pictures drawn from it by launch/sample.py as PNGs."""
    out: Path
    """Folder for the four pictures."""
    seed: int = 0
    """Of the noise in the strips."""
    id: int = 1
    """Which picture of that seed the reverse strip shows."""


def real_images(pretrained: Pretrained, count: int) -> np.ndarray:
    """The first images in training order: uint8 `[count, H, W, C]`."""
    dataset = dataset_of(pretrained.config)
    if isinstance(dataset, ShardStream):
        return np.stack([sample.image for sample in itertools.islice(dataset, count)])
    return np.stack([sample.image for sample in dataset.__getitems__(range(count))])


def drawn_images(folder: Path, count: int) -> np.ndarray:
    """Up to `count` PNGs of a folder: uint8 `[N, H, W, C]`."""
    files = sorted(file for file in folder.glob("*.png") if file.stem.isdigit())[:count]
    if not files:
        raise UserError(f"--samples {folder} holds no pictures; draw some with launch/sample.py")
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    return images[..., None] if images.ndim == 3 else images


def forward_strip(pretrained: Pretrained, image: np.ndarray, seed: int, path: Path) -> None:
    """Show q(x_t | x_0) of one image, from x_0 to x_T, always with the same noise."""
    schedule = pretrained.schedule
    # Closer together at first: most of the image is gone by the middle of the chain.
    fractions = torch.linspace(0, 1, _COLUMNS - 1).square()
    timesteps = (fractions * (schedule.timesteps - 1)).round().long()
    noisy = q_sample(
        torch.from_numpy(image).permute(2, 0, 1).expand(len(timesteps), -1, -1, -1),
        timesteps,
        schedule.sqrt_alpha_bar.float(),
        schedule.sqrt_one_minus_alpha_bar.float(),
        seed,
        torch.zeros_like(timesteps),
    )
    images = np.concatenate([image[None], to_uint8(noisy)])
    titles = ["$x_0$", *(f"t={t + 1}" for t in timesteps.tolist())]
    strip([("$x_t$", images)], titles, "forward: an image dissolves into noise", path)


def reverse_strip(pretrained: Pretrained, seed: int, sample_id: int, path: Path) -> None:
    """Show one picture emerge: the state, and the estimate of x_0 that each step was made from."""
    config = pretrained.config
    table = build_table(
        pretrained.schedule, prediction=config.diffusion.prediction, **asdict(config.sampling)
    )
    shown = set(np.linspace(0, table.evaluations - 1, _COLUMNS).round().astype(int).tolist())
    states, estimates, titles = [], [], []
    null_class = pretrained.model.null_class
    labels = None if null_class is None else torch.tensor([null_class])
    for step in sampling_steps(
        pretrained.model, table, pretrained.model.sample_shape, seed=seed,
        sample_ids=torch.tensor([sample_id]), labels=labels,
    ):  # fmt: skip
        if step.index in shown:
            states.append(to_uint8(step.x))
            estimates.append(to_uint8(step.x0))
            titles.append(f"t={step.timestep + 1:.0f}")
    strip(
        [("$x_{t-1}$", np.concatenate(states)), (r"$\hat{x}_0$", np.concatenate(estimates))],
        titles,
        "reverse: a picture emerges, below the network's guess of it at each step",
        path,
    )


def main() -> None:
    """Write the four pictures."""
    use_local_compile_cache()
    with exit_on_user_error():
        options = tyro.cli(Options)
        pretrained = load_pretrained(options.checkpoint)
        if pretrained.checkpoint is None:
            raise UserError(
                f"--checkpoint {options.checkpoint} is a model of diffusers; the pictures show a "
                "run's data and losses, so give a run directory"
            )
        options.out.mkdir(parents=True, exist_ok=True)
        drawn = drawn_images(options.samples, 64)
        real = real_images(pretrained, len(drawn))
        side_by_side(
            real, drawn, ("real", "drawn by the model"), options.out / "real-and-drawn.png"
        )
        forward_strip(pretrained, real[0], options.seed, options.out / "forward.png")
        reverse_strip(pretrained, options.seed, options.id, options.out / "reverse.png")
        rows = (options.checkpoint / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(row) for row in rows]
        loss_curve(
            [row["step"] for row in metrics],
            [row["loss"] for row in metrics],
            options.out / "loss.png",
        )
        for name in ("real-and-drawn", "forward", "reverse", "loss"):
            print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
