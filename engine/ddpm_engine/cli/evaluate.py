"""Compute metrics of a model, or of a folder of samples, against real images:

    python launch/evaluate.py --checkpoint RUN --data SHARDS --metrics fid,kid,is --count 50000
    python launch/evaluate.py --samples FOLDER --data SHARDS

Started by `accelerate launch` or torchrun, the processes share the work; an interrupted evaluation
is resumed by running the same command again. docs/evaluation.md explains the metrics.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_error, parse_options
from ddpm_engine.cli.request_options import (
    RENAMED,
    ClassLabels,
    options_of_request,
    request_of,
)
from ddpm_engine.cli.unused_options import refuse_unused
from ddpm_engine.data.stream import is_stream
from ddpm_engine.diffusion.config import Variance
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation import metrics as comparing
from ddpm_engine.evaluation.feature_networks import FeaturesName, default_cache, feature_network
from ddpm_engine.evaluation.likelihoods import check_likelihood
from ddpm_engine.evaluation.nll import bound_of_real_images, check_bound
from ddpm_engine.evaluation.ode_nll import ode_likelihood_of_real_images
from ddpm_engine.evaluation.run import CHUNK_SIZE, evaluate
from ddpm_engine.evaluation.sources import (
    RealImages,
    folder_source,
    generated_source,
    open_real_images,
)
from ddpm_engine.generation.batch_size import DEFAULT, BatchSize
from ddpm_engine.generation.work_sharing import WorkShare
from ddpm_engine.launched import check_launched_precision
from ddpm_engine.memory import check_fits
from ddpm_engine.plots.curves import bound_figure
from ddpm_engine.runtime import (
    Numerics,
    choose_precision,
    local_device,
    use_local_compile_cache,
)
from ddpm_engine.samplers.identity import Count

LIKELIHOODS = ("nll", "nll-ode")
METRICS = (*comparing.METRICS, *LIKELIHOODS)


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
    batch_size: BatchSize = "auto"
    """Number of samples generated at a time by each process, and for nll of images. auto: as many
    as a GPU's memory holds, found by trying; on a CPU, and for nll, 64."""


@dataclass(frozen=True)
class FeatureOptions:
    """What samples and real images are compared by."""

    features: FeaturesName = "inception"
    """Feature network. inception: that of the Fréchet Inception Distance; digits, numbers: a small
    classifier of one digit, or of two side by side."""
    inception_weights: Path | None = None
    """File of Inception's weights; default: downloaded once, into --cache."""
    reference_count: PositiveOrNone = None
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
    digits), nll (the variational bound), nll-ode (the likelihood by the probability-flow ODE)."""
    ode_steps: Positive = 100
    """Solver steps of nll-ode, two network evaluations each."""
    count: Count | None = None
    """Number of samples, and for nll of real images; default: 50000, or all of --samples, and for
    nll all."""
    out: Path | None = None
    """Folder of samples, features and reports; default: named by settings, in RUN/evaluation."""
    autoencoder: str | None = None
    """Place of the autoencoder whose latents the model samples, if it is elsewhere now: a folder of
    diffusers; default: where it was in training."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    features: FeatureOptions = field(default_factory=FeatureOptions)
    piece: Positive = CHUNK_SIZE
    """Samples that a process reserves and finishes at a time."""


_GENERATING = frozenset({"generating"})
_COMPARING = frozenset({"comparing"})
_USED_BY = {
    **dict.fromkeys(
        ("sampler", "steps", "spacing", "eta", "class_labels", "guidance_scale",
         "guidance_interval", "precision", "autoencoder"),
        _GENERATING,
    ),
    **dict.fromkeys(("seed", "weights", "batch_size"), _GENERATING | set(LIKELIHOODS)),
    "variance": _GENERATING | {"nll"},
    "ode_steps": frozenset({"nll-ode"}),
    **dict.fromkeys(("features", "reference_count", "piece"), _COMPARING),
    "inception_weights": frozenset({"inception"}),
}  # fmt: skip
"""Option to what uses it; see `purposes`. Folders (`out`, `cache`) are never refused."""


def purposes(options: Options, metrics: Collection[str]) -> set[str]:
    """Return what is done: generating, comparing (by inception or digits), nll, nll-ode."""
    found = set(LIKELIHOODS).intersection(metrics)
    if any(metric in comparing.METRICS for metric in metrics):
        found |= {"comparing", options.features.features}
        if options.samples is None:
            found.add("generating")
    return found


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
    """Refuse options that contradict each other or do nothing.

    Raises:
        UserError: the first of them.
    """
    if (options.checkpoint is None) == (options.samples is None):
        raise UserError(
            "give either `checkpoint`, to generate samples, or `samples`, which exist already"
        )
    metrics = parse_metrics(options)
    likelihoods = [metric for metric in metrics if metric in LIKELIHOODS]
    if options.samples is not None and likelihoods:
        raise UserError(
            f"{likelihoods[0]} is a metric of a network: give `checkpoint`, or leave it out of "
            "`metrics`",
            field="metrics",
        )
    done = purposes(options, metrics)
    described = f"`metrics` {options.metrics}"
    if "comparing" in done:
        described += f" of `features` {options.features.features}"
    if options.samples is not None:
        described = f"`samples`, which exist already, and {described}"
    refuse_unused(options, _USED_BY, done, described)


def evaluations_folder(options: Options, loaded: LoadedModel | None) -> Path:
    """Return --out, or a folder beside what is evaluated, never within a checkpoint.

    Raises:
        UserError: there is nothing beside it.
    """
    if options.out is not None:
        return options.out
    if options.samples is not None:
        samples = options.samples
        if samples.name in ("", ".."):  # written without a name of its own, as `.` is
            samples = samples.resolve()
        if not samples.name:
            raise UserError(f"there is no place beside `samples` {samples}; give `out`", "out")
        return samples.with_name(f"{samples.name}-evaluation")
    assert options.checkpoint is not None, "checked"
    checkpoint = None if loaded is None else loaded.checkpoint
    if checkpoint is not None and options.checkpoint.resolve() == checkpoint.path.resolve():
        return options.checkpoint.resolve().parent.parent / "evaluation"
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
    """Compute every metric but likelihoods."""
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
        if "nll" in parse_metrics(options):
            # The variance may be that of nll alone.
            sampler = asked["sampler"] or loaded.sampling.sampler
            asked["variance"] = asked["variance"] if sampler == "ddpm" else None
        source, out = generated_source(
            loaded,
            request_of(loaded, asked),
            50_000 if options.count is None else options.count,
            out=options.out,
            parent=out,
            batch_size=options.sampling.batch_size,
            chunk_size=options.piece,
        )
    chosen = options.features
    real = open_real_images(real_location(options, loaded), source.shape, chosen.reference_count)
    metrics = [metric for metric in parse_metrics(options) if metric not in LIKELIHOODS]
    comparing.check_counts(metrics, len(source.ids), len(real))
    if "accuracy" in metrics:
        comparing.check_labels([source.images.label_of(k) for k in source.ids])
    cache = chosen.cache or default_cache()
    network = feature_network(
        chosen.features, source.shape[0], device, weights=chosen.inception_weights, cache=cache
    )
    return evaluate(
        source, real, network, metrics, out, cache, chunk_size=options.piece,
        share=share, device=device, show_progress=show,
    )  # fmt: skip


def bound(options: Options, loaded: LoadedModel, share: WorkShare) -> Path | None:
    """Compute nll, and plot its terms."""
    real, size = real_images(options, loaded)
    found = bound_of_real_images(
        loaded,
        real,
        evaluations_folder(options, loaded),
        variance=options.sampling.variance,
        seed=vars(options.sampling)["seed"],
        batch_size=size,
        share=share,
        show_progress=share.rank == 0,
    )
    if found is None:
        return None
    bound_figure(found.terms, found.report.with_name("terms.png"))
    return found.report


def by_ode(options: Options, loaded: LoadedModel, share: WorkShare) -> Path | None:
    """Compute nll-ode."""
    real, size = real_images(options, loaded)
    return ode_likelihood_of_real_images(
        loaded,
        real,
        evaluations_folder(options, loaded),
        steps=options.ode_steps,
        seed=vars(options.sampling)["seed"],
        batch_size=size,
        share=share,
        show_progress=share.rank == 0,
    )


def real_images(options: Options, loaded: LoadedModel) -> tuple[RealImages, int]:
    """Return the images whose likelihood is computed, and how many at a time.

    Raises:
        UserError: they cannot be read, or are too many for the memory there is.
    """
    channels, height, width = loaded.image_shape
    shape = (height, width, channels)
    real = open_real_images(real_location(options, loaded), shape, options.count)
    asked = options.sampling.batch_size
    size = DEFAULT if asked == "auto" else asked
    batch = min(size, len(real))
    check_fits(8 * batch * math.prod(shape), "batch_size", "choose a smaller one")
    return real, size


def main() -> None:
    """Parse, load, evaluate, print."""
    use_local_compile_cache()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_on_error(Options, omit_prefixes=True, renamed=RENAMED):
        options = parse_options(Options, omit_prefixes=True)
        check(options)
        Numerics().apply()
        share, device = WorkShare.from_environment(), local_device()
        generates = options.checkpoint is not None
        check_launched_precision(
            choose_precision(vars(options.sampling)["precision"], device) if generates else "no",
            "precision" if generates else None,
        )
        metrics = parse_metrics(options)
        loaded = None
        if options.checkpoint is not None:
            loaded = load_model(
                options.checkpoint, device, options.sampling.weights,
                autoencoder=options.autoencoder,
            )  # fmt: skip
            if loaded.spec.low_resolution is not None:
                raise UserError(
                    f"`checkpoint` {options.checkpoint} is a super-resolution model: generate "
                    "samples from low-resolution images first, and give them as `samples`",
                    field="checkpoint",
                )
            if loaded.spec.text is not None or loaded.spec.vector is not None:
                raise UserError(
                    f"`checkpoint` {options.checkpoint} is conditioned on text or on embeddings of "
                    "images: generate samples from those first, and give them as `samples`",
                    field="checkpoint",
                )
            if "nll" in metrics:
                check_bound(loaded, options.sampling.variance)
            if "nll-ode" in metrics:
                check_likelihood(loaded, "nll-ode")
        parts: list[Callable[[], Path | None]] = []
        if any(metric in comparing.METRICS for metric in metrics):
            parts.append(lambda: compare(options, loaded, device, share))
        for metric, part in (("nll", bound), ("nll-ode", by_ode)):
            if metric in metrics:
                assert loaded is not None, "checked"
                parts.append(partial(part, options, loaded, share))
        failed = []
        for compute in parts:
            try:
                report = compute()
            except UserError as error:  # the other part may succeed
                failed.append(error)
                continue
            if report is not None:
                print(report.with_suffix(".md").read_text(encoding="utf-8"))
                print(report, flush=True)
            elif share.world_size == 1:
                print("another process is still working and will report; or run this again")
        if failed:
            raise UserError("; ".join(map(str, failed)), failed[0].field)


if __name__ == "__main__":
    main()
