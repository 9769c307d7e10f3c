"""A set of shards as a dataset indexed by position, and its batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddpm_engine.data.classes import ClassNames
from ddpm_engine.data.shards.reader import BadSample, DamagedSample, ShardReader
from ddpm_engine.data.shards.shard_set import ShardSet, open_shards
from ddpm_engine.data.shuffle import Order
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import Pixels, fit
from ddpm_kernels.philox import Stream, random_integers

MAX_SUBSTITUTES = 64
"""Damaged samples in a row at one position before reading gives up."""


@dataclass(frozen=True)
class Sample:
    """The sample at one position."""

    image: Pixels
    """uint8 `[H, W, C]`."""
    label: int
    """Class, or -1 in a set without labels."""
    position: int
    """Position in the order of training."""
    faults: tuple[BadSample, ...] = ()
    """Bad samples that this one replaces."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples."""

    images: Tensor
    """uint8 `[B, C, H, W]`, channels-last in memory, not normalised."""
    labels: Tensor | None
    """int64 `[B]`; None for a set without labels."""
    positions: Tensor
    """int64 `[B]`; everything random about a sample is keyed by its position."""
    faults: list[BadSample] = field(default_factory=list)
    """Bad samples that were replaced."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Copy the tensors to a device."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=non_blocking)
        return Batch(
            images=self.images.to(device, non_blocking=non_blocking),
            labels=labels,
            positions=self.positions.to(device, non_blocking=non_blocking),
            faults=self.faults,
        )

    def pin_memory(self) -> Batch:
        """Copy the tensors to page-locked memory; `DataLoader` calls it by this name."""
        return Batch(
            images=self.images.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
            positions=self.positions.pin_memory(),
            faults=self.faults,
        )


class ShardDataset(Dataset[Sample]):
    """Samples by position in the order of training (see `Order`), each read with one `pread`.

    A damaged sample is replaced by another that its position determines, so that no other position
    changes, and is named in the `faults` of its substitute.

    Args:
        shards: an open set, or the folder or URL of one.
        seed: of the order and of substitutes.
        size: cut and resize images to this side in pixels; None takes them as they are.
        channels: convert images to 1 (grey) or 3 (RGB); None takes them as they are.
        window_shards: number of shards whose samples are mixed.

    Raises:
        UserError: not a finished set, or its images differ in size or channels and the argument
            that would make them equal is None.
    """

    def __init__(
        self,
        shards: ShardSet | str | os.PathLike[str],
        seed: int,
        size: int | None = None,
        channels: int | None = None,
        window_shards: int = 16,
    ) -> None:
        self.shards = shards if isinstance(shards, ShardSet) else open_shards(shards)
        manifest, folder = self.shards.manifest, self.shards.storage
        if size is not None and size < 1:
            raise UserError(f"`size` is {size}; it must be at least 1", field="size")
        if channels not in (None, 1, 3):
            raise UserError(f"`channels` is {channels}; it must be 1 or 3", field="channels")
        height, width = (size or manifest.height), (size or manifest.width)
        channels = channels or manifest.channels
        if height is None or width is None:
            raise UserError(f"images in {folder} differ in size: choose one image size")
        if channels is None:
            raise UserError(
                f"images in {folder} are partly grey, partly RGB: choose channels 1 or 3"
            )
        self.shape = (channels, height, width)
        self.order = Order([shard.samples for shard in manifest.shards], seed, window_shards)
        self._size = size
        self._starts = np.cumsum([0] + [shard.samples for shard in manifest.shards])
        # One file more than a window has, for substitutes.
        self._reader = ShardReader(self.shards, window_shards + 1)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the manifest, which names the data."""
        return self.shards.manifest.fingerprint

    @property
    def classes(self) -> ClassNames | None:
        """Names of the labels 0, 1, ...; None for a set without labels."""
        return self.shards.manifest.classes

    def __len__(self) -> int:
        """Return the number of samples in one epoch; positions continue beyond it."""
        return len(self.order)

    def __getitem__(self, position: int) -> Sample:
        """Read the sample at one position ≥ 0.

        Raises:
            UserError: `MAX_SUBSTITUTES` samples in a row are damaged.
        """
        return self._read(position, self.order.sample_at(position))

    def __getitems__(self, positions: Sequence[int]) -> list[Sample]:
        """Read the samples at many positions."""
        samples = self.order.samples_at(positions).tolist()
        return [self._read(int(p), sample) for p, sample in zip(positions, samples, strict=True)]

    def _read(self, position: int, sample: int) -> Sample:
        channels, height, width = self.shape
        faults: list[BadSample] = []
        for attempt in range(1, MAX_SUBSTITUTES + 1):
            shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
            row = sample - int(self._starts[shard])
            try:
                image = self._reader.image(shard, row, channels)
                if self._size is not None:
                    image = fit(image, self._size)
                if image.shape != (height, width, channels):
                    raise DamagedSample(f"shape {list(image.shape)} is not the set's")
                label = int(self.shards.indexes[shard][row]["label"])
                return Sample(image, label, position, tuple(faults))
            except DamagedSample as damage:
                faults.append(self._reader.describe(shard, row, str(damage)))
            # Keyed by the position, like the order: a resumed run reads the same substitute.
            sample = int(
                random_integers(
                    self.order.seed,
                    torch.tensor([position]),
                    len(self.order),
                    attempt,
                    Stream.SUBSTITUTE,
                )
            )
        raise UserError(
            f"{MAX_SUBSTITUTES} samples in a row cannot be read for position {position}; the last: "
            f"{faults[-1]}. Verify {self.shards.storage} to list all damage"
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one shape into a `Batch`."""
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    labels = torch.tensor([sample.label for sample in samples])
    return Batch(
        # The stack is [B, H, W, C]: seen as [B, C, H, W] it is channels-last already.
        images=images.permute(0, 3, 1, 2),
        labels=None if bool((labels < 0).any()) else labels,
        positions=torch.tensor([sample.position for sample in samples]),
        faults=[fault for sample in samples for fault in sample.faults],
    )
