"""The objectives of DDPM and what followed: the error of a prediction at a random timestep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.data import Batch
from ddpm_engine.objectives.conditions import Conditions
from ddpm_engine.objectives.objective import Network, Objective
from ddpm_engine.prediction import Prediction
from ddpm_engine.schedule import NoiseSchedule
from ddpm_kernels import Stream, denoising_loss, q_sample, random_integers


@dataclass(frozen=True)
class Draws:
    """What chance decides for each sample, besides its noise."""

    timesteps: Tensor
    """int64 `[B]` in [0, T)."""
    flip: Tensor | None
    """bool `[B]`: mirrored left to right; None: none is."""
    labels: Tensor | None
    """int64 `[B]`, some replaced by the null class; None: unconditional."""


class DenoisingObjective(Objective):
    """L_simple of Ho et al. 2020, equation 14, for whatever the network predicts.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts.
        conditions: mirrored images and dropped labels; with the seed of timesteps and noise.
        device: where the network runs.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        conditions: Conditions,
        device: torch.device | str = "cpu",
    ) -> None:
        self.timesteps = schedule.timesteps
        self.prediction = prediction
        self.conditions = conditions
        self.device = torch.device(device)
        self._seed = torch.tensor(conditions.seed, device=self.device)
        self._signal = schedule.sqrt_alpha_bar.to(self.device, torch.float32)
        self._sigma = schedule.sqrt_one_minus_alpha_bar.to(self.device, torch.float32)

    def draw(self, positions: Tensor, labels: Tensor | None) -> Draws:
        """Decide by position; positions and labels int64 `[B]`, best left on the CPU."""
        timesteps = random_integers(
            self.conditions.seed, positions, self.timesteps, 0, Stream.TRAINING_TIMESTEP
        )
        return Draws(
            timesteps,
            self.conditions.flip(positions),
            self.conditions.labels(positions, labels),
        )

    def __call__(self, model: Network, batch: Batch) -> Tensor:
        """See `Objective`; the network is given timesteps int64 `[B]`."""
        draws = self.draw(batch.positions, batch.labels)
        images, positions = self._here(batch.images), self._here(batch.positions)
        timesteps = self._here(draws.timesteps)
        flip = None if draws.flip is None else self._here(draws.flip)
        told = self.conditions.told(images, batch.positions, draws.labels, draws.flip)
        x_t = q_sample(images, timesteps, self._signal, self._sigma, self._seed, positions, flip)
        prediction = model(x_t, timesteps, *told)
        return denoising_loss(
            prediction, images, timesteps, self._signal, self._sigma, self._seed, positions,
            flip=flip, target=self.prediction,
        )  # fmt: skip

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
