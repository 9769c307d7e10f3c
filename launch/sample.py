"""Draw pictures from a trained model: `python launch/sample.py --checkpoint RUN --out DIR`.

Picture k of a seed is the same picture whatever else is drawn with it; the manifest written beside
the pictures says everything needed to make any one of them again.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from ddpm_engine.compile_cache import use_local_compile_cache
from ddpm_engine.errors import UserError, exit_on_user_error
from ddpm_engine.evaluation.picture_set import PictureSet
from ddpm_engine.evaluation.pictures import to_uint8
from ddpm_engine.pretrained import load_pretrained
from ddpm_engine.samplers import sample
from ddpm_engine.samplers.ddpm import Variance
from ddpm_engine.samplers.spacing import Spacing


@dataclass(frozen=True)
class Options:
    """Draw pictures from a trained model."""

    checkpoint: Path
    """A run directory, one checkpoints/step-… in it, or the folder of a diffusers pipeline."""
    out: Path
    """Folder for the pictures, grid.png and manifest.json."""
    count: int = 64
    """How many pictures: ids 0 to COUNT − 1 of the seed."""
    ids: Annotated[str | None, tyro.conf.arg(metavar="K,K,...")] = None
    """Make just these pictures of the seed, such as 17,42, instead of COUNT."""
    seed: int = 0
    """Of all noise."""
    steps: int | None = None
    """Network evaluations a picture; default: what the run was configured with."""
    sampler: Literal["ddpm"] | None = None
    """Which sampler; default: the run's."""
    spacing: Spacing | None = None
    """Which timesteps are visited; default: the run's."""
    variance: Variance | None = None
    """Variance of ancestral sampling; default: the run's."""
    class_label: int | None = None
    """Class of every picture, for a class-conditional model; default: no class."""
    weights: Literal["ema", "model"] = "ema"
    """Of a run: averaged weights, or those of the last step."""
    format: Literal["png", "npz"] = "png"
    """One PNG a picture, or all in samples.npz (images uint8 [N, H, W, C], and ids)."""
    batch_size: int = 64
    """Pictures at a time."""


def parse_ids(options: Options) -> list[int]:
    """The picture ids asked for."""
    if options.ids is None:
        if options.count < 1:
            raise UserError(f"--count is {options.count}; it must be at least 1")
        return list(range(options.count))
    try:
        ids = [int(part) for part in options.ids.split(",")]
    except ValueError:
        raise UserError(f"--ids is {options.ids!r}; it takes whole numbers, as 17,42") from None
    if min(ids) < 0 or len(set(ids)) < len(ids):
        raise UserError(f"--ids is {options.ids!r}; ids are not negative and named once each")
    return ids


def main() -> None:
    """Parse, load, draw, write."""
    use_local_compile_cache()
    with exit_on_user_error():
        options = tyro.cli(Options)
        ids = parse_ids(options)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        pretrained = load_pretrained(options.checkpoint, device, options.weights)
        model, config = pretrained.model, pretrained.config
        labels = None
        if options.class_label is not None and model.null_class is None:
            raise UserError(
                f"--class-label is {options.class_label} but {options.checkpoint} was trained "
                "without classes; leave it out"
            )
        if model.null_class is not None:
            label = model.null_class if options.class_label is None else options.class_label
            if not 0 <= label <= model.null_class:
                raise UserError(
                    f"--class-label is {label}; classes are 0 to {model.null_class - 1}"
                )
            labels = torch.full((len(ids),), label, device=device)

        chosen = {
            name: value
            for name in ("sampler", "steps", "spacing", "variance")
            if (value := getattr(options, name)) is not None
        }
        sampling = replace(config.sampling, **chosen)
        steps = config.diffusion.timesteps if sampling.steps is None else sampling.steps
        pictures = PictureSet(
            options.out,
            {
                **asdict(sampling),
                "steps": steps,
                "seed": options.seed,
                "class_label": options.class_label,
                "weights": None if pretrained.checkpoint is None else options.weights,
                "checkpoint": pretrained.hash,
                "checkpoint_step": pretrained.step,
            },
            options.format,
        )
        missing = pictures.missing(ids)
        if not missing:
            print(f"all {len(ids)} pictures are already in {options.out}")
            return
        evaluations = len(missing) * steps
        with tqdm(total=evaluations, unit="img·step", disable=not sys.stderr.isatty()) as bar:
            drawn = sample(
                model,
                pretrained.schedule,
                sample_ids=missing,
                prediction=config.diffusion.prediction,
                labels=None if labels is None else labels[: len(missing)],
                batch_size=options.batch_size,
                on_step=bar.update,
                seed=options.seed,
                sampler=sampling.sampler,
                steps=steps,
                spacing=sampling.spacing,
                variance=sampling.variance,
                clip=pretrained.clip,
            )
        pictures.write(missing, to_uint8(drawn))
        print(f"{len(missing)} pictures in {options.out}, shown together in {pictures.grid}")


if __name__ == "__main__":
    main()
