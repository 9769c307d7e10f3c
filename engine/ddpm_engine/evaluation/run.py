"""An evaluation from beginning to end, by any number of processes that divide it among them.

Features of the real images are computed once and kept; pictures are drawn, and their features
computed, piece by piece; whoever finds that everything is there measures and reports. A process
that is killed loses the piece it was at. Everything is a function of what was asked, so that the
report's bytes do not depend on how many processes there were, or how often they were killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.feature_networks import FeatureNetwork
from ddpm_engine.evaluation.features_store import FeatureSet
from ddpm_engine.evaluation.metrics import Division, fill_features, measure, reference_features
from ddpm_engine.evaluation.report import write_report
from ddpm_engine.evaluation.sources import (
    RULE,
    DrawnPictures,
    PictureFolder,
    RealImages,
    is_shard_set,
)
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.recipe import Drawing
from ddpm_engine.generation.sample_dir import SampleDir

logger = logging.getLogger(__name__)

QUANTISATION = "to uint8 by round((x + 1) · 127.5), clipped to 0 … 255, before any feature"
_PAUSE_SECONDS = 0.5
_REPORT = 1 << 48  # an id beyond all pictures: claimed by whoever measures


class Steps:
    """Passes steps on to whatever shows progress at the moment."""

    shown: Progress | None = None

    def __call__(self, pictures: int) -> None:
        """So many pictures are one step further in this process."""
        if self.shown is not None:
            self.shown.step(pictures)


@dataclass(frozen=True)
class Subject:
    """The pictures that are evaluated."""

    images: DrawnPictures | PictureFolder | RealImages
    ids: Sequence[int]
    about: Mapping[str, Any]
    """JSON values: everything that determines them, besides the ids."""
    steps: Steps
    """Hears of each step of drawing and of features."""
    evaluations: int = 0
    """Steps of drawing a picture."""
    location: str | None = None
    """Where they were found, if they were."""

    @property
    def hash(self) -> str:
        """Of what determines them."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()


def drawn_subject(
    drawing: Drawing,
    weights: str | None,
    count: int,
    out: Path,
    batch_size: int = 64,
    steps: Steps | None = None,
) -> Subject:
    """Pictures 0 … count − 1 of a recipe, to be drawn into `out / "pictures"`.

    They are what `launch/sample.py --format tar` would put there, WebDataset shards of PNGs, and
    a set that it began there is gone on with.

    Args:
        drawing: the recipe and its network.
        weights: which of a run's, `ema` or `model`; None for another library's model.
        count: how many.
        out: folder of the evaluation, made if missing.
        batch_size: pictures at a time.
        steps: what the drawing calls at each step.

    Raises:
        UserError: the folder holds pictures drawn otherwise.
    """
    settings = {**drawing.settings(), "weights": weights}
    pictures = SampleDir(out / "pictures", settings, "tar")
    training = drawing.pretrained.config.training
    about = {**settings, "ema_decay": training.ema_decay if weights == "ema" else None}
    steps = steps or Steps()

    def found(number: int) -> None:
        steps(number * drawing.evaluations)

    images = DrawnPictures(drawing, pictures, batch_size, found)
    return Subject(images, range(count), about, steps, drawing.evaluations)


def folder_subject(folder: Path, count: int | None = None) -> Subject:
    """Pictures that are there: of a folder, or a finished set of shards, or the first so many.

    Args:
        folder: as `PictureFolder` takes it, or of shards whose images have one size.
        count: how many; None: all.

    Raises:
        UserError: no pictures there, fewer, or of different sizes.
    """
    if is_shard_set(folder):
        return _shards_subject(folder, count)
    images = PictureFolder(folder)
    if count is not None and len(images.ids) < count:
        raise UserError(f"--count is {count}, but --samples {folder} holds {len(images.ids)}")
    about = {"sha256": images.fingerprint, **(images.about or {})}
    return Subject(images, images.ids[:count], about, Steps(), location=str(folder))


def _shards_subject(folder: Path, count: int | None) -> Subject:
    shards = open_shards(folder)
    stored = shards.manifest
    if stored.height is None or stored.width is None or stored.channels is None:
        raise UserError(
            f"images in --samples {folder} differ in size or channels; make shards of one size"
        )
    images = RealImages(shards, (stored.height, stored.width, stored.channels))
    if count is not None and len(images) < count:
        raise UserError(f"--count is {count}, but --samples {folder} holds {len(images)}")
    about = {"fingerprint": stored.fingerprint}
    return Subject(images, range(len(images))[:count], about, Steps(), location=str(folder))


def compare_with_real(
    subject: Subject,
    real: RealImages,
    network: FeatureNetwork,
    metrics: Collection[str],
    out: Path,
    cache: Path,
    *,
    division: Division = Division(),  # noqa: B008
    device: torch.device | str = "cpu",
    show: bool = False,
) -> Path | None:
    """Everything but the likelihood.

    Args:
        subject: the pictures.
        real: what they are compared with, of their shape.
        network: whose features are compared.
        metrics: as `measure` takes them.
        out: folder of the evaluation.
        cache: folder of features of real images.
        division: of the work among processes.
        device: where distances between features are computed.
        show: whether to show progress.

    Returns:
        The report's path; None: other processes are still at it, and the last of them reports.

    Raises:
        UserError: too few pictures or real images, no room, or images that cannot be had.
    """
    real_ids = range(len(real))
    width = network.features
    of_real = reference_features(cache, real, network)
    of_drawn = FeatureSet(
        out / "features" / f"{network.name}-{network.hash[:12]}",
        {
            "pictures": subject.hash,
            "features": network.name,
            "hash": network.hash,
            "resize": network.resize,
        },
    )

    def fill_real() -> bool:
        return _fill(of_real, real, real_ids, network, width, division, Steps(), 1, show)

    fill_real()
    if not _fill(
        of_drawn, subject.images, subject.ids, network, width + network.outputs, division,
        subject.steps, subject.evaluations + 1, show,
    ):  # fmt: skip
        return None
    # Whoever is still at the real images, perhaps for another evaluation, does nothing else that is
    # needed here; what a process has claimed that dies is claimed anew.
    waiting = False
    while not fill_real():
        if not waiting and show:
            logger.warning("waiting for a process that is at real images in %s", of_real.directory)
        waiting = True
        time.sleep(_PAUSE_SECONDS)
    with of_drawn.claim([_REPORT]) as granted:
        if not granted:
            return None
        if len(subject.ids) <= width or len(real_ids) <= width:
            logger.warning(
                "%d pictures and %d real images, for features of %d numbers: the covariances are "
                "singular, and a Fréchet distance is mostly their bias (docs/evaluation.md)",
                len(subject.ids), len(real_ids), width,
            )  # fmt: skip
        measured = measure(
            metrics, of_drawn, subject.ids, of_real, real_ids, network, subject.images.label_of,
            device,
        )  # fmt: skip
        if isinstance(subject.images, DrawnPictures):
            subject.images.pictures.finish(subject.ids)
        locations = {"samples": subject.location, "data": str(real.shards.storage)}
        return write_report(out, _asked(subject, real, network), measured, locations)


def _fill(
    features: FeatureSet,
    images: DrawnPictures | PictureFolder | RealImages,
    ids: Sequence[int],
    network: FeatureNetwork,
    columns: int,
    division: Division,
    steps: Steps,
    evaluations: int,
    show: bool,
) -> bool:
    """`fill_features`, with progress."""
    wanted = set(ids)
    if features.ids().issuperset(wanted):
        return True
    steps.shown = Progress(
        len(wanted), lambda: len(wanted & features.ids()), evaluations, active=show
    )
    complete = fill_features(
        features, images, ids, network, columns, division, steps, steps.shown.written
    )
    steps.shown.close()
    return complete


def _asked(subject: Subject, real: RealImages, network: FeatureNetwork) -> dict[str, Any]:
    return {
        "pictures": {
            "count": len(subject.ids),
            "shape": subject.images.shape,
            "quantisation": QUANTISATION,
            **subject.about,
        },
        "reference": {
            "fingerprint": real.shards.manifest.fingerprint,
            "count": len(real),
            "of": real.total,
            "rule": RULE,
        },
        "features": {"name": network.name, "hash": network.hash, "resize": network.resize},
    }
