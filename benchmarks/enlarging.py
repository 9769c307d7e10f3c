"""Do upscaled digits agree with their inputs? `python benchmarks/enlarging.py --checkpoint RUN`.

A super-resolution model (such as the preset digits-upscale) gets downsampled real digits, or with
`--small` the samples of another model. Reported at each level of noise-conditioning augmentation:

    consistency  root mean square difference, in grey levels of 255, between the inputs and the
                 downsampled samples
    of another   the same between the downsampled samples and the inputs of their neighbours: the
                 difference of a model that ignores its input
    distance     the Fréchet distance to real digits, in the features of a small classifier

beside the consistency and distance of bilinear interpolation, which invents nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import numpy as np
import torch
from benchmarks.throughput.digits import DigitMetrics, load
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import write_json
from torch import Tensor

from ddpm_engine.bounds import Ge, Le
from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_error, parse_options
from ddpm_engine.diffusion.config import MAX_LEVEL
from ddpm_engine.diffusion.super_resolution import downsample, upsample
from ddpm_engine.errors import UserError
from ddpm_engine.generation.input_images import SamplesAsInput
from ddpm_engine.images.grid import grid, save_png
from ddpm_engine.runtime import local_device
from ddpm_engine.sizes import height_and_width

COLUMNS = 12


@dataclass(frozen=True)
class Options:
    """Agreement of upscaled digits with their inputs, and their distance to real ones."""

    checkpoint: Path = Path("runs/digits-upscale")
    """Run directory of a super-resolution model of digits."""
    small: Path | None = None
    """Folder of samples of launch/sample.py to upscale; default: real digits."""
    levels: tuple[Annotated[int, Ge(0), Le(MAX_LEVEL)], ...] = (0, 50, 100, 200)
    """Augmentation levels, in steps of a chain of 1000."""
    count: Positive = 500
    """Samples at each level."""
    seed: int = 1
    """Seed of their noise."""
    steps: PositiveOrNone = None
    """Steps per sample; default: the run's."""
    json: Path | None = None
    """File for everything, as JSON."""
    picture: Path | None = None
    """File for a grid, a column each: input, interpolated, upscaled at the first level, real."""


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square difference, in grey levels, of images in [-1, 1]."""
    return float((a - b).square().mean().sqrt() * 127.5)


def main() -> None:
    """Upscale at each level, compare, report."""
    with exit_on_error(Options):
        options = parse_options(Options)
        device = local_device()
        model = load(options.checkpoint, device)
        side = model.spec.low_resolution
        if side is None or model.spec.null_class is not None:
            raise UserError(
                f"`checkpoint` {options.checkpoint} must be an unconditional super-resolution "
                "model, as the preset digits-upscale",
                field="checkpoint",
            )
        channels, size, _ = model.shape
        digits = DigitMetrics.of_size(size)
        # Neighbours in the data are often of one class; those in another order are any.
        order = np.random.default_rng(0).permutation(len(digits.digits.images))
        originals = torch.from_numpy(digits.digits.images[order[: options.count]])
        originals = originals.permute(0, 3, 1, 2)
        ids = range(len(originals) if options.small is None else options.count)
        if options.small is None:
            inputs = downsample(originals, side)
        else:
            inputs = SamplesAsInput(options.small, (channels, *height_and_width(side))).of(ids)
        inputs = inputs.to(device)

        def measured(samples: Tensor) -> dict[str, Any]:
            small = downsample(samples.clamp(-1, 1), side)
            return {
                "consistency": difference(small, inputs),
                "of_another": difference(small, inputs.roll(1, 0)),
                "distance": digits.distance(model.codec.decode(samples)),
            }

        def row(name: str, found: dict[str, Any]) -> str:
            return (
                f"{name:<14} consistency {found['consistency']:5.1f}  of another "
                f"{found['of_another']:5.1f}  distance {found['distance']:.3f}"
            )

        interpolated = upsample(inputs, size)
        by_interpolation = measured(interpolated)
        print(row("interpolation", by_interpolation), flush=True)
        steps = options.steps or model.sampling.steps or model.schedule.timesteps
        points: list[dict[str, Any]] = []
        rows: list[Tensor] = []
        for level in options.levels:
            samples = model.sample(
                ids, seed=options.seed, steps=steps, low_resolution=inputs,
                augmentation_level=level,
            ).tensor  # fmt: skip
            points.append({"level": level, **measured(samples)})
            print(row(f"level {level}", points[-1]), flush=True)
            if not rows:
                factor = size // inputs.shape[2]
                pixels = inputs.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
                rows = [pixels, interpolated, samples]
        if options.picture is not None:
            images = [model.codec.decode(row[:COLUMNS]) for row in rows]
            if options.small is None:
                images.append(originals[:COLUMNS].permute(0, 2, 3, 1).numpy())
            options.picture.parent.mkdir(parents=True, exist_ok=True)
            save_png(grid(np.concatenate(images), columns=COLUMNS), options.picture)
        if options.json is not None:
            report = {
                "machine": facts(device),
                "checkpoint": f"{options.checkpoint}, step {model.step}",
                "small": "real digits" if options.small is None else str(options.small),
                "settings": {
                    "count": len(ids),
                    "seed": options.seed,
                    "sampler": model.sampling.sampler,
                    "steps": steps,
                },
                "interpolation": by_interpolation,
                "points": points,
            }
            write_json(options.json, report)


if __name__ == "__main__":
    main()
