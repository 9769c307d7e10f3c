"""Do enlarged digits agree with the small ones? `python benchmarks/enlarging.py --checkpoint RUN`.

A model that enlarges (such as the preset digits-upscale) is given real digits made small, or with
`--small` the pictures that another model drew. At each augmentation level are reported

    consistency  root mean square difference, in grey levels of 255, between what it was given and
                 its pictures made small again
    of another   the same between its pictures and what its neighbours were given: the difference
                 that a model would have that does not look at what it is given
    distance     the Fréchet distance to real digits, in the features of a small classifier

beside the consistency and distance of bilinear interpolation, which invents nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import numpy as np
import torch
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import write_json
from torch import Tensor
from tqdm import tqdm

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_user_error, parse_options
from ddpm_engine.diffusion.super_resolution import downsample, upsample
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import digit_classifier, real_digits
from ddpm_engine.evaluation.fid import frechet_distance, moments
from ddpm_engine.generation.input_images import SamplesAsInput
from ddpm_engine.images.grid import grid, save_png, to_uint8
from ddpm_engine.samplers.sampler import Sampler

SHOWN = 12


@dataclass(frozen=True)
class Options:
    """Agreement of enlarged digits with the small ones, and their distance to real ones."""

    checkpoint: Path = Path("runs/digits-upscale")
    """A run directory of a model that enlarges digits."""
    small: Path | None = None
    """Enlarge the first pictures of this folder of launch/sample.py; default: real digits."""
    levels: tuple[int, ...] = (0, 50, 100, 200)
    """NoiseConditioningAugmentation levels, in steps of a chain of 1000."""
    count: Positive = 500
    """Pictures at each level."""
    seed: int = 1
    """Of their noise."""
    steps: PositiveOrNone = None
    """Steps a picture; default: the run's."""
    json: Path | None = None
    """Write everything into this file."""
    picture: Path | None = None
    """Show some here, a column each: given, interpolated, enlarged at the first level, and real."""


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square, in grey levels, of images in [-1, 1]."""
    return float((a - b).square().mean().sqrt() * 127.5)


def main() -> None:
    """Enlarge at each level, compare, report."""
    with exit_on_user_error():
        options = parse_options(Options)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        pretrained = load_model(options.checkpoint, device)
        model, side = pretrained.network, pretrained.spec.low_resolution
        if side is None or model.conditioning.null_class is not None:
            raise UserError(
                f"--checkpoint {options.checkpoint} must enlarge, and be of no classes, as the "
                "preset digits-upscale"
            )
        channels, size, _ = model.sample_shape
        real = real_digits(size)
        # Neighbours in the data are often of one class; those in another order are any.
        order = np.random.default_rng(0).permutation(len(real.images))
        originals = torch.from_numpy(real.images[order[: options.count]]).permute(0, 3, 1, 2)
        ids = range(len(originals) if options.small is None else options.count)
        if options.small is None:
            given = downsample(originals, side)
        else:
            given = SamplesAsInput(options.small, (channels, side, side)).of(ids)
        given = given.to(device)
        classifier = digit_classifier(size)
        theirs = moments([classifier.features(real.images)])

        def measured(pictures: Tensor) -> dict[str, Any]:
            small = downsample(pictures.clamp(-1, 1), side)
            features = classifier.features(to_uint8(pictures))
            return {
                "consistency": difference(small, given),
                "of_another": difference(small, given.roll(1, 0)),
                "distance": frechet_distance(moments([features]), theirs),
            }

        def row(name: str, found: dict[str, Any]) -> str:
            return (
                f"{name:<14} consistency {found['consistency']:5.1f}  of another "
                f"{found['of_another']:5.1f}  distance {found['distance']:.3f}"
            )

        interpolated = upsample(given, size)
        by_interpolation = measured(interpolated)
        print(row("interpolation", by_interpolation), flush=True)
        steps = options.steps or pretrained.config.sampling.steps or pretrained.schedule.timesteps
        total = len(options.levels) * len(ids) * steps
        points: list[dict[str, Any]] = []
        rows: list[Tensor] = []
        with tqdm(total=total, unit="img·step", disable=not sys.stderr.isatty()) as bar:
            for level in options.levels:
                request = pretrained.request(
                    seed=options.seed, steps=steps, low_resolution=given, augmentation_level=level
                )
                pictures = Sampler(pretrained, request).sample(ids, on_step=bar.update)
                points.append({"level": level, **measured(pictures)})
                print(row(f"level {level}", points[-1]), flush=True)
                if not rows:
                    pixels = given.repeat_interleave(size // side, 2)
                    rows = [pixels.repeat_interleave(size // side, 3), interpolated, pictures]
        if options.picture is not None:
            shown = [to_uint8(images[:SHOWN]) for images in rows]
            if options.small is None:
                shown.append(originals[:SHOWN].permute(0, 2, 3, 1).numpy())
            options.picture.parent.mkdir(parents=True, exist_ok=True)
            save_png(grid(np.concatenate(shown), columns=SHOWN), options.picture)
        if options.json is not None:
            report = {
                "machine": facts(device),
                "checkpoint": f"{options.checkpoint}, step {pretrained.step}",
                "small": "real digits" if options.small is None else str(options.small),
                "settings": {
                    "count": len(ids),
                    "seed": options.seed,
                    "sampler": pretrained.config.sampling.sampler,
                    "steps": steps,
                },
                "interpolation": by_interpolation,
                "points": points,
            }
            write_json(options.json, report)


if __name__ == "__main__":
    main()
