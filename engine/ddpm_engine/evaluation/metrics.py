"""Pictures against real images: features of both by several processes, then each measure."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_engine.atomic_io import atomic_write, sha256_of
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.feature_networks import FeatureNetwork
from ddpm_engine.evaluation.features_store import FeatureSet
from ddpm_engine.evaluation.fid import Moments, frechet_distance, moments
from ddpm_engine.evaluation.inception_score import inception_score
from ddpm_engine.evaluation.kid import kernel_distance
from ddpm_engine.evaluation.precision_recall import blocks, precision_recall
from ddpm_engine.evaluation.sources import RULE, Images, RealImages
from ddpm_engine.evaluation.subsets import evenly_spaced
from ddpm_engine.generation.work_sharing import fill

PIECE = 256
"""Pictures whose features are written at a time: what a process that is killed loses."""
_BATCH = 64


@dataclass(frozen=True)
class Division:
    """This process among those that share the work."""

    rank: int = 0
    ranks: int = 1
    piece: int = PIECE
    """Ids that one of them does at a time."""


def fill_features(
    features: FeatureSet,
    images: Images,
    ids: Sequence[int],
    network: FeatureNetwork,
    columns: int,
    division: Division,
    on_step: Callable[[int], None] = lambda _: None,
    on_written: Callable[[int], None] = lambda _: None,
) -> bool:
    """Evaluate the network on images whose features are missing and nobody else is at.

    Args:
        features: where the rows go.
        images: of these ids.
        ids: all that is wanted.
        network: evaluated in batches of 64.
        columns: how many of the network's numbers to keep.
        division: of the work.
        on_step: called with the images of each batch.
        on_written: called with how many rows were just written.

    Returns:
        Whether all are there; False: other processes are still at the rest.

    Raises:
        UserError: images that cannot be had, or no room to write.
    """

    def rows(some: Sequence[int]) -> NDArray[np.floating]:
        pictures = images.read(some)
        parts = []
        for first in range(0, len(pictures), _BATCH):
            parts.append(network(pictures[first : first + _BATCH])[:, :columns])
            on_step(len(parts[-1]))
        return np.concatenate(parts)

    fill(
        features, ids, rows, on_written=on_written, batch_size=division.piece,
        per_shard=division.piece, rank=division.rank, ranks=division.ranks,
    )  # fmt: skip
    return features.ids().issuperset(ids)


def reference_features(cache: Path, images: RealImages, network: FeatureNetwork) -> FeatureSet:
    """Where the features of a data set are kept, by fingerprint, network and resize rule.

    Raises:
        UserError: the cache cannot be written.
    """
    fingerprint = images.shards.manifest.fingerprint
    shape = "x".join(map(str, images.shape))
    settings = {
        "data": fingerprint,
        "count": len(images),
        "of": images.total,
        "shape": images.shape,
        "rule": RULE,
        "features": network.name,
        "hash": network.hash,
        "resize": network.resize,
    }
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    name = f"{fingerprint[:12]}-{network.name}-{shape}-{key[:12]}"
    return FeatureSet(cache / name, settings, "--cache")


def reference_moments(features: FeatureSet, ids: Sequence[int]) -> tuple[Moments, str]:
    """Moments of all of a data set's features, kept beside them, and the SHA-256 of their file.

    Raises:
        UserError: the cache cannot be written.
    """
    path = features.directory / "moments.npz"
    if (kept := _read_moments(path)) is not None:
        return kept, sha256_of(path)
    found = moments(features.blocks(ids))
    content = io.BytesIO()
    np.savez(
        content, allow_pickle=False, count=np.int64(found.count), mean=found.mean,
        covariance=found.covariance,
    )  # fmt: skip
    with features.writing(), atomic_write(path) as file:
        file.write(content.getvalue())
    return found, sha256_of(path)


def _read_moments(path: Path) -> Moments | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = archive["mean"], archive["covariance"]
            if covariance.shape == (len(mean), len(mean)):
                return Moments(int(archive["count"]), mean, covariance)
    # A damaged archive fails in many ways; its content can be had again.
    except Exception:
        pass
    return None


def measure(
    metrics: Collection[str],
    drawn: FeatureSet,
    ids: Sequence[int],
    real: FeatureSet,
    real_ids: Sequence[int],
    network: FeatureNetwork,
    label_of: Callable[[int], int | None],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Whatever is asked for, once all features are there: JSON values by metric.

    Args:
        metrics: of `fid`, `kid`, `is`, `precision-recall` and `accuracy`.
        drawn: rows of features and logits.
        ids: of the pictures.
        real: rows of features.
        real_ids: of the real images.
        network: whose features they are.
        label_of: the class that a picture was drawn as, if any.
        device: where distances between features are computed.

    Raises:
        UserError: too few pictures for a measure, or no labels where it needs them.
    """
    found: dict[str, Any] = {}
    width = network.features

    def of_drawn() -> Iterator[NDArray[np.floating]]:
        return (rows[:, :width] for rows in drawn.blocks(ids))

    if "fid" in metrics:
        reference, digest = reference_moments(real, real_ids)
        distance = frechet_distance(moments(of_drawn()), reference)
        found["fid"] = {"distance": distance, "reference_sha256": digest}
    if "kid" in metrics:
        kid = kernel_distance(np.concatenate(list(of_drawn())), real.read(real_ids))
        found["kid"] = kid._asdict()
    if "is" in metrics:
        logits = np.concatenate([rows[:, width:] for rows in drawn.blocks(ids)])
        found["is"] = inception_score(logits)._asdict()
    if "precision-recall" in metrics:
        count = min(len(ids), len(real_ids))
        sides = [
            torch.from_numpy(rows[evenly_spaced(len(rows), count)]).to(device)
            for rows in (np.concatenate(list(of_drawn())), real.read(real_ids))
        ]
        with tqdm(
            total=blocks(count, count), desc="precision-recall", unit="block",
            disable=not sys.stderr.isatty(),
        ) as bar:  # fmt: skip
            shares = precision_recall(sides[0], sides[1], on_block=bar.update)
        found["precision-recall"] = {**shares._asdict(), "count": count}
    if "accuracy" in metrics:
        found["accuracy"] = _accuracy(drawn, ids, network, label_of)
    return found


def _accuracy(
    drawn: FeatureSet,
    ids: Sequence[int],
    network: FeatureNetwork,
    label_of: Callable[[int], int | None],
) -> Mapping[str, Any]:
    """Share of pictures that the network takes for what they were drawn as."""
    labels = [label_of(k) for k in sorted(ids)]
    if unlabelled := sum(label is None for label in labels):
        raise UserError(
            f"accuracy needs the class of each picture, and {unlabelled} have none; draw with "
            "--class-labels all, or leave accuracy out of --metrics"
        )
    logits = np.concatenate([rows[:, network.features :] for rows in drawn.blocks(ids)])
    right = logits.argmax(1) == np.asarray(labels)
    return {"share": float(right.mean())}
