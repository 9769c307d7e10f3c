"""What every objective does alike: mirror images, drop labels, and build the conditioning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.super_resolution import NoiseConditioningAugmentation, downsample
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_kernels import training_draws
from ddpm_kernels.tiling import as_scalar


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """A batch on the network's device, with all but noise and noise levels decided."""

    images: Tensor
    """`[B, C, H, W]` as stored: uint8, or float in [-1, 1]."""
    positions: Tensor
    """int64 `[B]`, which everything random about the samples follows from."""
    integers: Tensor | None
    """int64 `[B]`, uniform: what noise levels are chosen by; None: none were asked for."""
    flip: Tensor | None
    """bool `[B]`: whether a sample is mirrored left to right; None: none is."""
    conditioning: Conditioning
    """What the network is given besides the noisy images."""


class TrainingInputs:
    """Prepares batches; every random choice is a function of the seed and a sample's position.

    Args:
        seed: of training.
        spec: the conditions that the network was built for.
        device: of the network.
        horizontal_flip: whether each image is mirrored with probability one half.
        label_dropout: probability, 0 to 1, of replacing a label by the null class.
        augmentation_levels: number of noise-conditioning augmentation levels; each low-resolution
            image gets one, drawn uniformly from 0 (no noise) on.
    """

    def __init__(
        self,
        seed: int,
        spec: ConditioningSpec | None = None,
        device: torch.device | str = "cpu",
        horizontal_flip: bool = False,
        label_dropout: float = 0.0,
        augmentation_levels: int = 1,
    ) -> None:
        self.spec = spec or ConditioningSpec()
        self.device = torch.device(device)
        self.seed = as_scalar(seed, self.device)
        self.horizontal_flip = horizontal_flip
        self.label_dropout = label_dropout
        self.augmentation_levels = augmentation_levels
        # All that is needed of the host is made here, not in a step.
        self._augmentation = None
        if self.spec.low_resolution is not None:
            self._augmentation = NoiseConditioningAugmentation(self.device)

    def prepare(self, batch: Batch, integers: int | None = None) -> PreparedBatch:
        """Move a batch to the device and decide, there, what is random about its samples.

        Args:
            batch: on the device, or to be copied there.
            integers: number of equally likely integers that noise levels are chosen by, up to 2³²;
                None: none are drawn.

        Raises:
            ValueError: the network is class-conditional and there are no labels.
        """
        batch = batch.to(self.device, non_blocking=True)
        draws = training_draws(
            self.seed,
            batch.positions,
            integers=integers,
            flip=self.horizontal_flip,
            labels=self._labels(batch),
            label_dropout=self.label_dropout,
            null_class=self.spec.null_class or 0,
            augmentation_levels=None if self._augmentation is None else self.augmentation_levels,
        )
        low_resolution, level = None, draws.augmentation_levels
        if self._augmentation is not None and level is not None:
            assert self.spec.low_resolution is not None
            low_resolution = self._augmentation(
                downsample(batch.images, self.spec.low_resolution), batch.images.shape[-1], level,
                self.seed, batch.positions, draws.flip,
            )  # fmt: skip
        return PreparedBatch(
            batch.images, batch.positions, draws.integers, draws.flip,
            Conditioning(draws.labels, low_resolution, level),
        )  # fmt: skip

    def _labels(self, batch: Batch) -> Tensor | None:
        """Return int64 `[B]`; None: the network is unconditional."""
        if self.spec.null_class is None:
            return None
        if batch.labels is None:
            raise ValueError("a class-conditional network needs labels, and this batch has none")
        return batch.labels
