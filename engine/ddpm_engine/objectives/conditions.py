"""What chance decides for every objective alike: mirrored images and dropped labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ddpm_kernels import Stream, bernoulli


@dataclass(frozen=True)
class Conditions:
    """Which images are mirrored and which labels the network is given, by position.

    All tensors stay on the device of the positions, best the CPU.
    """

    seed: int
    horizontal_flip: bool = False
    """Mirror each image with probability one half."""
    null_class: int | None = None
    """None for an unconditional network; else the class that dropped labels become."""
    label_dropout: float = 0.0
    """Probability of dropping a label."""

    def flip(self, positions: Tensor) -> Tensor | None:
        """Bool `[B]`: mirrored left to right; None: none is. Positions are int64 `[B]`."""
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
