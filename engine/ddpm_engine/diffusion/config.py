"""Configuration of the diffusion process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from ddpm_engine.bounds import Ge, Gt, Le, Lt, out_of_bounds
from ddpm_engine.diffusion.flow_schedule import FlowSchedule
from ddpm_engine.diffusion.parameterization import Prediction
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError

MAX_LEVEL = 1000
"""Largest level of noise-conditioning augmentation (`super_resolution`), where 0 is no noise."""

Variance = Literal["fixed_small", "fixed_large", "learned_range"]
"""Variance of a reverse step: the posterior's, beta, or interpolated as the network says."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process and what the network predicts."""

    schedule: Literal["linear", "cosine", "sigmoid", "edm", "flow"] = "linear"
    """Shape of the noise schedule; edm: log sigma rises linearly; flow: the share of noise does."""
    timesteps: Annotated[int, Ge(1), Le(1_000_000)] = 1000
    """Length T of the chain, in timesteps, 2 at least for edm, at most 1000000."""
    beta_start: Annotated[float, Gt(0), Lt(1)] = 1e-4
    """First beta of the linear schedule, between 0 and 1."""
    beta_end: Annotated[float, Gt(0), Lt(1)] = 0.02
    """Last beta of the linear schedule, between 0 and 1."""
    betas: tuple[float, ...] | None = None
    """Betas themselves, one for each timestep; None: the shape describes them."""
    sigma_min: Annotated[float, Gt(0), Le(1e9)] = 0.002
    """First noise level sigma of the edm schedule, positive, where sampling ends."""
    sigma_max: Annotated[float, Gt(0), Le(1e9)] = 80.0
    """Last noise level sigma of the edm schedule, where sampling begins."""
    sigma_data: Annotated[float, Gt(0), Le(1e9)] = 0.5
    """Standard deviation of the images' values, in [-1, 1], that edm prediction assumes."""
    shift: Annotated[float, Gt(0), Le(1e6)] = 1.0
    """Shift of the flow schedule, positive: above 1, more of the levels are noisy, as images of
    more pixels need (Esser et al. 2024); 1: none."""
    prediction: Prediction = "eps"
    """Prediction of the network: the noise, the clean image or the velocity; edm: a mixture of
    image and noise (Karras et al. 2022), with the edm schedule; flow: noise less image, with the
    flow schedule. These two are trained at any noise level."""
    zero_terminal_snr: bool = False
    """Rescaling of the schedule so that no signal is left at the last timestep (not for eps)."""

    def problems(self) -> Iterator[UserError]:
        """Report everything wrong with the values, the schedule that they describe included."""
        bounds = list(out_of_bounds(self))
        yield from bounds
        if self.shift != 1 and self.schedule != "flow":
            yield UserError(
                f"`shift` is {self.shift}, which does nothing unless `schedule` is flow; leave it "
                "out",
                "shift",
            )
        if not bounds:
            try:
                self.build_schedule()
            except UserError as error:
                yield error

    def build_schedule(self) -> NoiseSchedule:
        """The noise schedule that this describes.

        Raises:
            UserError: as `NoiseSchedule`, or `betas` and `timesteps` contradict each other.
        """
        if self.betas is not None:
            if len(self.betas) != self.timesteps:
                raise UserError(
                    f"`betas` has {len(self.betas)} entries but `timesteps` is {self.timesteps}; "
                    "give one for each timestep",
                    "betas",
                )
            schedule = NoiseSchedule(torch.tensor(self.betas, dtype=torch.float64))
        elif self.schedule == "linear":
            schedule = NoiseSchedule.linear(self.timesteps, self.beta_start, self.beta_end)
        elif self.schedule == "cosine":
            schedule = NoiseSchedule.cosine(self.timesteps)
        elif self.schedule == "flow":
            schedule = FlowSchedule.build(self.timesteps, self.shift)
        elif self.schedule == "edm":
            schedule = NoiseSchedule.edm(
                self.timesteps, self.sigma_min, self.sigma_max, self.sigma_data
            )
        else:
            schedule = NoiseSchedule.sigmoid(self.timesteps)
        return schedule.rescaled_to_zero_terminal_snr() if self.zero_terminal_snr else schedule
