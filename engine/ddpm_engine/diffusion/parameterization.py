"""Parameterizations: what a network sees of a noisy image, and what it predicts.

With x_t = a x_0 + s ε, the network is given z = k x_t and a noise level. Its output F is trained to
match u x_0 + w ε, and an estimate of x_0 follows from it by x_0 = p z + q F.

|     | z            | target                         | x_0                         | noise level |
|-----|--------------|--------------------------------|-----------------------------|-------------|
| eps | x_t          | ε                              | (z − s F) / a               | t           |
| x0  | x_t          | x_0                            | F                           | t           |
| v   | x_t          | a ε − s x_0                    | a z − s F                   | t           |
| edm | c_in x_t / a | (x_0 − c_skip x_t / a) / c_out | (c_skip / c_in) z + c_out F | ln σ / 4    |
| flow| x_t / (a + s)| ε − x_0                        | z − τ F                     | T τ         |

Each row is one class here, and everything else asks that class: samplers, training, distillation
and the variational bound. A new parameterization is a new class in `PARAMETERIZATIONS`.

Sources: Ho et al. 2020, equation 15, of eps; Salimans & Ho 2022, appendix D, of x0 and v; Karras et
al. 2022, table 1, of edm, where σ = s / a; Lipman et al. 2023, section 4.1, of flow, where
τ = s / (a + s), so that z = (1 − τ) x_0 + τ ε.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError

Prediction = Literal["eps", "x0", "v", "edm", "flow"]
"""The names that a configuration accepts; `PARAMETERIZATIONS` may hold more."""


@dataclass(frozen=True)
class Parameterization(ABC):
    """What a network sees and predicts, as functions of the factors in x_t = a x_0 + s ε.

    The factors are tensors of one shape, and so are the results; on a chain a² + s² = 1, while EDM
    trains with a = 1 and s = σ. Everything is differentiable and keeps the precision of `a`.
    """

    name: ClassVar[str]
    """Key in `PARAMETERIZATIONS`, the `prediction` of configurations."""
    needs_signal: ClassVar[bool] = False
    """Whether a must be positive: from pure noise (zero terminal SNR) nothing can be estimated."""
    takes_timestep: ClassVar[bool] = True
    """Whether the noise level is the timestep, so that the network knows the levels of one chain.
    False: it is a function of a and s, and training may use any level of a continuum."""
    own_schedule: ClassVar[str | None] = None
    """Shape of the noise schedule (`DiffusionConfig.schedule`) that it needs; None: any will do."""
    target_holds: ClassVar[tuple[bool, bool]] = (True, True)
    """Whether image and noise are parts of the target; the factor of one that is not is zero."""
    clips_x0: ClassVar[bool] = True
    """Whether samplers clip estimates of x_0 to [-1, 1] by default."""

    @classmethod
    def for_schedule(cls, schedule: NoiseSchedule) -> Parameterization:
        """Build the parameterization with the constants that a schedule holds, if it needs any."""
        return cls()

    def state_scale(self, a: Tensor, s: Tensor) -> Tensor:
        """Return k, shaped as `a` and `s`: the network sees z = k x_t."""
        return torch.ones_like(a)

    @abstractmethod
    def x0_coefficients(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p, q), shaped as `a` and `s`: the estimate of the image is x_0 = p z + q F."""

    @abstractmethod
    def target(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return (u, w), shaped as `a` and `s`: the network is to predict u x_0 + w ε."""

    def noise_level(self, a: Tensor, s: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise level that the network is given, shaped as `a`, `s` and `timesteps`.

        By default it is the timestep itself.
        """
        return timesteps

    def to_x0(self, output: Tensor, z: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Estimate the clean image from an output.

        `output`, `z` and the result are `[B, C, H, W]`; `a` and `s` broadcast against them.
        """
        p, q = self.x0_coefficients(a, s)
        return p * z + q * output

    def from_x0(self, x_0: Tensor, z: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Return the output whose estimate of the clean image is `x_0`; the inverse of `to_x0`.

        `x_0`, `z` and the result are `[B, C, H, W]`; `a` and `s` broadcast against them.
        """
        p, q = self.x0_coefficients(a, s)
        return (x_0 - p * z) / q

    def check(self, a: Tensor) -> None:
        """Refuse levels, `a` of any shape, at which the parameterization is undefined.

        Raises:
            UserError: some a is zero, and the parameterization needs a signal.
        """
        if self.needs_signal and bool((a == 0).any()):
            able = [name for name, row in PARAMETERIZATIONS.items() if not row.needs_signal]
            raise UserError(
                f"`prediction` is {self.name}, but this schedule ends in pure noise (zero terminal "
                "SNR), where such a prediction says nothing of the image; use a network that "
                f"predicts {' or '.join(able)}",
                "prediction",
            )


@dataclass(frozen=True)
class Epsilon(Parameterization):
    """The network predicts the noise ε (Ho et al. 2020)."""

    name = "eps"
    needs_signal = True
    target_holds = (False, True)

    def x0_coefficients(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`."""
        return 1 / a, -s / a

    def target(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`."""
        return torch.zeros_like(a), torch.ones_like(a)


@dataclass(frozen=True)
class CleanImage(Parameterization):
    """The network predicts the clean image x_0."""

    name = "x0"
    target_holds = (True, False)

    def x0_coefficients(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`."""
        return torch.zeros_like(a), torch.ones_like(a)

    def target(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`."""
        return torch.ones_like(a), torch.zeros_like(a)


@dataclass(frozen=True)
class Velocity(Parameterization):
    """The network predicts the velocity v = a ε − s x_0, where a² + s² = 1 (Salimans & Ho 2022)."""

    name = "v"

    def x0_coefficients(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`."""
        return a, -s

    def target(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`."""
        return -s, a


@dataclass(frozen=True)
class Edm(Parameterization):
    """The network predicts F of EDM's preconditioned denoiser D (Karras et al. 2022, table 1).

        D(y; σ) = c_skip y + c_out F(c_in y; c_noise),        y = x_t / a = x_0 + σ ε

    | factor | value                            |
    |--------|----------------------------------|
    | c_skip | σ_data² / (σ² + σ_data²)         |
    | c_out  | σ σ_data / sqrt(σ² + σ_data²)    |
    | c_in   | 1 / sqrt(σ² + σ_data²)           |

    Input and target then have unit variance at every σ, if the images have deviation σ_data.
    """

    name = "edm"
    needs_signal = True
    takes_timestep = False
    own_schedule = "edm"
    clips_x0 = False

    sigma_data: float = 0.5
    """Standard deviation of the images' values, positive."""

    @classmethod
    def for_schedule(cls, schedule: NoiseSchedule) -> Parameterization:
        """See `Parameterization`."""
        return cls(schedule.sigma_data)

    def state_scale(self, a: Tensor, s: Tensor) -> Tensor:
        """See `Parameterization`: c_in / a."""
        return 1 / self._deviation(s / a) / a

    def x0_coefficients(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`: c_skip / c_in and c_out."""
        deviation = self._deviation(s / a)
        return self._skip(deviation) / (1 / deviation), s / a * self.sigma_data / deviation

    def target(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`: (1 − c_skip) / c_out and −c_skip σ / c_out."""
        sigma = s / a
        deviation = self._deviation(sigma)
        skip, out = self._skip(deviation), sigma * self.sigma_data / deviation
        return (1 - skip) / out, -skip * sigma / out

    def noise_level(self, a: Tensor, s: Tensor, timesteps: Tensor) -> Tensor:
        """See `Parameterization`: c_noise = ln σ / 4."""
        return (s / a).log() / 4

    def _deviation(self, sigma: Tensor) -> Tensor:
        """Return sqrt(σ² + σ_data²), the deviation of y, shaped as σ."""
        return (sigma.square() + self.sigma_data**2).sqrt()

    def _skip(self, deviation: Tensor) -> Tensor:
        return (self.sigma_data / deviation).square()


@dataclass(frozen=True)
class Flow(Parameterization):
    """The network predicts dz/dτ = ε − x_0 on the straight line z = (1 − τ) x_0 + τ ε.

    Lipman et al. 2023, section 4.1; Liu et al. 2023, equation 1. It is given T τ in place of a
    timestep, as networks of diffusers are.
    """

    name = "flow"
    takes_timestep = False
    own_schedule = "flow"
    clips_x0 = False

    timesteps: int = 1000
    """T: the noise level that the network is given for pure noise."""

    @classmethod
    def for_schedule(cls, schedule: NoiseSchedule) -> Parameterization:
        """See `Parameterization`."""
        return cls(schedule.timesteps)

    def state_scale(self, a: Tensor, s: Tensor) -> Tensor:
        """See `Parameterization`: 1 / (a + s)."""
        return 1 / (a + s)

    def x0_coefficients(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`: 1 and −τ."""
        return torch.ones_like(a), -s / (a + s)

    def target(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parameterization`."""
        return -torch.ones_like(a), torch.ones_like(a)

    def noise_level(self, a: Tensor, s: Tensor, timesteps: Tensor) -> Tensor:
        """See `Parameterization`: T τ."""
        return self.timesteps * s / (a + s)


PARAMETERIZATIONS: dict[str, type[Parameterization]] = {
    row.name: row for row in (Epsilon, CleanImage, Velocity, Edm, Flow)
}
"""Every parameterization by name."""


def parameterization(prediction: str, schedule: NoiseSchedule) -> Parameterization:
    """Build a parameterization by name.

    Args:
        prediction: a key of `PARAMETERIZATIONS`.
        schedule: the noise schedule of the network, for the constants that it holds.

    Raises:
        UserError: an unknown name.
    """
    if prediction not in PARAMETERIZATIONS:
        known = ", ".join(PARAMETERIZATIONS)
        raise UserError(f"`prediction` is {prediction}; it must be one of {known}", "prediction")
    return PARAMETERIZATIONS[prediction].for_schedule(schedule)


def clips_x0(prediction: str, asked: bool | None) -> bool:
    """Return whether samplers clip estimates of x_0: as asked, or as the parameterization has it.

    Args:
        prediction: a key of `PARAMETERIZATIONS`.
        asked: None leaves it to the parameterization.
    """
    return PARAMETERIZATIONS[prediction].clips_x0 if asked is None else asked


def see_the_same(
    first: Parameterization, second: Parameterization, schedule: NoiseSchedule
) -> bool:
    """Return whether two networks are given the same input at every level of a schedule.

    Then an output of the one converts into an output of the other by way of x_0.
    """
    a, s = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
    timesteps = torch.arange(schedule.timesteps)
    return torch.equal(first.state_scale(a, s), second.state_scale(a, s)) and torch.equal(
        first.noise_level(a, s, timesteps), second.noise_level(a, s, timesteps)
    )


def convert(
    output: Tensor,
    source: Parameterization,
    target: Parameterization,
    z: Tensor,
    a: Tensor,
    s: Tensor,
) -> Tensor:
    """Turn an output of one parameterization into that of another that sees the same.

    The result is shaped as `output`.

    Args:
        output: `[B, C, H, W]`, of `source`.
        source: what `output` is.
        target: what to return.
        z: `[B, C, H, W]`, what both networks see.
        a: factor of the image, broadcastable to `z`.
        s: factor of the noise, likewise.
    """
    if source == target:
        return output
    return target.from_x0(source.to_x0(output, z, a, s), z, a, s)
