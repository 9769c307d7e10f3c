"""The training objective: which timestep and noise a sample meets, and the loss it then gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.data import Batch
from ddpm_engine.prediction import Prediction
from ddpm_engine.schedule import NoiseSchedule
from ddpm_kernels import Stream, bernoulli, denoising_loss, q_sample, random_integers


@dataclass(frozen=True)
class Draws:
    """What chance decides for each sample, besides its noise."""

    timesteps: Tensor
    """int64 `[B]` in [0, T)."""
    flip: Tensor | None
    """bool `[B]`: mirrored left to right; None: none is."""
    labels: Tensor | None
    """int64 `[B]`, some replaced by the null class; None: unconditional."""


class SimpleObjective:
    """L_simple of Ho et al. 2020, equation 14, for whatever the network predicts.

    Everything random about a sample is a pure function of the seed and the sample's position, so a
    step's loss does not depend on which rank or micro-batch computes it.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts.
        seed: of timesteps, noise, flips and label dropout.
        device: where the network runs.
        horizontal_flip: mirror each image with probability one half.
        null_class: None for an unconditional network; else the class that dropped labels become.
        label_dropout: probability of dropping a label.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        seed: int,
        device: torch.device | str = "cpu",
        horizontal_flip: bool = False,
        null_class: int | None = None,
        label_dropout: float = 0.0,
    ) -> None:
        self.timesteps = schedule.timesteps
        self.prediction = prediction
        self.seed = seed
        self.device = torch.device(device)
        self.horizontal_flip = horizontal_flip
        self.null_class = null_class
        self.label_dropout = label_dropout
        self._seed = torch.tensor(seed, device=self.device)
        self._signal = schedule.sqrt_alpha_bar.to(self.device, torch.float32)
        self._sigma = schedule.sqrt_one_minus_alpha_bar.to(self.device, torch.float32)

    def draw(self, positions: Tensor, labels: Tensor | None) -> Draws:
        """Decide by position; positions and labels int64 `[B]`, best left on the CPU."""
        timesteps = random_integers(
            self.seed, positions, self.timesteps, 0, Stream.TRAINING_TIMESTEP
        )
        flip = None
        if self.horizontal_flip:
            flip = bernoulli(self.seed, positions, 0.5, 0, Stream.HORIZONTAL_FLIP)
        if self.null_class is None:
            return Draws(timesteps, flip, None)
        if labels is None:
            raise ValueError("a class-conditional network needs labels, and this batch has none")
        dropped = bernoulli(self.seed, positions, self.label_dropout, 0, Stream.LABEL_DROPOUT)
        return Draws(timesteps, flip, labels.masked_fill(dropped, self.null_class))

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Per-sample loss of one batch: float32 `[B]`, differentiable in the weights.

        Args:
            model: called with x_t float32 `[B, C, H, W]`, timesteps int64 `[B]`, and labels if the
                network is conditional.
            batch: on any device.
        """
        draws = self.draw(batch.positions, batch.labels)
        images, positions = self._here(batch.images), self._here(batch.positions)
        timesteps = self._here(draws.timesteps)
        flip = None if draws.flip is None else self._here(draws.flip)
        conditioning = () if draws.labels is None else (self._here(draws.labels),)
        x_t = q_sample(images, timesteps, self._signal, self._sigma, self._seed, positions, flip)
        prediction = model(x_t, timesteps, *conditioning)
        return denoising_loss(
            prediction, images, timesteps, self._signal, self._sigma, self._seed, positions,
            flip=flip, target=self.prediction,
        )  # fmt: skip

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
