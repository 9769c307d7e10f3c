"""Generate samples from a trained model: `python launch/sample.py --checkpoint RUN --out DIR`.

Sample k of a seed is the same sample whatever else is generated with it. The manifest beside the
samples has everything needed to generate any one of them again. Started by `accelerate launch` or
torchrun, the processes share the work; an interrupted run is resumed by the same command.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ddpm_engine.bounds import Ge
from ddpm_engine.checkpoints.load import LoadedModel, load_model, with_codec, with_text_encoder
from ddpm_engine.cli.chain_options import ChainOptions, bind, models_of
from ddpm_engine.cli.options import (
    PositiveOrNone,
    exit_on_error,
    numbers,
    parse_options,
)
from ddpm_engine.cli.request_options import (
    RENAMED,
    ClassLabels,
    Numbers,
    options_of_request,
    prompts_of,
)
from ddpm_engine.errors import UserError
from ddpm_engine.generation.batch_size import BatchSize
from ddpm_engine.generation.generate import generate
from ddpm_engine.generation.sample_formats import Format
from ddpm_engine.generation.work_sharing import WorkShare
from ddpm_engine.launched import check_launched_precision
from ddpm_engine.networks.half_weights import to_half
from ddpm_engine.runtime import (
    DTYPES,
    Numerics,
    choose_precision,
    local_device,
    use_local_compile_cache,
)
from ddpm_engine.samplers.identity import Count, Seed, distinct


@options_of_request(
    "sampler", "steps", "spacing", "timesteps", "variance", "eta", "threshold", "cache_interval"
)
class SamplerOptions:
    """How the reverse process is solved."""


@options_of_request(
    "class_label", "class_labels", "guidance_scale", "guidance_rescale", "guidance_interval",
    "two_passes",
)  # fmt: skip
class ClassOptions:
    """What a class-conditional model generates."""

    class_label: Annotated[int, Ge(0)] | None = None
    """Class of every sample; default: see --class-labels."""
    class_labels: ClassLabels = None
    """Classes of samples 0, 1, 2, ..., and again from the first. all: every class in turn, the
    default of a class-conditional network; none: no class, the default with --images and
    --interpolate. With --low-resolution the default is the classes of those samples."""
    two_passes: bool = False
    """Evaluation with and without the class one after the other: half the memory."""


@options_of_request("prompt", "prompts", "negative_prompt", "text_encoder")
class TextOptions:
    """What a model that is conditioned on text generates."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Prompt; repeat it for several: samples 0, 1, 2, ..., and again from the first; default:
    none."""
    prompts: Path | None = None
    """File of prompts, one a line, in place of --prompt."""
    text_encoder: str | None = None
    """Place of the text encoder that the model was trained with, if it is elsewhere now: a folder
    of transformers, or package:NAME; default: where it was in training."""


@options_of_request(
    "images", "strength", "mask", "draws", "interpolate", "low_resolution", "augmentation"
)
class ImageOptions:
    """Image-to-image, inpainting, interpolation and super-resolution."""

    images: Path | None = None
    """Image to begin with, or a folder: sample k goes with image k, and again from the first;
    default: begin with noise."""
    mask: Path | None = None
    """Image that is white where to paint, or opaque where it has transparency; the rest of --images
    is kept; default: everywhere."""
    interpolate: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """Two samples of the seed; COUNT samples lead from the one to the other."""
    low_resolution: Path | None = None
    """Low-resolution images for a super-resolution network: a folder of this script, whose sample k
    becomes sample k; or an image, or a folder of images, as --images takes them."""


@options_of_request("batch_size", "precision", "compile", "format", "per_shard")
class MachineOptions:
    """Speed and files; of these, only the precision changes samples beyond rounding."""

    batch_size: BatchSize = "auto"
    """Number of samples generated at a time by each process, which changes them by rounding at
    most. auto: as many as a GPU's memory holds, found by trying, and 64 on a CPU."""
    compile: bool = False
    """Compile the network block by block with torch.compile: worth it for many samples."""
    format: Format = "png"
    """png: a file per sample; tar: WebDataset shards of PNGs, tar-npy: of arrays; npz: of
    NumPy's."""
    per_shard: PositiveOrNone = None
    """Samples of a shard; default: 1024."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Generate samples from a trained model. Run the same command again to resume."""

    checkpoint: Path | None = None
    """A run directory, one checkpoints/step-… in it, the folder of a diffusers pipeline, or the
    name of a model on the Hugging Face hub. This, or --cascade, is required."""
    out: Path
    """Folder of the samples, grid.png and manifest.json."""
    count: Count | None = None
    """Number of samples: ids 0 to COUNT − 1 of the seed; default: 64, or one of each prompt."""
    ids: Numbers = None
    """Ids of samples to generate instead of COUNT, such as 17,42."""
    seed: Seed = 0
    """Seed of all noise: another seed gives other samples."""
    weights: Literal["ema", "model"] = "ema"
    """Weights of a run: the EMA, or those of the last step."""
    autoencoder: str | None = None
    """Place of the autoencoder whose latents the model samples, if it is elsewhere now: a folder of
    diffusers; default: where it was in training."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    text: TextOptions = field(default_factory=TextOptions)
    chain: ChainOptions = field(default_factory=ChainOptions)
    classes: ClassOptions = field(default_factory=ClassOptions)
    image: ImageOptions = field(default_factory=ImageOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)

    def of_request(self) -> dict[str, Any]:
        """Return the options that describe the request, by name."""
        return {
            "seed": self.seed,
            **vars(self.sampler),
            "negative_prompt": vars(self.text)["negative_prompt"],
            **vars(self.classes),
            **vars(self.image),
            "precision": vars(self.machine)["precision"],
        }


_COUNT = 64
_EXCLUDES = [
    ("timesteps", "steps"),
    ("timesteps", "spacing"),
    ("prompt", "prompts"),
    ("class_label", "class_labels"),
    ("interpolate", "ids"),
    ("interpolate", "images"),
    ("interpolate", "class_labels"),
]
"""Options that contradict each other."""


def check(options: Options) -> None:
    """Refuse options that contradict each other.

    Args:
        options: of the command.

    Raises:
        UserError: the first of them.
    """
    machine = options.machine
    asked = {**options.of_request(), **vars(options.text), "ids": options.ids}
    given = {name for name, value in asked.items() if value not in (None, ())}
    for one, other in _EXCLUDES:
        if one in given and other in given:
            raise UserError(f"`{one}` and `{other}` do not go together; leave one out", one)
    if machine.per_shard is not None and machine.format == "png":
        raise UserError(
            "`per_shard` needs `format` tar, tar-npy or npz; give one of them", "per_shard"
        )


def parse_ids(options: Options, prompts: int = 0) -> Sequence[int]:
    """Return the ids of the samples.

    Args:
        options: of the command.
        prompts: number of those that it names.

    Raises:
        UserError: a list that is none.
    """
    if options.ids is None:
        default = prompts or _COUNT
        return range(default if options.count is None else options.count)
    ids = distinct(numbers("ids", options.ids))
    if options.count not in (None, len(ids)):
        raise UserError(
            f"`count` is {options.count}, but `ids` names {len(ids)}; leave one out", "count"
        )
    return ids


def parse_interpolation(options: Options, ids: Sequence[int]) -> tuple[int, int, int] | None:
    """Return the ends and the number of samples from one to the other.

    Args:
        options: of the command.
        ids: of the samples.

    Raises:
        UserError: anything but two ids.
    """
    text = options.image.interpolate
    if text is None:
        return None
    ends = numbers("interpolate", text)
    if len(ends) != 2 or min(ends) < 0:
        raise UserError(f"`interpolate` is {text!r}; it takes two ids, as 17,42", "interpolate")
    return ends[0], ends[1], len(ids)


def load_all(
    places: Sequence[Path],
    device: torch.device,
    weights: str,
    text_encoder: str | None = None,
    autoencoder: str | None = None,
) -> list[LoadedModel]:
    """Load the models of a command.

    Args:
        places: of the models.
        device: where they go.
        weights: as in `load_model`.
        text_encoder: of those that are conditioned on text.
        autoencoder: of those that sample latents.

    Raises:
        UserError: one cannot be loaded, or none takes text and an encoder is named, or none samples
            latents and an autoencoder is named.
    """
    if len(places) == 1:
        return [load_model(places[0], device, weights, text_encoder, autoencoder)]
    models = [load_model(place, device, weights) for place in places]
    if text_encoder is not None and not any(model.takes_text for model in models):
        raise UserError(
            f"`text_encoder` is {text_encoder}, but no model is conditioned on text; leave it out",
            "text_encoder",
        )
    latent = [model.codec.clip_range is None for model in models]
    if autoencoder is not None and not any(latent):
        raise UserError(
            f"`autoencoder` is {autoencoder}, but no model samples latents; leave it out",
            "autoencoder",
        )
    models = [
        with_codec(model, place, device, autoencoder if of_latents else None)
        for model, place, of_latents in zip(models, places, latent, strict=True)
    ]
    return [
        with_text_encoder(model, place, device, text_encoder if model.takes_text else None)
        for model, place in zip(models, places, strict=True)
    ]


def main() -> None:
    """Parse, load, generate, print."""
    use_local_compile_cache()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_on_error(Options, omit_prefixes=True, renamed=RENAMED):
        options = parse_options(Options, omit_prefixes=True)
        Numerics().apply()
        device = local_device()
        precision = choose_precision(options.of_request()["precision"], device)
        check_launched_precision(precision, "precision")
        check(options)
        prompts = prompts_of(options.text.prompt, options.text.prompts)
        ids = parse_ids(options, len(prompts or ()))
        places = models_of(options.chain, options.checkpoint)
        encoder = vars(options.text)["text_encoder"]
        models = load_all(places, device, options.weights, encoder, options.autoencoder)
        # The networks are this command's own: their weights need not be there twice.
        if precision in DTYPES:
            for model in models:
                to_half(model.network, DTYPES[precision])
        asked = {
            **options.of_request(),
            "prompts": prompts,
            "interpolate": parse_interpolation(options, ids),
        }
        machine = options.machine
        generate(
            models[-1],
            bind(models, options.chain, asked),
            ids,
            options.out,
            format=machine.format,
            batch_size=machine.batch_size,
            per_shard=1024 if machine.per_shard is None else machine.per_shard,
            compile=machine.compile,
            share=WorkShare.from_environment(),
            report=lambda line: print(line, flush=True),
        )


if __name__ == "__main__":
    main()
