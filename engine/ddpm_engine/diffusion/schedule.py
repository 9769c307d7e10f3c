"""The noise schedule: betas and everything derived from them, in float64.

Float32 tables would err by 5e-4 relative in β_t near t = 0, so nothing is rounded before it reaches
a kernel. All tensors are `[T]`, float64, on the CPU, indexed by the timestep t = 0 … T − 1 (the
paper's t − 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddpm_engine.errors import UserError


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """β_1 … β_T of the forward process q(x_t | x_{t-1}) = N(sqrt(1 − β_t) x_{t-1}, β_t I).

    Ho et al. 2020, equation 2, where other equations are not named.
    """

    betas: Tensor
    """`[T]` float64, each in (0, 1); the last may be 1, after which no signal is left."""
    sigma_data: float = 0.5
    """σ_data of EDM's preconditioning, the deviation of the images' values; of no other use."""

    def __post_init__(self) -> None:
        betas = self.betas
        if betas.ndim != 1 or betas.dtype != torch.float64 or len(betas) == 0:
            raise UserError(
                f"betas are {betas.dtype} of shape {tuple(betas.shape)}; "
                "a schedule needs a non-empty one-dimensional float64 tensor"
            )
        valid = (betas > 0) & (betas < 1)
        valid[-1] |= betas[-1] == 1
        if not bool(valid.all()):
            t = int((~valid).nonzero()[0])
            raise UserError(
                f"beta at timestep {t} is {betas[t].item()}; it must lie in (0, 1)"
                + (", or be 1" if t == len(betas) - 1 else "")
            )

    @classmethod
    def linear(
        cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """β rises linearly (Ho et al. 2020, section 4).

        The end points are made for T = 1000 and are taken as given: with far fewer timesteps, raise
        `beta_end`, or images are not yet noise at t = T − 1.

        Raises:
            UserError: no timesteps, or a β outside (0, 1).
        """
        _check_timesteps(timesteps)
        return cls(torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64))

    @classmethod
    def cosine(
        cls, timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """ᾱ falls as a squared cosine (Nichol & Dhariwal 2021, equation 17).

        Raises:
            UserError: no timesteps, or a β outside (0, 1).
        """
        _check_timesteps(timesteps)
        u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2).square()
        return cls._from_curve(alpha_bar, max_beta)

    @classmethod
    def sigmoid(
        cls,
        timesteps: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        max_beta: float = 0.999,
    ) -> NoiseSchedule:
        """ᾱ falls as a sigmoid from `start` to `end` (Jabri, Fleet & Chen 2022, algorithm 2).

        Raises:
            UserError: no timesteps, or a β outside (0, 1).
        """
        _check_timesteps(timesteps)
        u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        first, last = (torch.tensor(v / tau, dtype=torch.float64).sigmoid() for v in (start, end))
        alpha_bar = (last - ((u * (end - start) + start) / tau).sigmoid()) / (last - first)
        return cls._from_curve(alpha_bar, max_beta)

    @classmethod
    def edm(
        cls,
        timesteps: int = 1000,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
    ) -> NoiseSchedule:
        """log σ rises linearly, σ = sqrt((1 − ᾱ) / ᾱ): the range of EDM (Karras et al. 2022).

        EDM trains on any σ and knows no timesteps. These serve samplers, which interpolate log σ
        between them, here exactly.

        Raises:
            UserError: fewer than 2 timesteps, or not 0 < sigma_min < sigma_max, or no positive
                sigma_data.
        """
        if timesteps < 2:
            raise UserError(
                f"`timesteps` is {timesteps}; the edm schedule needs at least 2", "timesteps"
            )
        if not 0 < sigma_min < sigma_max < math.inf:
            raise UserError(
                f"`sigma_min` is {sigma_min} and `sigma_max` {sigma_max}; the first must be "
                "positive, the second larger",
                "sigma_min",
            )
        if not 0 < sigma_data < math.inf:
            raise UserError(f"`sigma_data` is {sigma_data}; it must be positive", "sigma_data")
        ends = math.log(sigma_min), math.log(sigma_max)
        sigma = torch.linspace(*ends, timesteps, dtype=torch.float64).exp()
        # 1 − ᾱ_t / ᾱ_{t−1}, without subtracting what is nearly one.
        square = torch.cat([sigma.new_zeros(1), sigma.square()])
        return cls(square.diff() / (1 + square[1:]), sigma_data)

    @classmethod
    def _from_curve(cls, alpha_bar: Tensor, max_beta: float) -> NoiseSchedule:
        """From ᾱ at T + 1 points that begin at time zero; only ratios matter."""
        return cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    def rescaled_to_zero_terminal_snr(self) -> NoiseSchedule:
        """This schedule shifted and scaled so that nothing of the image is left at t = T − 1.

        sqrt(ᾱ) is mapped linearly, its first value kept and its last made zero (Lin et al. 2023,
        algorithm 1). Training and sampling then both begin in pure noise, where only `v` and `x0`
        predictions say anything of the image.

        Raises:
            UserError: a schedule of one timestep.
        """
        if self.timesteps < 2:
            raise UserError(
                "`timesteps` is 1; a schedule needs at least 2 to be rescaled to zero terminal SNR",
                "timesteps",
            )
        root = self.sqrt_alpha_bar
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alpha_bar = root.square()
        return NoiseSchedule(1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]]))

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alphas(self) -> Tensor:
        """α_t = 1 − β_t."""
        return 1 - self.betas

    @cached_property
    def alpha_bar(self) -> Tensor:
        """ᾱ_t = Π α_s over s ≤ t."""
        return self.alphas.cumprod(0)

    @cached_property
    def alpha_bar_previous(self) -> Tensor:
        """ᾱ_{t−1}, one at t = 0."""
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @cached_property
    def sqrt_alpha_bar(self) -> Tensor:
        """sqrt(ᾱ_t), the factor of the image in x_t."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sqrt_one_minus_alpha_bar(self) -> Tensor:
        """sqrt(1 − ᾱ_t), the factor of the noise in x_t."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @cached_property
    def log_sigma(self) -> Tensor:
        """log σ_t with σ = sqrt(1 − ᾱ) / sqrt(ᾱ), rising; +∞ where ᾱ is zero."""
        return -0.5 * self.snr.log()

    def log_sigma_at(self, timesteps: Tensor) -> Tensor:
        """Interpolate log σ between timesteps: float64 `[S]` of float64 `[S]` in [0, T − 1]."""
        known = torch.arange(self.timesteps, dtype=torch.float64)
        return interpolated(timesteps, known, self.log_sigma)

    def timesteps_at(self, log_sigma: Tensor) -> Tensor:
        """Return the timesteps of noise levels, the inverse of `log_sigma_at`: float64 `[S]`."""
        known = torch.arange(self.timesteps, dtype=torch.float64)
        return interpolated(log_sigma, self.log_sigma, known)

    def solver_unit(self, a: Tensor, s: Tensor) -> Tensor:
        """Return u, float64 `[S]` as `a` and `s`: solvers take straight lines for x / u in s / u.

        It is a, so that the time of the probability-flow ODE is σ (Karras et al. 2022, section 3).
        """
        return a

    def solver_timesteps(self, steps: int, rho: float = 7.0) -> Tensor:
        """Choose timesteps for euler and heun: σ^(1/ρ) falls evenly from the largest σ on.

        Karras et al. 2022, equation 5. Few are timesteps of the schedule itself; log σ is
        interpolated between those.

        Returns:
            float64 `[steps]`, strictly decreasing, from T − 1 to 0.

        Raises:
            UserError: zero terminal SNR, where σ is infinite.
        """
        if self.log_sigma[-1].isinf():
            raise UserError(
                "this schedule ends in pure noise (zero terminal SNR), where sigma is infinite and "
                "cannot be spaced as Karras et al. do; let `sampler` be ddim, dpm++2m or unipc, or "
                "list the timesteps",
                "sampler",
            )
        ends = (self.log_sigma[[-1, 0]] / rho).exp()
        sigma = torch.linspace(1, 0, steps, dtype=torch.float64) * (ends[0] - ends[1]) + ends[1]
        return self.timesteps_at(rho * sigma.log())

    @cached_property
    def posterior_variance(self) -> Tensor:
        """β̃_t, the variance of q(x_{t−1} | x_t, x_0) (equation 7); zero at t = 0."""
        return (1 - self.alpha_bar_previous) / (1 - self.alpha_bar) * self.betas

    @cached_property
    def posterior_log_variance_clipped(self) -> Tensor:
        """log β̃_t, with the value of t = 1 at t = 0, where β̃ is zero (as in the paper's code)."""
        variance = self.posterior_variance.clone()
        variance[0] = variance[1] if self.timesteps > 1 else self.betas[0]
        return variance.log()

    @cached_property
    def posterior_mean_x0(self) -> Tensor:
        """Factor of x_0 in the posterior mean (equation 7)."""
        return self.alpha_bar_previous.sqrt() * self.betas / (1 - self.alpha_bar)

    @cached_property
    def posterior_mean_xt(self) -> Tensor:
        """Factor of x_t in the posterior mean (equation 7)."""
        return self.alphas.sqrt() * (1 - self.alpha_bar_previous) / (1 - self.alpha_bar)


def interpolated(x: Tensor, known_x: Tensor, known_y: Tensor) -> Tensor:
    """Interpolate y linearly at each x, `[N]`; `known_x` is increasing and x lies within it.

    Args:
        x: float64 `[N]`.
        known_x: float64 `[K]`.
        known_y: float64 `[K]`.
    """
    if len(known_x) == 1:
        return known_y.expand(len(x))
    right = torch.searchsorted(known_x, x).clamp(1, len(known_x) - 1)
    left = right - 1
    weight = (x - known_x[left]) / (known_x[right] - known_x[left])
    return known_y[left].lerp(known_y[right], weight.clamp(0, 1))


def _check_timesteps(timesteps: int) -> None:
    if timesteps < 1:
        raise UserError(f"`timesteps` is {timesteps}; a schedule needs at least 1", "timesteps")
