"""The objectives of DDPM and what followed: the error of a prediction at a random timestep.

    L = c_t · (w_t · mean((output − target)²) + λ · ℓ_t)

| part | what it is                                                            | where            |
|------|-----------------------------------------------------------------------|------------------|
| w_t  | weight of the squared error: simple, min-SNR, P2 or the bound         | `weighting`      |
| ℓ_t  | of a learned variance: the bound's term, which trains it alone        | `denoising_loss` |
| λ    | T / 1000: 0.001 of the sum over t (Nichol & Dhariwal 2021, section 3) | `BOUND_SHARE`    |
| c_t  | makes up for timesteps that are drawn more often than others          | `timesteps`      |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.parameterization import Prediction
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.distributed import Ranks
from ddpm_engine.objectives.inputs import Conditions
from ddpm_engine.objectives.level_sampling import UniformTimesteps
from ddpm_engine.objectives.objective import Network, Objective
from ddpm_engine.objectives.weighting import x0_from_error
from ddpm_kernels import Stream, denoising_loss, gaussian_noise, q_sample
from ddpm_kernels.variational_bound import BoundColumn

BOUND_SHARE = 0.001
"""Of the variational bound, beside the squared error, where the variance is learned."""


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
    """The weighted error of what the network predicts; by default L_simple.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts.
        conditions: mirrored images and dropped labels; with the seed of timesteps and noise.
        device: where the network runs.
        weights: of each timestep's squared error, `[T]`; None: ones.
        learned_variance: the network has 2C outputs, the second half of which are trained by the
            bound: the hybrid objective, if the weights are ones.
        sampling: of timesteps; None: uniform.
        offset_noise: standard deviation of noise that a channel's pixels share, which is added to
            the noise of x_t and to be predicted with it.
        dtype: of the tables, and so of the arithmetic.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        conditions: Conditions,
        device: torch.device | str = "cpu",
        *,
        weights: Tensor | None = None,
        learned_variance: bool = False,
        sampling: UniformTimesteps | None = None,
        offset_noise: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.timesteps = schedule.timesteps
        self.prediction = prediction
        self.conditions = conditions
        self.device = torch.device(device)
        self.dtype = dtype
        self.sampling = sampling or UniformTimesteps(schedule.timesteps)
        self.offset_noise = offset_noise
        self._seed = torch.tensor(conditions.seed, device=self.device)
        self._signal = self._table(schedule.sqrt_alpha_bar)
        self._sigma = self._table(schedule.sqrt_one_minus_alpha_bar)
        self._target = self._target_coefficients()
        self._weights = None if weights is None else self._table(weights)
        self._bound = self._bound_weight = None
        if learned_variance:
            self._bound = self._table(bound_table(schedule, prediction))
            self._bound_weight = self._table(torch.tensor(BOUND_SHARE * schedule.timesteps))
        self._seen: list[tuple[Tensor, Tensor]] = []

    def draw(self, positions: Tensor, labels: Tensor | None) -> Draws:
        """Decide by position; positions and labels int64 `[B]`, best left on the CPU."""
        return Draws(
            self.sampling.draw(self.conditions.seed, positions),
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
        if self.offset_noise:
            in_x_t, in_target = self._offsets(images.shape[1], timesteps, positions)
            prediction = model(x_t + in_x_t, timesteps, told) - in_target
        else:
            prediction = model(x_t, timesteps, told)
        loss = denoising_loss(
            prediction, images, timesteps, *self._target, self._seed, positions,
            weights=None if self._weights is None else self._weights[timesteps],
            flip=flip,
            bound_table=self._bound,
            bound_weights=(
                None if self._bound_weight is None else self._bound_weight.expand(len(timesteps))
            ),
        )  # fmt: skip
        correction = self.sampling.correction(draws.timesteps)
        if correction is None:
            return loss
        self._seen.append((positions, loss.detach()))
        return loss * self._here(correction.to(loss.dtype))

    def end_step(self, ranks: Ranks | None) -> None:
        """See `Objective`."""
        seen, self._seen = self._seen, []
        if ranks is None or not seen:
            return
        positions, losses = (
            ranks.gather(torch.cat(column)).cpu() for column in zip(*seen, strict=True)
        )
        # In the order of positions, whichever rank and piece they were on.
        order = positions.argsort()
        positions, losses = positions[order], losses[order]
        # Drawn again: nothing has been learnt since.
        self.sampling.learn(self.sampling.draw(self.conditions.seed, positions), losses)

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`: what the sampling of timesteps has learnt."""
        return self.sampling.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Objective`."""
        self.sampling.load(state)

    def _offsets(
        self, channels: int, timesteps: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What noise that a channel shares adds to x_t and to the target: `[B, C, 1, 1]`."""
        shape = (channels, 1, 1)
        noise = gaussian_noise(self._seed, positions, shape, 0, Stream.OFFSET_NOISE)
        offset = self.offset_noise * noise
        signal, sigma = (
            table[timesteps][:, None, None, None] for table in (self._signal, self._sigma)
        )
        in_target = {"eps": offset, "v": signal * offset, "x0": 0 * offset}[self.prediction]
        return sigma * offset, in_target

    def _target_coefficients(self) -> tuple[Tensor | None, Tensor | None]:
        """Factors of x_0 and ε in what the network predicts, each `[T]`; None is zero."""
        ones = torch.ones_like(self._signal)
        if self.prediction == "v":
            return -self._sigma, self._signal
        return (None, ones) if self.prediction == "eps" else (ones, None)

    def _table(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def bound_table(schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """What the bound of a learned variance needs of each timestep: float64 `[T, 3]`.

    By `ddpm_kernels.variational_bound.BoundColumn`: the logarithms of β̃_t and β_t, between which
    the variance lies, and the difference of the reverse step's mean from the posterior's for one of
    output − target.
    """
    table = schedule.betas.new_empty(schedule.timesteps, len(BoundColumn))
    table[:, BoundColumn.LOG_VARIANCE_MIN] = schedule.posterior_log_variance_clipped
    table[:, BoundColumn.LOG_VARIANCE_MAX] = schedule.betas.log()
    table[:, BoundColumn.MEAN_FROM_ERROR] = schedule.posterior_mean_x0 * x0_from_error(
        schedule, prediction
    )
    return table
