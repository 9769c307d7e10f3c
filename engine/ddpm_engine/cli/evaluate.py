"""Compute metrics of a model, or of a folder of samples, against real images:

    python launch/evaluate.py --checkpoint RUN --data SHARDS --metrics fid,kid,is --count 50000
    python launch/evaluate.py --samples FOLDER --data SHARDS

Started by `accelerate launch` or torchrun, the processes share the work; an interrupted evaluation
is resumed by running the same command again. docs/evaluation.md explains the metrics.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.cli.options import exit_on_user_error, parse_options
from ddpm_engine.cli.request_options import (
    RENAMED,
    ClassLabels,
    options_of_request,
    request_of,
)
from ddpm_engine.data.stream import is_stream
from ddpm_engine.diffusion.config import Variance
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation import metrics as comparing
from ddpm_engine.evaluation.feature_networks import FeaturesName, default_cache, feature_network
from ddpm_engine.evaluation.nll import bound_of_real_images
from ddpm_engine.evaluation.run import CHUNK_SIZE, evaluate
from ddpm_engine.evaluation.sources import folder_source, generated_source, open_real_images
from ddpm_engine.generation.work_sharing import WorkShare
from ddpm_engine.launched import check_launched_precision
from ddpm_engine.plots.curves import bound_figure
from ddpm_engine.runtime import local_device, use_local_compile_cache

METRICS = (*comparing.METRICS, "nll")


@options_of_request(
    "seed", "weights", "sampler", "steps", "spacing", "variance", "eta", "class_labels",
    "guidance_scale", "guidance_interval", "batch_size", "precision",
)  # fmt: skip
class SamplingOptions:
    """How samples are generated; for other options, use launch/sample.py and --samples."""

    weights: Literal["ema", "model"] = "ema"
    """Weights of a run: the EMA, or those of the last step."""
    variance: Variance | None = None
    """Variance of ddpm, and of nll; default: the run's."""
    class_labels: ClassLabels = None
    """Classes of samples 0, 1, 2, ..., then again from the first. all: every class in turn, the
    default of a class-conditional network; none: unconditional."""
    batch_size: int = 64
    """Samples generated at a time by each process."""


@dataclass(frozen=True)
class FeatureOptions:
    """What samples and real images are compared by."""

    features: FeaturesName = "inception"
    """Feature network. inception: that of the Fréchet Inception Distance; digits: a small
    classifier."""
    inception_weights: Path | None = None
    """File of Inception's weights; default: downloaded once, into --cache."""
    reference_count: int | None = None
    """Number of real images to compare with, evenly spaced; default: all."""
    cache: Path | None = None
    """Folder of the features of real images; default: ~/.cache/ddpm-engine/evaluation."""


@dataclass(frozen=True)
class Options:
    """Compute metrics of a model or a folder of samples. Run the same command again to resume."""

    checkpoint: Path | None = None
    """A run directory, one checkpoints/step-… in it, or the folder of a diffusers pipeline."""
    samples: Path | None = None
    """Existing samples to evaluate instead: a folder of launch/sample.py, or of any images."""
    data: str | None = None
    """Real images: a folder of indexed shards or its URL; default: the run's training data."""
    metrics: Annotated[str, tyro.conf.arg(metavar="M,M,...")] = "fid,kid,is,precision-recall"
    """Metrics to compute: fid, kid, is, precision-recall, accuracy (of the classes of generated
    digits), nll."""
    count: int | None = None
    """Number of samples, and for nll of real images; default: 50000, or all of --samples, and for
    nll all."""
    out: Path | None = None
    """Folder of samples, features and reports; default: named by settings, in RUN/evaluation."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    features: FeatureOptions = field(default_factory=FeatureOptions)
    piece: int = CHUNK_SIZE
    """Samples that a process reserves and finishes at a time."""


def parse_metrics(options: Options) -> list[str]:
    """Parse the list of metrics.

    Raises:
        UserError: an unknown one, or one that the features do not allow.
    """
    metrics = [metric.strip() for metric in options.metrics.split(",")]
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise UserError(
            f"`metrics` has {unknown[0]!r}; there are {', '.join(METRICS)}", field="metrics"
        )
    if "accuracy" in metrics and options.features.features != "digits":
        raise UserError(
            f"accuracy needs `features` digits, not {options.features.features}, whose classes "
            "are not those of the samples",
            field="features",
        )
    return metrics


def check(options: Options) -> None:
    """Refuse options that contradict each other, and numbers out of range.

    Raises:
        UserError: the first of them.
    """
    if (options.checkpoint is None) == (options.samples is None):
        raise UserError(
            "give either `checkpoint`, to generate samples, or `samples`, which exist already"
        )
    if options.samples is not None and "nll" in parse_metrics(options):
        raise UserError(
            "nll is a metric of a network: give `checkpoint`, or leave it out of `metrics`",
            field="metrics",
        )
    if options.samples is not None and options.sampling != SamplingOptions():
        raise UserError(
            "`samples` exist already; leave out the options of how to generate some",
            field="samples",
        )
    for name, value in [
        ("count", options.count),
        ("reference_count", options.features.reference_count),
        ("piece", options.piece),
        ("batch_size", options.sampling.batch_size),
    ]:
        if value is not None and value < 1:
            raise UserError(f"`{name}` is {value}; it must be at least 1", field=name)


def evaluations_folder(options: Options, loaded: LoadedModel | None) -> Path:
    """Return --out, or a folder beside what is evaluated, never within a checkpoint."""
    if options.out is not None:
        return options.out
    if options.samples is not None:
        return options.samples.with_name(f"{options.samples.name}-evaluation")
    assert options.checkpoint is not None, "checked"
    checkpoint = None if loaded is None else loaded.checkpoint
    if checkpoint is not None and options.checkpoint == checkpoint.path:
        return options.checkpoint.parent.parent / "evaluation"
    return options.checkpoint / "evaluation"


def real_location(options: Options, loaded: LoadedModel | None) -> str:
    """Return where the real images are.

    Raises:
        UserError: neither the options nor the run say, or they cannot be indexed.
    """
    if options.data is not None:
        where = options.data
    elif loaded is None or loaded.checkpoint is None:
        raise UserError(
            "there are no real images to compare with; give them as `data`", field="data"
        )
    elif loaded.config.data.mix_with:
        raise UserError(
            "the run mixes several sets; give the one to compare with as `data`", field="data"
        )
    else:
        where = str(loaded.config.data.path)
    if is_stream(where):
        raise UserError(
            f"`data` {where} is a stream, which has no end; give a set with an index", field="data"
        )
    return where


def compare(
    options: Options, loaded: LoadedModel | None, device: torch.device, share: WorkShare
) -> Path | None:
    """Compute every metric but nll."""
    out, show = evaluations_folder(options, loaded), share.rank == 0
    if loaded is None:
        assert options.samples is not None, "checked"
        source = folder_source(options.samples, options.count)
    else:
        asked = {
            name: value
            for name, value in vars(options.sampling).items()
            if name not in ("weights", "batch_size")
        }
        source, out = generated_source(
            loaded,
            request_of(loaded, asked),
            options.count or 50_000,
            out=options.out,
            parent=out,
            batch_size=options.sampling.batch_size,
            chunk_size=options.piece,
        )
    chosen = options.features
    real = open_real_images(real_location(options, loaded), source.shape, chosen.reference_count)
    cache = chosen.cache or default_cache()
    network = feature_network(
        chosen.features, source.shape[0], device, weights=chosen.inception_weights, cache=cache
    )
    return evaluate(
        source, real, network, parse_metrics(options), out, cache, chunk_size=options.piece,
        share=share, device=device, show_progress=show,
    )  # fmt: skip


def bound(options: Options, loaded: LoadedModel, share: WorkShare) -> Path | None:
    """Compute nll, and plot its terms."""
    channels, height, width = loaded.shape
    shape = (height, width, channels)
    found = bound_of_real_images(
        loaded,
        open_real_images(real_location(options, loaded), shape, options.count),
        evaluations_folder(options, loaded),
        variance=options.sampling.variance,
        seed=vars(options.sampling)["seed"],
        batch_size=options.sampling.batch_size,
        share=share,
        show_progress=share.rank == 0,
    )
    if found is None:
        return None
    bound_figure(found.terms, found.report.with_name("terms.png"))
    return found.report


def main() -> None:
    """Parse, load, evaluate, print."""
    use_local_compile_cache()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_on_user_error(Options, omit_prefixes=True, renamed=RENAMED):
        options = parse_options(Options, omit_prefixes=True)
        check(options)
        generates = options.checkpoint is not None
        check_launched_precision(
            vars(options.sampling)["precision"], "precision" if generates else None
        )
        metrics = parse_metrics(options)
        share, device = WorkShare.from_environment(), local_device()
        loaded = None
        if options.checkpoint is not None:
            loaded = load_model(options.checkpoint, device, options.sampling.weights)
            if loaded.spec.low_resolution is not None:
                raise UserError(
                    f"`checkpoint` {options.checkpoint} is a super-resolution model: generate "
                    "samples from low-resolution images first, and give them as `samples`",
                    field="checkpoint",
                )
        reports = []
        if any(metric in comparing.METRICS for metric in metrics):
            reports.append(compare(options, loaded, device, share))
        if "nll" in metrics:
            assert loaded is not None, "checked"
            reports.append(bound(options, loaded, share))
        for report in reports:
            if report is not None:
                print(report.with_suffix(".md").read_text(encoding="utf-8"))
                print(report)
            elif share.world_size == 1:
                print("another process is still working and will report; or run this again")


if __name__ == "__main__":
    main()
