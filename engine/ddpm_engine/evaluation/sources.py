"""The images that are compared: generated samples, a folder of them, or a set of shards.

All are uint8: what a model generates is rounded to the nearest of 256 levels before anything else,
as a file would hold it, and files are lossless (PNG). Real images of another size are cropped to
the central part of the samples' proportions and resized by `fit` to their size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.data.classes import ClassNames
from ddpm_engine.data.shards.reader import DamagedSample, ShardReader, StoredImage
from ddpm_engine.data.shards.records import records_of
from ddpm_engine.data.shards.shard_set import ShardSet, open_shards
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.subsets import evenly_spaced
from ddpm_engine.generation.batch_size import DEFAULT, BatchSize, batch_size_of
from ddpm_engine.generation.generate import check_amounts, settings_of
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.sample_reader import open_images, read_manifest
from ddpm_engine.generation.work_sharing import WorkShare, count_of, fill_missing
from ddpm_engine.images.codec import fit
from ddpm_engine.samplers.identity import distinct, whole
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler
from ddpm_engine.sizes import size_of
from ddpm_engine.threads import in_threads

T = TypeVar("T")

_RULE = (
    "uint8; cut to the central {cut}, halved by averaging while at least twice as large, then "
    "Pillow's bicubic, to the pictures' size"
)


class Images(Protocol):
    """Numbered images of one size."""

    def read(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """Read images, ids ascending: `[N, H, W, C]`.

        Raises:
            UserError: one cannot be read.
        """
        ...

    def label_of(self, sample_id: int) -> int | None:
        """Return the class of an image, or None."""
        ...


class RealImages:
    """The images of a set of shards in the order of its manifest, brought to one shape.

    Args:
        shards: an open set.
        shape: (H, W, C).
        count: use this many, evenly spaced, as ids 0 … count − 1; None: all of them.

    Raises:
        UserError: a count below 1, or shards of latents.
    """

    def __init__(
        self, shards: ShardSet, shape: tuple[int, int, int], count: int | None = None
    ) -> None:
        if count is not None and whole(count, "reference_count") < 1:
            raise UserError(
                f"`reference_count` is {count}; it must be at least 1", "reference_count"
            )
        if shards.manifest.latents is not None:
            raise UserError(
                f"{shards.storage} holds latents, which are no images to compare with: give shards "
                "of the images themselves"
            )
        self.shards, self.shape = shards, shape
        self.total = shards.manifest.samples
        """Images in the set."""
        self._picked = evenly_spaced(self.total, min(self.total, count or self.total))
        self._starts = np.cumsum([0] + [shard.samples for shard in shards.manifest.shards])
        self._reader = ShardReader(shards)

    @property
    def rule(self) -> str:
        """How images are brought to one size. Part of reports and of cache keys."""
        square = self.shape[0] == self.shape[1]
        return _RULE.format(cut="square" if square else "part of these proportions")

    def __len__(self) -> int:
        return len(self._picked)

    def index_in_set(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Return the indexes of these images in the whole set: int64 `[N]`."""
        return self._picked[np.asarray(ids, dtype=np.int64)]

    def read(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """See `Images`.

        Raises:
            UserError: a damaged sample; leaving it out would change the metrics.
        """
        # One reads; decoding and resizing take the time.
        stored = [self._refusing(k, self._reader.stored, *self._locate(k)) for k in ids]
        return np.stack(in_threads(self._decoded, list(zip(ids, stored, strict=True))))

    def label_of(self, sample_id: int) -> int | None:
        """See `Images`."""
        shard, row = self._locate(sample_id)
        label = int(self.shards.indexes[shard][row]["label"])
        return None if label < 0 else label

    def _locate(self, sample_id: int) -> tuple[int, int]:
        sample = int(self._picked[sample_id])
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def _decoded(self, sample: tuple[int, StoredImage]) -> NDArray[np.uint8]:
        sample_id, stored = sample
        height, width, channels = self.shape
        image = self._refusing(sample_id, stored.decoded, channels)
        return fit(image, size_of(height, width))

    def _refusing(self, sample_id: int, read: Callable[..., T], *arguments: Any) -> T:
        """Read, and name a sample that is damaged."""
        try:
            return read(*arguments)
        except DamagedSample as damage:
            shard, row = self._locate(sample_id)
            fault = self._reader.describe(shard, row, str(damage))
            raise UserError(
                f"{fault}; metrics without it would be other metrics: verify the set in "
                f"{self.shards.storage} and repair it"
            ) from None


@dataclass(frozen=True)
class SampleSource:
    """The samples that are evaluated."""

    images: Images
    shape: tuple[int, int, int]
    """(H, W, C)."""
    ids: Sequence[int]
    """Ascending."""
    provenance: Mapping[str, Any]
    """JSON values: everything that determines the samples, besides the ids."""
    present: Callable[[], set[int]]
    """Returns the ids of the samples that exist."""
    generate: Callable[[WorkShare, bool, bool], None] | None = None
    """Generates the missing samples; arguments: share of the work, whether to wait for those of
    other processes, whether to show progress. None: all exist."""
    location: str | None = None
    """Where they were found; None if they are generated."""
    classes: ClassNames | None = None
    """Names of the classes that their labels number, if they are known."""

    @property
    def hash(self) -> str:
        """SHA-256 of the provenance."""
        return hashlib.sha256(json.dumps(self.provenance, sort_keys=True).encode()).hexdigest()


class GeneratedSamples:
    """Samples 0 … count − 1 of a request, kept as WebDataset shards of PNGs, as in the format tar.

    The folder is claimed when it is first looked into; what is already there is kept.

    Args:
        sampler: generates them.
        settings: everything that determines a sample besides its id.
        folder: of the samples.
        count: number of samples.
        batch_size: samples at a time; see `BatchSize`.
        chunk_size: samples in a shard.

    Raises:
        UserError: numbers out of range, or beyond the memory there is.
    """

    def __init__(
        self,
        sampler: Sampler,
        settings: Mapping[str, Any],
        folder: Path,
        count: int,
        batch_size: BatchSize,
        chunk_size: int,
    ) -> None:
        self.ids = distinct(range(count), "count")
        check_amounts(sampler, self.ids, batch_size, ("piece", chunk_size))
        self._sampler, self._settings, self._folder = sampler, settings, folder
        self._batch_size, self._chunk_size = batch_size, chunk_size

    @cached_property
    def store(self) -> SampleDir:
        """The folder of the samples.

        Raises:
            UserError: it holds samples of other settings, or cannot be written.
        """
        return SampleDir(self._folder, self._settings, "tar", self.label_of)

    def read(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """See `Images`."""
        return self.store.read(ids)

    def label_of(self, sample_id: int) -> int | None:
        """See `Images`."""
        return self._sampler.label_of(sample_id)

    def present(self) -> set[int]:
        """Return the ids of the samples that exist."""
        return self.store.ids()

    def generate(self, share: WorkShare, wait: bool, show_progress: bool) -> None:
        """Generate the missing samples; see `SampleSource.generate`."""
        ids, store = self.ids, self.store
        lacks = count_of(ids, store.ids()) < len(ids)
        size = batch_size_of(self._sampler, self._batch_size, ids) if lacks else DEFAULT
        with Progress(
            len(ids), lambda: count_of(ids, store.ids()), self._sampler.evaluations,
            active=show_progress and lacks,
        ) as progress:  # fmt: skip
            fill_missing(
                store, ids, lambda batch: self._sampler.start_images(batch, on_step=progress.step),
                batch_size=size, chunk_size=self._chunk_size, share=share, progress=progress,
                wait=wait,
            )  # fmt: skip


def generated_source(
    model: LoadedModel,
    request: SampleRequest,
    count: int,
    out: Path | None = None,
    parent: Path = Path(),
    batch_size: BatchSize = "auto",
    chunk_size: int = 1024,
) -> tuple[SampleSource, Path]:
    """Evaluate samples 0 … count − 1 of a request, generated into `out / "pictures"`.

    Args:
        model: generates them.
        request: what to sample.
        count: number of samples.
        out: folder of the evaluation, created if missing; None: one named by the settings, in
            `parent`.
        parent: folder of evaluations.
        batch_size: samples at a time; see `BatchSize`.
        chunk_size: samples in a shard.

    Returns:
        The samples, and the folder of the evaluation, which nothing has been written to.

    Raises:
        UserError: a request that the model cannot serve, or as `GeneratedSamples`.
    """
    sampler = Sampler(model, request)
    settings = settings_of(model, sampler)
    if out is None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        sampling = sampler.sampling
        out = parent / f"{sampling.sampler}-{sampling.steps}-seed{request.seed}-{digest[:8]}"
    samples = GeneratedSamples(sampler, settings, out / "pictures", count, batch_size, chunk_size)
    channels, height, width = model.image_shape
    decay = model.config.training.ema_decay if model.weights == "ema" else None
    source = SampleSource(
        samples,
        (height, width, channels),
        samples.ids,
        {**settings, "ema_decay": decay},
        samples.present,
        samples.generate,
        classes=model.classes,
    )
    return source, out


def folder_source(folder: Path, count: int | None = None) -> SampleSource:
    """Evaluate existing samples: a folder of images, or a finished set of shards.

    Args:
        folder: as `open_images` takes it, or of shards whose images have one size.
        count: number of images, the first ones; None: all.

    Raises:
        UserError: no images there, fewer, or of different sizes.
    """
    if "shards" in (read_manifest(records_of(folder)) or {}):
        return _shards_source(folder, count)
    reader = open_images(folder)
    ids = sorted(reader.ids())
    _check_count(folder, len(ids), count)
    height, width, channels = reader.shape
    provenance = {"sha256": reader.fingerprint, **reader.settings}
    return SampleSource(
        reader,
        (height, width, channels),
        ids[:count],
        provenance,
        reader.ids,
        None,
        str(folder),
        reader.classes,
    )


def _shards_source(folder: Path, count: int | None) -> SampleSource:
    shards = open_shards(folder)
    stored = shards.manifest
    if stored.height is None or stored.width is None or stored.channels is None:
        raise UserError(
            f"images in `samples` {folder} differ in size or channels; make shards of one size",
            field="samples",
        )
    shape = (stored.height, stored.width, stored.channels)
    images = RealImages(shards, shape)
    _check_count(folder, len(images), count)
    provenance = {"fingerprint": stored.fingerprint}
    ids = range(len(images))
    return SampleSource(
        images, shape, ids[:count], provenance, lambda: set(ids), None, str(folder), stored.classes
    )


def _check_count(folder: Path, found: int, count: int | None) -> None:
    if count is not None and found < count:
        raise UserError(
            f"`count` is {count}, but `samples` {folder} holds {found}; ask for fewer",
            field="count",
        )


def open_real_images(
    location: str, shape: tuple[int, int, int], count: int | None = None
) -> RealImages:
    """Open the real images.

    Args:
        location: a folder of shards, or its URL.
        shape: (H, W, C) that they are brought to.
        count: as `RealImages` takes it.

    Raises:
        UserError: no finished set of shards there.
    """
    return RealImages(open_shards(location), shape, count)
