"""What every objective does alike: mirror images, drop labels, and build the conditioning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.super_resolution import NoiseConditioningAugmentation, downsample
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_kernels import Stream, bernoulli, random_integers


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """A batch on the network's device, with all but noise and noise levels decided."""

    images: Tensor
    """`[B, C, H, W]` as stored: uint8, or float in [-1, 1]."""
    positions: Tensor
    """int64 `[B]`, which everything random about the samples follows from."""
    flip: Tensor | None
    """bool `[B]`: whether a sample is mirrored left to right; None: none is."""
    conditioning: Conditioning
    """What the network is given besides the noisy images."""


@dataclass(frozen=True)
class TrainingInputs:
    """Prepares batches; every random choice is a function of the seed and a sample's position."""

    seed: int
    """Seed of training."""
    spec: ConditioningSpec = ConditioningSpec()  # noqa: RUF009
    """The conditions that the network was built for."""
    device: torch.device | str = "cpu"
    """Device of the network."""
    horizontal_flip: bool = False
    """Whether each image is mirrored with probability one half."""
    label_dropout: float = 0.0
    """Probability, 0 to 1, of replacing a label by the null class."""
    augmentation_levels: int = 1
    """Number of noise-conditioning augmentation levels; each low-resolution image gets one, drawn
    uniformly from 0 (no noise) on."""

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Move a batch to the device and decide what is random about its samples.

        The choices are made where the batch's positions are, best on the CPU.

        Raises:
            ValueError: the network is class-conditional and there are no labels.
        """
        images, positions = self.move(batch.images), self.move(batch.positions)
        flip = None
        if self.horizontal_flip:
            flip = self.move(bernoulli(self.seed, batch.positions, 0.5, 0, Stream.HORIZONTAL_FLIP))
        labels = self._labels(batch)
        low_resolution = level = None
        if self.spec.low_resolution is not None:
            level = self.move(
                random_integers(
                    self.seed, batch.positions, self.augmentation_levels, 0,
                    Stream.AUGMENTATION_LEVEL,
                )
            )  # fmt: skip
            low_resolution = self._augmentation(
                downsample(images, self.spec.low_resolution), images.shape[-1], level, self.seed,
                positions, flip,
            )  # fmt: skip
        return PreparedBatch(images, positions, flip, Conditioning(labels, low_resolution, level))

    def move(self, tensor: Tensor) -> Tensor:
        """Move a `tensor` of any shape to the device; from pinned memory without waiting."""
        return tensor.to(self.device, non_blocking=True)

    def _labels(self, batch: Batch) -> Tensor | None:
        """Return int64 `[B]`, some of them the null class; None: the network is unconditional."""
        if self.spec.null_class is None:
            return None
        if batch.labels is None:
            raise ValueError("a class-conditional network needs labels, and this batch has none")
        dropped = bernoulli(self.seed, batch.positions, self.label_dropout, 0, Stream.LABEL_DROPOUT)
        return self.move(batch.labels.masked_fill(dropped, self.spec.null_class))

    @cached_property
    def _augmentation(self) -> NoiseConditioningAugmentation:
        return NoiseConditioningAugmentation(self.device)
