"""Measure a model or a folder of pictures against real images:

    python launch/evaluate.py --checkpoint RUN --data SHARDS --metrics fid,kid,is --count 50000
    python launch/evaluate.py --samples PICTURES --data SHARDS

Started by `accelerate launch` or torchrun, the processes divide the work; an evaluation that was
ended goes on when it is started again. docs/evaluation.md says what the figures mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.cli.options import exit_on_user_error, parse_options
from ddpm_engine.data.stream import is_stream
from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.feature_networks import FeaturesName, default_cache, feature_network
from ddpm_engine.evaluation.metrics import PIECE, Division
from ddpm_engine.evaluation.nll import likelihood_of_real
from ddpm_engine.evaluation.run import (
    Steps,
    Subject,
    compare_with_real,
    drawn_subject,
    folder_subject,
)
from ddpm_engine.evaluation.sources import open_reference
from ddpm_engine.generation.recipe import Drawing, Precision, Recipe
from ddpm_engine.runtime import local_device, use_local_compile_cache
from ddpm_engine.samplers.config import SamplerName, Spacing

COMPARING = ("fid", "kid", "is", "precision-recall", "accuracy")
METRICS = (*COMPARING, "nll")


@dataclass(frozen=True)
class DrawingOptions:
    """How pictures are drawn; for more than this, draw with launch/sample.py and give --samples."""

    seed: int = 0
    """Of all noise: another seed, other pictures."""
    weights: Literal["ema", "model"] = "ema"
    """Of a run: averaged weights, or those of the last step."""
    sampler: SamplerName | None = None
    """Which one; default: the run's."""
    steps: int | None = None
    """Steps a picture, one or two network evaluations each; default: the run's."""
    spacing: Spacing | None = None
    """Which timesteps are visited; default: the run's."""
    variance: Variance | None = None
    """Variance of ddpm, and of nll; default: the run's."""
    eta: float | None = None
    """Share of fresh noise in ddim, 0 to 1; default: the run's."""
    class_labels: Annotated[str | None, tyro.conf.arg(metavar="C,C,...|all|none")] = None
    """Class of picture 0, 1, 2, ..., and again from the first. all: every class in turn, the
    default of a class-conditional network; none: no class."""
    guidance_scale: float | None = None
    """Go so far towards the class, 1 being no guidance; default: 1."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only while the noise level sigma is above the first and at most the second; default:
    always."""
    batch_size: int = 64
    """Pictures at a time, in each process."""
    precision: Precision = "no"
    """Mixed precision of the network's arithmetic; no: float32."""


@dataclass(frozen=True)
class FeatureOptions:
    """What pictures are compared by."""

    features: FeaturesName = "inception"
    """inception: the network of the Fréchet Inception Distance; digits: a small classifier."""
    inception_weights: Path | None = None
    """File of Inception's weights; default: downloaded once, into --cache."""
    reference_count: int | None = None
    """Compare with so many of the real images, evenly spaced; default: all."""
    cache: Path | None = None
    """Keeps features of real images; default: ~/.cache/ddpm-engine/evaluation."""


@dataclass(frozen=True)
class Options:
    """Measure a model or a folder of pictures. Run the same command again to go on."""

    checkpoint: Path | None = None
    """A run directory, one checkpoints/step-… in it, or the folder of a diffusers pipeline."""
    samples: Path | None = None
    """Evaluate these pictures instead: a folder of launch/sample.py, or of any images."""
    data: str | None = None
    """Real images: a folder of indexed shards or its URL; default: what the run was trained on."""
    metrics: Annotated[str, tyro.conf.arg(metavar="M,M,...")] = "fid,kid,is,precision-recall"
    """Which: fid, kid, is, precision-recall, accuracy (of the classes of drawn digits), nll."""
    count: int | None = None
    """How many pictures, and for nll real images; default: 50000, or all of --samples, and for nll
    all."""
    out: Path | None = None
    """Folder of pictures, features and reports; default: one by settings, in RUN/evaluation."""
    drawing: DrawingOptions = DrawingOptions()
    features: FeatureOptions = FeatureOptions()
    piece: int = PIECE
    """Pictures that a process claims and finishes at a time."""


def parse_metrics(options: Options) -> list[str]:
    """The metrics asked for.

    Raises:
        UserError: one that there is not, or that does not go with the features.
    """
    metrics = [metric.strip() for metric in options.metrics.split(",")]
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise UserError(f"--metrics has {unknown[0]!r}; there are {', '.join(METRICS)}")
    if "accuracy" in metrics and options.features.features != "digits":
        raise UserError(
            f"accuracy needs --features digits, not {options.features.features}, whose classes "
            "are not the pictures'"
        )
    return metrics


def check(options: Options) -> None:
    """Refuse flags that do not go together, and numbers out of range.

    Raises:
        UserError: the first of them.
    """
    if (options.checkpoint is None) == (options.samples is None):
        raise UserError("give either --checkpoint, to draw pictures, or --samples, which are there")
    if options.samples is not None and "nll" in parse_metrics(options):
        raise UserError("nll is of a network: give --checkpoint, or leave it out of --metrics")
    if options.samples is not None and options.drawing != DrawingOptions():
        raise UserError("--samples are drawn already; leave out how to draw")
    for flag, value in [
        ("count", options.count),
        ("reference-count", options.features.reference_count),
        ("piece", options.piece),
        ("batch-size", options.drawing.batch_size),
    ]:
        if value is not None and value < 1:
            raise UserError(f"--{flag} is {value}; it must be at least 1")
    if options.drawing.guidance_interval is not None and options.drawing.guidance_scale is None:
        raise UserError("--guidance-interval needs --guidance-scale; give that too")


def recipe(options: DrawingOptions, pretrained: LoadedModel) -> Recipe:
    """What the options ask for, with the run's own sampling where they say nothing."""
    chosen = {
        name: value
        for name in ("sampler", "steps", "spacing", "variance", "eta")
        if (value := getattr(options, name)) is not None
    }
    null = pretrained.model.conditioning.null_class
    labels = options.class_labels or ("none" if null is None else "all")
    classes: tuple[int, ...] | None = None
    if labels == "all":
        if null is None:
            raise UserError("--class-labels is all, but this network was trained without classes")
        classes = tuple(range(null))
    elif labels != "none":
        try:
            classes = tuple(int(part) for part in labels.split(","))
        except ValueError:
            raise UserError(f"--class-labels is {labels!r}; it takes numbers, as 3,1") from None
    guidance = None if options.guidance_scale is None else Guidance(options.guidance_scale)
    if guidance is not None and options.guidance_interval is not None:
        guidance = replace(guidance, interval=options.guidance_interval)
    return Recipe(
        seed=options.seed,
        sampling=replace(pretrained.config.sampling, **chosen),
        classes=classes,
        guidance=guidance,
        precision=options.precision,
    )


def folder_of(options: Options, pretrained: LoadedModel | None) -> Path:
    """Where evaluations live: --out, or beside what is evaluated, never within a checkpoint."""
    if options.out is not None:
        return options.out
    if options.samples is not None:
        return options.samples.with_name(f"{options.samples.name}-evaluation")
    assert options.checkpoint is not None, "checked"
    loaded = None if pretrained is None else pretrained.checkpoint
    if loaded is not None and options.checkpoint == loaded.path:
        return options.checkpoint.parent.parent / "evaluation"
    return options.checkpoint / "evaluation"


def name_of(drawing: Drawing, weights: str | None) -> str:
    """Of the folder of pictures drawn with these settings."""
    settings = json.dumps({**drawing.settings(), "weights": weights}, sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    sampling = drawing.recipe.sampling
    return f"{sampling.sampler}-{sampling.steps}-seed{drawing.recipe.seed}-{digest[:8]}"


def location(options: Options, pretrained: LoadedModel | None) -> str:
    """Where the real images are.

    Raises:
        UserError: nothing says, or they cannot be indexed.
    """
    if options.data is not None:
        where = options.data
    elif pretrained is None or pretrained.checkpoint is None:
        raise UserError("give the real images with --data; nothing else says where they are")
    elif pretrained.config.data.mix_with:
        raise UserError("the run mixes several sets; say with --data which one to compare with")
    else:
        where = str(pretrained.config.data.path)
    if is_stream(where):
        raise UserError(f"--data {where} is a stream, which has no end; give a set with an index")
    return where


def compare(
    options: Options, pretrained: LoadedModel | None, device: torch.device, division: Division
) -> Path | None:
    """Draw, if there is a network, and measure the pictures."""
    out, show = folder_of(options, pretrained), division.rank == 0
    subject: Subject
    if pretrained is None:
        assert options.samples is not None, "checked"
        subject = folder_subject(options.samples, options.count)
    else:
        steps, weights = Steps(), options.drawing.weights if pretrained.checkpoint else None
        drawing = Drawing(pretrained, recipe(options.drawing, pretrained), steps)
        if options.out is None:
            out /= name_of(drawing, weights)
        subject = drawn_subject(
            drawing, weights, options.count or 50_000, out, options.drawing.batch_size, steps
        )
    shape = subject.images.shape
    chosen = options.features
    real = open_reference(location(options, pretrained), shape, chosen.reference_count)
    cache = chosen.cache or default_cache()
    network = feature_network(
        chosen.features, shape[0], device, weights=chosen.inception_weights, cache=cache
    )
    metrics = [metric for metric in parse_metrics(options) if metric in COMPARING]
    return compare_with_real(
        subject, real, network, metrics, out, cache, division=division, device=device, show=show
    )


def bound(options: Options, pretrained: LoadedModel, division: Division) -> Path | None:
    """Take the bound of the real images."""
    channels, height, width = pretrained.model.sample_shape
    real = open_reference(location(options, pretrained), (height, width, channels), options.count)
    return likelihood_of_real(
        pretrained,
        options.drawing.weights if pretrained.checkpoint else None,
        real,
        folder_of(options, pretrained),
        variance=options.drawing.variance,
        seed=options.drawing.seed,
        batch_size=options.drawing.batch_size,
        division=division,
        show=division.rank == 0,
    )


def main() -> None:
    """Parse, load, draw, measure, report."""
    use_local_compile_cache()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_on_user_error(Options, omit_prefixes=True):
        options = parse_options(Options, omit_prefixes=True)
        check(options)
        metrics = parse_metrics(options)
        # No process needs to know more of the others, and none ever waits for one.
        rank, ranks = (int(os.environ.get(k, d)) for k, d in [("RANK", "0"), ("WORLD_SIZE", "1")])
        division, device = Division(rank, ranks, options.piece), local_device()
        pretrained = None
        if options.checkpoint is not None:
            pretrained = load_model(options.checkpoint, device, options.drawing.weights)
            if pretrained.model.conditioning.low_resolution is not None:
                raise UserError(
                    f"--checkpoint {options.checkpoint} enlarges pictures: draw some with "
                    "launch/sample.py --low-resolution, and give them with --samples"
                )
        reports = []
        if any(metric in COMPARING for metric in metrics):
            reports.append(compare(options, pretrained, device, division))
        if "nll" in metrics:
            assert pretrained is not None, "checked"
            reports.append(bound(options, pretrained, division))
        for report in reports:
            if report is not None:
                print(report.with_suffix(".md").read_text(encoding="utf-8"))
                print(report)
            elif ranks == 1:
                print("another process is still at it, and will report; or run this again")


if __name__ == "__main__":
    main()
