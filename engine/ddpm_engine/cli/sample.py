"""Draw pictures from a trained model: `python launch/sample.py --checkpoint RUN --out DIR`.

Picture k of a seed is the same picture whatever else is drawn with it; the manifest written beside
the pictures says everything needed to make any one of them again. Started by `accelerate launch` or
torchrun, the processes divide the pictures; a run that was ended goes on when it is started again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.cli.options import exit_on_user_error, numbers, parse_options
from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.errors import UserError
from ddpm_engine.generation.input_images import (
    InputImages,
    SamplesAsInput,
    read_mask,
    small_images,
)
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.recipe import Drawing, Recipe
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.sample_formats import Format
from ddpm_engine.generation.work_sharing import WorkShare, fill_missing
from ddpm_engine.runtime import local_device, use_local_compile_cache
from ddpm_engine.samplers.config import SamplerName, Spacing
from ddpm_engine.samplers.request import Precision

Numbers = Annotated[str | None, tyro.conf.arg(metavar="K,K,...")]


@dataclass(frozen=True)
class SamplerOptions:
    """How the reverse process is solved."""

    sampler: SamplerName | None = None
    """Which one; default: the run's."""
    steps: int | None = None
    """Steps a picture, one or two network evaluations each; default: the run's."""
    spacing: Spacing | None = None
    """Which timesteps are visited; default: the run's."""
    timesteps: Numbers = None
    """Visit exactly these instead, such as 999,750,500,250,0; default: see --spacing."""
    variance: Variance | None = None
    """Variance of ddpm; default: the run's."""
    eta: float | None = None
    """Share of fresh noise in ddim, 0 to 1; default: the run's."""
    threshold: float | None = None
    """Bound estimates of the image at this quantile of theirs, such as 0.995; default: at 1."""
    cache_interval: int = 1
    """Recompute the network's deep levels at every so many-th step only; 1: always."""


@dataclass(frozen=True)
class ClassOptions:
    """What a class-conditional model draws."""

    class_label: int | None = None
    """Class of every picture; default: see --class-labels."""
    class_labels: Annotated[str | None, tyro.conf.arg(metavar="C,C,...|all|none")] = None
    """Class of picture 0, 1, 2, ..., and again from the first. all: every class in turn, the
    default of a class-conditional network; none: no class, the default with --images and
    --interpolate, which say by themselves what to draw. With --low-resolution: the classes of those
    pictures."""
    guidance_scale: float | None = None
    """Go so far towards the class, 1 being no guidance; default: 1."""
    guidance_rescale: float | None = None
    """Bring the guided prediction's deviation back, 0 (not) to 1 (wholly); default: 0."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only while the noise level sigma is above the first and at most the second; default:
    always."""
    two_passes: bool = False
    """Evaluate class and no class one after the other: half the memory."""


@dataclass(frozen=True)
class ImageOptions:
    """Beginning with images, keeping parts of them, and going from picture to picture."""

    images: Path | None = None
    """An image, or a folder: picture k goes with image k, and again from the first; default: begin
    with noise."""
    strength: float | None = None
    """Share of the steps taken from the noised image, 0 to 1; default 0.5, without a mask."""
    mask: Path | None = None
    """Paint only where this image is white, and keep the rest of --images; default: everywhere."""
    draws: int | None = None
    """With a mask: take each step so often, so that the parts meet; default: 1."""
    interpolate: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """COUNT pictures that lead from picture A of the seed to picture B."""
    low_resolution: Path | None = None
    """For a network that enlarges: a folder of this script, whose picture k becomes picture k; or
    an image, or a folder of images, as --images takes them."""
    augmentation: int | None = None
    """Noise these first by so many steps of a chain of 1000; default: 0."""


@dataclass(frozen=True)
class MachineOptions:
    """How fast, and in what files; none of it changes a picture beyond rounding but precision."""

    batch_size: int = 64
    """Pictures at a time, in each process."""
    precision: Precision = "no"
    """Mixed precision of the network's arithmetic; no: float32."""
    compile: bool = False
    """Compile the network block by block with torch.compile: worth it for many pictures."""
    format: Format = "png"
    """png: a file each; tar: WebDataset shards of PNGs, tar-npy: of arrays; npz: of NumPy's."""
    per_shard: int | None = None
    """Pictures of a shard; default: 1024."""


@dataclass(frozen=True)
class Options:
    """Draw pictures from a trained model. Run the same command again to go on."""

    checkpoint: Path
    """A run directory, one checkpoints/step-… in it, or the folder of a diffusers pipeline."""
    out: Path
    """Folder for the pictures, grid.png and manifest.json."""
    count: int = 64
    """How many pictures: ids 0 to COUNT − 1 of the seed."""
    ids: Numbers = None
    """Make just these pictures of the seed, such as 17,42, instead of COUNT."""
    seed: int = 0
    """Of all noise: another seed, other pictures."""
    weights: Literal["ema", "model"] = "ema"
    """Of a run: averaged weights, or those of the last step."""
    sampler: SamplerOptions = SamplerOptions()
    classes: ClassOptions = ClassOptions()
    image: ImageOptions = ImageOptions()
    machine: MachineOptions = MachineOptions()


RENAMED = {
    "sampling.": "",
    "guidance.": "guidance_",
    "classes": "class_labels",
    "repeats": "draws",
    "augmentation_level": "augmentation",
}
"""Fields of a run, and of a request for samples, that have other names here."""

_NEEDS = {
    "guidance-rescale": "guidance-scale",
    "guidance-interval": "guidance-scale",
    "two-passes": "guidance-scale",
    "strength": "images",
    "mask": "images",
    "draws": "mask",
    "augmentation": "low-resolution",
}
"""Options that say nothing without another."""

_EXCLUDES = [
    ("timesteps", "steps"),
    ("timesteps", "spacing"),
    ("class-label", "class-labels"),
    ("interpolate", "ids"),
    ("interpolate", "images"),
    ("interpolate", "class-labels"),
]
"""Options that contradict each other."""

_ONLY_WITH = {"variance": ("ddpm",), "eta": ("ddim",)}
_NOT_WITH = {"spacing": ("euler", "heun")}
"""Options of some samplers, and of all but some."""


def given(options: Options) -> dict[str, Any]:
    """The options that were set, by their flags without dashes."""
    sections = (options.sampler, options.classes, options.image, options.machine)
    every = {name: value for section in sections for name, value in asdict(section).items()}
    every["ids"] = options.ids
    return {
        name.replace("_", "-"): value
        for name, value in every.items()
        if value is not None and value is not False
    }


def check_flags(options: Options, sampler: str) -> None:
    """Refuse flags that do not go together.

    Raises:
        UserError: the first such pair.
    """
    flags = given(options)
    for flag, needed in _NEEDS.items():
        if flag in flags and needed not in flags:
            raise UserError(f"--{flag} needs --{needed}; give that too, or leave --{flag} out")
    for one, other in _EXCLUDES:
        if one in flags and other in flags:
            raise UserError(f"--{one} and --{other} do not go together; leave one out")
    for flag in flags:
        if sampler not in _ONLY_WITH.get(flag, (sampler,)) or sampler in _NOT_WITH.get(flag, ()):
            raise UserError(f"--{flag} does nothing with the sampler {sampler}; leave it out")
    if "per-shard" in flags and options.machine.format == "png":
        raise UserError("--per-shard needs --format tar, tar-npy or npz; give one of them")
    for flag, value in [
        ("count", options.count),
        ("batch-size", options.machine.batch_size),
        ("cache-interval", options.sampler.cache_interval),
        ("per-shard", flags.get("per-shard", 1)),
        ("draws", flags.get("draws", 1)),
    ]:
        if value < 1:
            raise UserError(f"--{flag} is {value}; it must be at least 1")


def parse_ids(options: Options) -> list[int]:
    """The picture ids asked for."""
    if options.ids is None:
        return list(range(options.count))
    ids = numbers("ids", options.ids)
    if min(ids) < 0 or len(set(ids)) < len(ids):
        raise UserError(f"--ids is {options.ids!r}; ids are not negative and named once each")
    return sorted(ids)


def parse_classes(
    options: Options, null_class: int | None, small: SamplesAsInput | InputImages | None
) -> tuple[int, ...] | None:
    """The classes to go through, or None for no class."""
    asked, image = options.classes, options.image
    if asked.class_label is not None:
        return (asked.class_label,)
    labels = asked.class_labels
    if labels is None and small is not None and null_class is not None:
        return small.classes
    if labels is None:
        from_noise_alone = image.images is None and image.interpolate is None
        labels = "all" if null_class and from_noise_alone else "none"
    if labels == "all":
        if not null_class:
            raise UserError("--class-labels is all, but this network was trained without classes")
        return tuple(range(null_class))
    return None if labels == "none" else numbers("class-labels", labels)


def parse_guidance(options: ClassOptions) -> Guidance | None:
    """How to guide."""
    if options.guidance_scale is None:
        return None
    guidance = Guidance(
        options.guidance_scale,
        options.guidance_rescale or 0.0,
        two_passes=options.two_passes or None,
    )
    if options.guidance_interval is None:
        return guidance
    return replace(guidance, interval=options.guidance_interval)


def recipe(options: Options, pretrained: LoadedModel) -> Recipe:
    """What the options ask for, with the run's own sampling where they say nothing."""
    solver, image = options.sampler, options.image
    chosen = {
        name: value
        for name in ("sampler", "steps", "spacing", "variance", "eta")
        if (value := getattr(solver, name)) is not None
    }
    sampling = replace(pretrained.config.sampling, **chosen)
    check_flags(options, sampling.sampler)
    timesteps = None
    if solver.timesteps is not None:
        timesteps, sampling = numbers("timesteps", solver.timesteps), replace(sampling, steps=None)
    shape = pretrained.network.sample_shape
    strength = image.strength
    if image.images is not None and image.mask is None and strength is None:
        strength = 0.5
    small = None
    if image.low_resolution is not None:
        side = pretrained.network.conditioning.low_resolution or shape[-1]
        small = small_images(image.low_resolution, (shape[0], side, side))
    ends = None
    if image.interpolate is not None:
        ends = numbers("interpolate", image.interpolate)
        if len(ends) != 2 or min(ends) < 0:
            raise UserError(f"--interpolate is {image.interpolate!r}; it takes two ids, as 17,42")
    return Recipe(
        seed=options.seed,
        sampling=sampling,
        timesteps=timesteps,
        classes=parse_classes(options, pretrained.network.conditioning.null_class, small),
        guidance=parse_guidance(options.classes),
        threshold=solver.threshold,
        images=None if image.images is None else InputImages(image.images, shape),
        strength=strength,
        mask=None if image.mask is None else read_mask(image.mask, shape[-1]),
        draws=image.draws or 1,
        low_resolution=small,
        augmentation=image.augmentation or 0,
        interpolate=None if ends is None else (ends[0], ends[1], options.count),
        cache_interval=solver.cache_interval,
        precision=options.machine.precision,
    )


def compile_network(drawing: Drawing, batch: int, tell: bool) -> None:
    """Compile now, and say so: nothing else would be seen for a while."""
    began = time.monotonic()
    if tell:
        print(f"compiling the network for batches of {batch}, block by block ...", flush=True)
    drawing.model.compile_blocks()
    drawing.warm_up(batch)
    if tell:
        print(f"compiled in {time.monotonic() - began:.1f} s", flush=True)


def main() -> None:
    """Parse, load, draw, write."""
    use_local_compile_cache()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_on_user_error(Options, omit_prefixes=True, renamed=RENAMED):
        options = parse_options(Options, omit_prefixes=True)
        share = WorkShare.from_environment()
        ids = parse_ids(options)
        pretrained = load_model(options.checkpoint, local_device(), options.weights)
        asked = recipe(options, pretrained)
        machine = options.machine
        progress: Progress | None = None

        def on_step(pictures: int) -> None:
            if progress is not None:
                progress.step(pictures)

        drawing = Drawing(pretrained, asked, on_step)
        weights = None if pretrained.checkpoint is None else options.weights
        settings = {**drawing.settings(), "weights": weights}
        pictures = SampleDir(options.out, settings, machine.format, drawing.label_of)
        wanted = set(ids)
        before = len(wanted & pictures.ids())
        if before == len(ids) and pictures.grid.exists():
            if share.rank == 0:
                print(f"all {len(ids)} pictures are already in {options.out}")
            return
        if machine.compile:
            compile_network(drawing, min(machine.batch_size, len(ids)), tell=share.rank == 0)
        progress = Progress(
            len(ids), lambda: len(wanted & pictures.ids()), drawing.evaluations, share.rank == 0
        )
        finished = fill_missing(
            pictures, ids, drawing.draw, batch_size=machine.batch_size,
            chunk_size=machine.per_shard or 1024, share=share, progress=progress,
        )  # fmt: skip
        progress.close()
        if finished:
            print(f"{len(ids)} pictures in {options.out}, the first of them in {pictures.grid}")
        elif share.world_size == 1:
            print(f"another process is still drawing pictures in {options.out}")


if __name__ == "__main__":
    main()
