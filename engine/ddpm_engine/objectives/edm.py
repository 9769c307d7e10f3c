"""The objective of EDM: noise levels of a continuum, and a preconditioned network F.

    L = λ(σ) ‖D(y; σ) − x_0‖²,     λ = 1 / c_out²,     y = x_0 + σ n
    D(y; σ) = c_skip y + c_out F(c_in y; c_noise)

With tan φ = σ / σ_data this is ‖F − target‖², where

    F's input = cos φ / σ_data · x_0 + sin φ · n
    target    = (x_0 − c_skip y) / c_out = sin φ / σ_data · x_0 − cos φ · n

so that `q_sample` and `denoising_loss` compute it, given tables of this batch's noise levels in
place of a schedule's timesteps.

Source: Karras et al. 2022, equations 7 and 8 and table 1. The mean over a sample's values is taken,
where their code takes the sum; Adam's steps are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.parameterization import Edm
from ddpm_engine.objectives.inputs import Conditions
from ddpm_engine.objectives.objective import Network, Objective
from ddpm_kernels import Stream, denoising_loss, gaussian_noise, q_sample


@dataclass(frozen=True)
class EdmDraws:
    """What chance decides for each sample, besides its noise."""

    sigma: Tensor
    """float64 `[B]`: σ, the noise level."""
    flip: Tensor | None
    """bool `[B]`: mirrored left to right; None: none is."""
    labels: Tensor | None
    """int64 `[B]`, some replaced by the null class; None: unconditional."""


class EdmObjective(Objective):
    """EDM's loss of F, at noise levels with ln σ ~ N(p_mean, p_std²).

    Args:
        sigma_data: σ_data.
        conditions: mirrored images and dropped labels; with the seed of noise levels and noise.
        device: where the network runs.
        p_mean: of ln σ.
        p_std: of ln σ.
        dtype: of the tables, and so of the arithmetic.
    """

    def __init__(
        self,
        sigma_data: float,
        conditions: Conditions,
        device: torch.device | str = "cpu",
        *,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sigma_data = sigma_data
        self.conditions = conditions
        self.device = torch.device(device)
        self.p_mean = p_mean
        self.p_std = p_std
        self.dtype = dtype
        self._seed = torch.tensor(conditions.seed, device=self.device)

    def draw(self, positions: Tensor, labels: Tensor | None) -> EdmDraws:
        """Decide by position; positions and labels int64 `[B]`, best left on the CPU."""
        normal = gaussian_noise(
            self.conditions.seed, positions, (1, 1, 1), 0, Stream.TRAINING_SIGMA
        )
        return EdmDraws(
            (self.p_mean + self.p_std * normal.flatten().double()).exp(),
            self.conditions.flip(positions),
            self.conditions.labels(positions, labels),
        )

    def __call__(self, model: Network, batch: Batch) -> Tensor:
        """See `Objective`; the network is given c_in (x_0 + σ n) and c_noise float32 `[B]`."""
        draws = self.draw(batch.positions, batch.labels)
        images, positions = self._here(batch.images), self._here(batch.positions)
        flip = None if draws.flip is None else self._here(draws.flip)
        told = self.conditions.told(images, batch.positions, draws.labels, draws.flip)
        row = Edm(self.sigma_data)
        levels = torch.ones_like(draws.sigma), draws.sigma
        c_in = row.state_scale(*levels)
        rows = torch.arange(len(positions), device=self.device)
        shown = q_sample(
            images, rows, self._table(c_in), self._table(c_in * draws.sigma), self._seed,
            positions, flip, self.dtype,
        )  # fmt: skip
        output = model(shown, self._table(row.noise_level(*levels, draws.sigma)), told)
        target_x0, target_noise = map(self._table, row.target(*levels))
        return denoising_loss(
            output, images, rows, target_x0, target_noise, self._seed, positions, flip=flip
        )

    def _table(self, values: Tensor) -> Tensor:
        return self._here(values.to(self.dtype))

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
