"""The likelihood of images by the probability-flow ODE, beside the variational bound.

Whatever a network predicts, its estimates of x_0 define a field along the share of noise
τ = s / (a + s), in the state z = x_t / (a + s) of flow matching:

    dz/dτ = (z − x̂_0(z, τ)) / τ,        d log p(z)/dτ = −div = −(D − tr ∂x̂_0/∂z) / τ

Followed from an image to pure noise, whose density is known, it gives the image's density without a
bound. The trace is Hutchinson's estimate eᵀ (∂x̂_0/∂z) e with one vector of random signs for each
sample, or exact, by D derivatives.

Sources: Chen et al. 2018, "Neural Ordinary Differential Equations", theorem 1; Song et al. 2021,
"Score-Based Generative Modeling through Stochastic Differential Equations", section 4.3 and
appendix D.2; Lipman et al. 2023, appendix C.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddpm_engine.diffusion.parameterization import Parameterization, parameterization
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.diffusion.variational_bound import Model
from ddpm_kernels import Stream, gaussian_noise

BIN = 2 / 255
"""Width of the interval of [-1, 1] that a byte stands for."""
_RHO = 3.0
"""Steps are even in τ^(1/ρ): shorter towards the image."""


def log_likelihood(
    model: Model,
    schedule: NoiseSchedule,
    images: Tensor,
    sample_ids: Tensor,
    *,
    seed: int = 0,
    prediction: str = "eps",
    steps: int = 100,
    exact: bool = False,
    conditioning: Any = None,
    clip: bool = True,
) -> Tensor:
    """Compute log p(x) of images by Heun's method, with 2 · steps network evaluations.

    p is the density of x_t / a at the schedule's first timestep, where the noise that is left is
    least. Steps are fixed, so that a sample's result does not depend on its batch. Between
    timesteps a network that takes them is given fractions.

    Args:
        model: the network, on the device of the images, in eval mode.
        schedule: the noise schedule that it was trained on.
        images: float `[B, C, H, W]`.
        sample_ids: int64 `[B]`.
        seed: of the random signs.
        prediction: what the network predicts.
        steps: of the solver, at least 1.
        exact: whether to compute the trace, by C H W derivatives in place of one.
        conditioning: third argument of the network: its conditions, or None.
        clip: the estimate of x_0 to [-1, 1].

    Returns:
        float64 `[B]`, in nats.

    Raises:
        UserError: an unknown prediction, or one that needs a signal, on a schedule with zero
            terminal SNR.
    """
    row = parameterization(prediction, schedule)
    row.check(schedule.sqrt_alpha_bar)
    ends = schedule.log_sigma[[0, -1]].sigmoid() ** (1 / _RHO)
    tau = ends[0].lerp(ends[1], torch.linspace(0, 1, steps + 1, dtype=torch.float64)) ** _RHO
    tau[-1] = schedule.log_sigma[-1].sigmoid()  # where it is 1, exactly
    field = _Field(model, schedule, row, tau, conditioning, clip)
    z = (1 - tau[0].item()) * images.double()
    dimensions = z[0].numel()
    if exact:
        probes = torch.eye(dimensions, device=z.device, dtype=z.dtype)
        probes = probes.reshape(dimensions, 1, *z.shape[1:])
    else:
        shape = (z.shape[1], z.shape[2], z.shape[3])
        step = schedule.timesteps + 1
        noise = gaussian_noise(seed, sample_ids, shape, step, Stream.LIKELIHOOD_NOISE)
        probes = torch.where(noise < 0, -1.0, 1.0).to(z)[None]
    volume = z.new_zeros(len(z))
    for i in range(steps):
        length = (tau[i + 1] - tau[i]).item()
        slope, divergence = field(z, i, probes)
        after, divergence_after = field(z + length * slope, i + 1, probes)
        z = z + length / 2 * (slope + after)
        volume += length / 2 * (divergence + divergence_after)
    unit = (field.a[-1] + field.s[-1]).item()
    square = (unit * z).square().flatten(1).sum(1)
    prior = -square / 2 - dimensions * (math.log(2 * math.pi) / 2 - math.log(unit))
    return prior + volume + dimensions * math.log(1 - tau[0].item())


def ode_bits_per_dim(
    model: Model,
    schedule: NoiseSchedule,
    images: Tensor,
    sample_ids: Tensor,
    *,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Compute bits per dimension of bytes, each moved to a uniform place in its bin.

    In expectation over that place the result bounds −log₂ of the bin's mass from above (Theis et
    al. 2016, section 3.1).

    Args:
        model: as in `log_likelihood`.
        schedule: likewise.
        images: uint8 `[B, C, H, W]`.
        sample_ids: int64 `[B]`.
        seed: of the places and the random signs.
        options: of `log_likelihood`.

    Returns:
        float64 `[B]`.

    Raises:
        ValueError: images that are not bytes.
        UserError: as `log_likelihood`.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; only of uint8 is the likelihood defined")
    shape = (images.shape[1], images.shape[2], images.shape[3])
    normal = gaussian_noise(seed, sample_ids, shape, schedule.timesteps, Stream.LIKELIHOOD_NOISE)
    place = torch.special.ndtr(normal.double()) - 0.5
    x = (2 * images.double() - 255) / 255 + BIN * place
    nats = log_likelihood(model, schedule, x, sample_ids, seed=seed, **options)
    return -(nats / math.prod(shape) + math.log(BIN)) / math.log(2)


class _Field:
    """dz/dτ and its divergence, at the levels of the solver."""

    def __init__(
        self,
        model: Model,
        schedule: NoiseSchedule,
        row: Parameterization,
        tau: Tensor,
        conditioning: Any,
        clip: bool,
    ) -> None:
        self.model, self.row, self.tau = model, row, tau
        self.conditioning, self.clip = conditioning, clip
        norm = (tau.square() + (1 - tau).square()).sqrt()
        self.a, self.s = (1 - tau) / norm, tau / norm
        self.scale = row.state_scale(self.a, self.s) * (self.a + self.s)
        timesteps = schedule.timesteps_at(tau.logit())
        self.level = row.noise_level(self.a, self.s, timesteps).float()

    def __call__(self, z: Tensor, i: int, probes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slope, shaped as `z`, and the divergence `[B]`; `probes` is `[P, …]`."""
        tau = self.tau[i].item()
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            seen = self.scale[i].item() * z
            level = self.level[i].to(z.device).expand(len(z))
            output = self.model(seen.float(), level, self.conditioning)[:, : z.shape[1]].double()
            x0 = self.row.to_x0(output, seen, self.a[i].to(z.device), self.s[i].to(z.device))
            if self.clip:
                x0 = x0.clamp(-1, 1)
            trace = z.new_zeros(len(z))
            for number, probe in enumerate(probes):
                more = number + 1 < len(probes)
                (row,) = torch.autograd.grad(x0, z, probe.expand_as(z), retain_graph=more)
                trace += (row * probe).flatten(1).sum(1)
        divergence = (z[0].numel() - trace.detach()) / tau
        return (z.detach() - x0.detach()) / tau, divergence
