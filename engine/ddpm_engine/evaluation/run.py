"""Evaluate samples against real images: generate, featurise, measure, report.

Each pass computes what is missing, and several processes share it; the last one to leave measures
and reports. A process that is killed loses the chunk it was working on. Everything is a function of
the inputs, so the report's bytes depend neither on the number of processes nor on interruptions.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_engine.data.classes import match_classes
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.feature_networks import FeatureNetwork
from ddpm_engine.evaluation.features_store import (
    FeatureStore,
    open_real_features,
    open_sample_features,
)
from ddpm_engine.evaluation.metrics import (
    METRICS,
    Features,
    check_counts,
    check_labels,
    compute_one,
)
from ddpm_engine.evaluation.report import write_report
from ddpm_engine.evaluation.sources import Images, RealImages, SampleSource
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.work_sharing import WorkShare, chunks, fill_missing
from ddpm_engine.images.transfer import Pending
from ddpm_engine.memory import check_fits
from ddpm_engine.runtime import without_tf32
from ddpm_engine.samplers.identity import whole

logger = logging.getLogger(__name__)

QUANTISATION = "to uint8 by round((x + 1) · 127.5), clipped to 0 … 255, before any feature"
CHUNK_SIZE = 256
"""Images whose features are written at a time: what a process that is killed loses."""
_BATCH_SIZE = 64


def evaluate(
    source: SampleSource,
    real: RealImages,
    network: FeatureNetwork,
    metrics: Collection[str],
    out: Path,
    cache: Path,
    *,
    chunk_size: int = CHUNK_SIZE,
    share: WorkShare = WorkShare(),  # noqa: B008
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> Path | None:
    """Compute every metric but the likelihood.

    Args:
        source: the samples.
        real: what they are compared with, of the same shape.
        network: the feature network.
        metrics: as `compute` takes them.
        out: folder of the evaluation.
        cache: folder of the features of real images.
        chunk_size: images that a process reserves and featurises at a time.
        share: this process among those that share the work.
        device: where distances between features are computed.
        show_progress: whether to print progress.

    Returns:
        The report's path; None: other processes are still working, and the last of them reports.

    Raises:
        UserError: too few samples or real images, a full disk, or images that cannot be read.
    """
    check_counts(metrics, len(source.ids), len(real))
    if whole(chunk_size, "piece") < 1:
        raise UserError(f"`piece` is {chunk_size}; it must be at least 1", "piece")
    _check_memory(metrics, len(source.ids), network.features)
    real_ids, sample_ids = range(len(real)), sorted(source.ids)
    digits = _digits(source, network) if "accuracy" in metrics else None

    def labels() -> list[int | None]:
        return [_renumbered(source.images.label_of(k), digits) for k in sample_ids]

    if "accuracy" in metrics:
        check_labels(labels())
    source.present()  # claims the folder of the samples, or finds that it is another's
    real_features = open_real_features(cache, real, network)
    sample_features = open_sample_features(out, source, network)

    def featurise(
        store: FeatureStore, images: Images, ids: Sequence[int], columns: int, wait: bool
    ) -> bool:
        def rows(batch: Sequence[int]) -> NDArray[np.floating] | Pending:
            started = network.start(images.read(batch))
            if callable(started):
                return lambda: sound(batch, started())
            return sound(batch, started)

        def sound(batch: Sequence[int], found: NDArray[np.floating]) -> NDArray[np.floating]:
            found = found[:, :columns]
            if not np.isfinite(found).all():
                finite = np.isfinite(found).all(1)
                wrong = [k for k, is_finite in zip(batch, finite, strict=True) if not is_finite]
                raise UserError(
                    f"features of image {wrong[0]} in {store.directory} are not finite numbers; "
                    f"look at the weights of the feature network {network.name}"
                )
            progress.step(len(batch))
            return found

        wanted = set(ids)
        with without_tf32(), Progress(
            len(wanted), lambda: len(wanted & store.ids()), unit="features",
            active=show_progress and not store.ids().issuperset(wanted),
        ) as progress:  # fmt: skip
            return fill_missing(
                store, ids, rows, batch_size=_BATCH_SIZE, chunk_size=chunk_size, share=share,
                progress=progress, wait=wait,
            )  # fmt: skip

    # The first round waits for nobody. Chunks that are missing after it were reserved by processes
    # of another evaluation or by some that died; the last process of this one waits for them.
    for wait in (False, True):
        featurise(real_features, real, real_ids, network.features, wait)
        if source.generate is not None:
            source.generate(share, wait, show_progress)
        present = source.present()
        ready = [
            k
            for chunk in chunks(sample_ids, chunk_size, aligned=True)
            if present.issuperset(chunk)
            for k in chunk
        ]
        columns = network.features + network.outputs
        if not featurise(sample_features, source.images, ready, columns, wait):
            return None
        if real_features.ids().issuperset(real_ids) and len(ready) == len(sample_ids):
            break
    else:
        raise UserError(f"samples or features in {out} are missing; run the evaluation again")

    _warn_of_few(len(sample_ids), len(real_ids), network.features)
    moments = digest = None
    if "fid" in metrics:
        moments, digest = real_features.moments(real_ids, device)
    generated = Features(
        lambda: sample_features.blocks(sample_ids), network.features, labels=labels()
    )
    reference = Features(
        lambda: real_features.blocks(real_ids), network.features, known_moments=moments
    )
    measured, failed = {}, []
    for name in METRICS:
        try:
            if name in metrics:
                with without_tf32():
                    measured[name] = compute_one(name, generated, reference, device)
        except (UserError, MemoryError, torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:
            failed.append(f"{name}: {error}")
    if "fid" in measured:
        measured["fid"]["reference_sha256"] = digest
    locations = {"samples": source.location, "data": str(real.shards.storage)}
    report = None
    if measured:
        report = write_report(out, _inputs(source, real, network), measured, locations)
    if failed:
        others = "" if report is None else f"; the other metrics are in {report}"
        raise UserError(f"{'; '.join(failed)}{others}", "metrics")
    return report


def _check_memory(metrics: Collection[str], samples: int, features: int) -> None:
    """Refuse more samples than whose ids, or features where a metric needs all at once, fit."""
    each = 64 + (4 * features if {"kid", "precision-recall"} & set(metrics) else 0)
    check_fits(each * samples, "count", "evaluate fewer samples")


def _digits(source: SampleSource, network: FeatureNetwork) -> list[int] | None:
    """Return the feature network's class for each class of the samples; None: the same numbers.

    Raises:
        UserError: a class that the feature network does not have.
    """
    if source.classes is None:
        return None
    known = tuple(map(str, range(network.outputs)))
    place = source.location or "the samples"
    return match_classes(known, network.outputs, source.classes, place, "the feature network")


def _renumbered(label: int | None, numbers: list[int] | None) -> int | None:
    if label is None or numbers is None:
        return label
    return numbers[label] if label < len(numbers) else None  # beyond the names: of no class


def _warn_of_few(samples: int, real: int, features: int) -> None:
    if min(samples, real) <= features:
        logger.warning(
            "%d samples and %d real images, for features of %d numbers: the covariances are "
            "singular, and a Fréchet distance is mostly their bias (docs/evaluation.md)",
            samples, real, features,
        )  # fmt: skip


def _inputs(source: SampleSource, real: RealImages, network: FeatureNetwork) -> dict[str, Any]:
    """Everything that the metrics are a function of."""
    return {
        "pictures": {
            "count": len(source.ids),
            "shape": source.shape,
            "quantisation": QUANTISATION,
            **source.provenance,
        },
        "reference": {
            "fingerprint": real.shards.manifest.fingerprint,
            "count": len(real),
            "of": real.total,
            "rule": real.rule,
        },
        "features": {"name": network.name, "hash": network.hash, "resize": network.resize},
    }
