"""What every objective does alike: mirrored images, and what the network is told of a sample."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ddpm_engine.diffusion.super_resolution import NoiseConditioningAugmentation, shrink
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_kernels import Stream, bernoulli, random_integers


@dataclass(frozen=True)
class Conditions:
    """Which images are mirrored and what the network is told of them, by position."""

    seed: int
    horizontal_flip: bool = False
    """Mirror each image with probability one half."""
    null_class: int | None = None
    """None for an unconditional network; else the class that dropped labels become."""
    label_dropout: float = 0.0
    """Probability of dropping a label."""
    low_resolution: int | None = None
    """Side of the small image that the network enlarges; None: it is shown none."""
    augmentation: NoiseConditioningAugmentation | None = None
    """What makes the small image what the network is shown; on its device."""
    augmentation_levels: int = 1
    """Its noise is drawn from this many levels, from 0 on."""

    def flip(self, positions: Tensor) -> Tensor | None:
        """Bool `[B]`: mirrored left to right; None: none is.

        Positions are int64 `[B]`, best on the CPU, where the result then is.
        """
        if not self.horizontal_flip:
            return None
        return bernoulli(self.seed, positions, 0.5, 0, Stream.HORIZONTAL_FLIP)

    def labels(self, positions: Tensor, labels: Tensor | None) -> Tensor | None:
        """Int64 `[B]`, some replaced by the null class; None: the network is unconditional.

        Raises:
            ValueError: the network is conditional and there are no labels.
        """
        if self.null_class is None:
            return None
        if labels is None:
            raise ValueError("a class-conditional network needs labels, and this batch has none")
        dropped = bernoulli(self.seed, positions, self.label_dropout, 0, Stream.LABEL_DROPOUT)
        return labels.masked_fill(dropped, self.null_class)

    def levels(self, positions: Tensor) -> Tensor:
        """NoiseConditioningAugmentation levels, int64 `[B]`, where the positions are."""
        return random_integers(
            self.seed, positions, self.augmentation_levels, 0, Stream.AUGMENTATION_LEVEL
        )

    def told(
        self, images: Tensor, positions: Tensor, labels: Tensor | None, flip: Tensor | None
    ) -> Conditioning:
        """The conditions of a batch, on the network's device.

        Args:
            images: `[B, C, H, W]` as stored, on the network's device, where the result is.
            positions: int64 `[B]`, best on the CPU.
            labels: `[B]`, as `labels` gave them.
            flip: `[B]`, as `flip` gave it.

        Returns:
            Labels if the network is class-conditional; for super-resolution, low-resolution images
            upsampled and noised to float32 `[B, C, H, W]`, and the levels of that noise.
        """
        device = images.device
        here = [
            None if tensor is None else tensor.to(device, non_blocking=True)
            for tensor in (labels, flip)
        ]
        if self.low_resolution is None or self.augmentation is None:
            return Conditioning(here[0])
        levels = self.levels(positions).to(device, non_blocking=True)
        enlarged = self.augmentation(
            shrink(images, self.low_resolution), images.shape[-1], levels, self.seed,
            positions.to(device, non_blocking=True), here[1],
        )  # fmt: skip
        return Conditioning(here[0], enlarged, levels)
