"""The schedule of flow matching: from image to noise in a straight line.

    z = (1 − τ) x_0 + τ ε,        τ = S(u),  u = (t + 1) / T,        S(u) = α u / (1 + (α − 1) u)

Like every schedule it has ᾱ, here that of the same ratio of image and noise, s / a = τ / (1 − τ),
so that z = x_t / (a + s). The shift α moves levels towards noise where it exceeds 1: images of more
pixels need more noise to lose as much. It multiplies σ = s / a. At t = T − 1 no signal is left.

Sources: Lipman et al. 2023, "Flow Matching for Generative Modeling", section 4.1; Liu et al. 2023,
"Flow Straight and Fast", equation 1; of the shift, Esser et al. 2024, "Scaling Rectified Flow
Transformers for High-Resolution Image Synthesis", equation 23.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError


@dataclass(frozen=True, eq=False)
class FlowSchedule(NoiseSchedule):
    """The chain whose share of noise τ = s / (a + s) is even in the timestep, but for a shift.

    Lipman et al. 2023, section 4.1, at T levels (Esser et al. 2024).
    """

    shift: float = 1.0
    """α > 0, the shift that the levels have; 1: none."""

    @classmethod
    def build(cls, timesteps: int = 1000, shift: float = 1.0) -> FlowSchedule:
        """Build the schedule of T timesteps.

        Raises:
            UserError: no timesteps, or a shift that is not positive.
        """
        if timesteps < 1:
            raise UserError(f"`timesteps` is {timesteps}; a schedule needs at least 1", "timesteps")
        if not 0 < shift < math.inf:
            raise UserError(f"`shift` is {shift}; it must be positive", "shift")
        share = torch.arange(timesteps, dtype=torch.float64) / timesteps  # u of the level before
        sigma = shift * share / (1 - share)
        # 1 − ᾱ_t / ᾱ_{t−1}, without subtracting what is nearly one; the last is 1.
        square = sigma.square()
        betas = torch.cat([square.diff() / (1 + square[1:]), square.new_ones(1)])
        return cls(betas, shift=shift)

    def rescaled_to_zero_terminal_snr(self) -> NoiseSchedule:
        """Refuse: there is nothing to rescale.

        Raises:
            UserError: always.
        """
        raise UserError(
            "`zero_terminal_snr` does nothing with `schedule` flow, which ends in pure noise as it "
            "is; leave it out",
            "zero_terminal_snr",
        )

    def log_sigma_at(self, timesteps: Tensor) -> Tensor:
        """Return log σ = logit τ = log α + logit u, exact also between timesteps: float64 `[S]`."""
        return math.log(self.shift) + ((timesteps + 1) / len(self.betas)).logit()

    def timesteps_at(self, log_sigma: Tensor) -> Tensor:
        """Return the timesteps of noise levels, from −1 (an image) on: float64 `[S]`."""
        return len(self.betas) * (log_sigma - math.log(self.shift)).sigmoid() - 1

    def solver_unit(self, a: Tensor, s: Tensor) -> Tensor:
        """See `NoiseSchedule`: a + s, so that the state is z and its time τ."""
        return a + s

    def solver_timesteps(self, steps: int, rho: float = 7.0) -> Tensor:
        """Choose timesteps for euler and heun as diffusers' `FlowMatchEulerDiscreteScheduler` does.

        u falls evenly from 1 to the τ of timestep 0, which has a shift already; `rho` is of no use.

        Returns:
            float64 `[steps]`, strictly decreasing, from T − 1 on.
        """
        count = len(self.betas)
        least = self.shift / (count + self.shift - 1)
        return count * torch.linspace(1, least, steps, dtype=torch.float64) - 1
