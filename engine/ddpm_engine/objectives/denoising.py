"""The objective of DDPM and what followed: the error of a prediction at a random noise level.

    L = c · (w_t · mean((F − target)²) + λ · ℓ_t),        target = u x_0 + w ε

| part   | what it is                                                         | where              |
|--------|--------------------------------------------------------------------|--------------------|
| target | what the network F is to predict                                   | `parameterization` |
| w_t    | weight of the squared error: simple, of F or in the space of       | `weighting`        |
|        | another prediction; min-SNR, P2 or the bound                       |                    |
| ℓ_t    | term of the variational bound, which trains a learned variance     | `denoising_loss`   |
| λ      | T / 1000: 0.001 of the sum over t (Nichol & Dhariwal 2021, sec. 3) | `BOUND_WEIGHT`     |
| c      | correction for levels that are trained more often than others      | `level_sampling`   |

EDM (Karras et al. 2022, equations 7 and 8) is the same objective: its parameterization, levels with
ln σ ~ N(P_mean, P_std²), and no weights, since λ(σ) ‖D − x_0‖² with λ = 1 / c_out² is the plain
squared error of F. The mean over a sample's values is taken, where the paper's code takes the sum.
Flow matching (Lipman et al. 2023) is, too, with τ = σ / (1 + σ) uniform or logit-normal.

Where x_0 is a latent (Rombach et al. 2022), batches hold its moments, and it is drawn from them by
the kernels. It has no levels of brightness, so that the bound's last term is a density there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.parameterization import Parameterization, parameterization
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.distributed import Ranks
from ddpm_engine.errors import UserError
from ddpm_engine.objectives.base import Network, Objective
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.objectives.level_sampling import LevelSampler, UniformTimesteps
from ddpm_engine.objectives.weighting import in_space_of, x0_from_error
from ddpm_kernels import Stream, denoising_loss, gaussian_noise, q_sample
from ddpm_kernels.variational_bound import BoundColumn

BOUND_WEIGHT = 0.001
"""Weight of the variational bound beside the squared error, where the variance is learned."""


@dataclass(frozen=True, eq=False)
class LevelTables:
    """What training needs of noise levels, one entry per level."""

    signal: Tensor
    """`[N]`: factor of x_0 in the network's input."""
    noise: Tensor
    """`[N]`: factor of ε in the network's input."""
    target_x0: Tensor | None
    """`[N]`: factor of x_0 in the target; None: zero."""
    target_noise: Tensor | None
    """`[N]`: factor of ε in the target; None: zero."""
    noise_input: Tensor
    """`[N]`: the noise level that the network is given."""
    weights: Tensor | None
    """`[N]`: of the squared error; None: ones."""

    @staticmethod
    def build(
        row: Parameterization,
        a: Tensor,
        s: Tensor,
        timesteps: Tensor,
        device: torch.device | str,
        dtype: torch.dtype,
        weights: Tensor | None,
    ) -> LevelTables:
        """Build the tables of a parameterization.

        Args:
            row: what the network sees and predicts.
            a: float64 `[N]`, factor of the image in x_t.
            s: float64 `[N]`, factor of the noise in x_t.
            timesteps: `[N]`, of the levels.
            device: where the tables are needed.
            dtype: of the tables.
            weights: of the squared error, `[N]`; None: ones.
        """

        def moved(values: Tensor) -> Tensor:
            return values.to(dtype).to(device, non_blocking=True)

        scale = row.state_scale(a, s)
        target_x0, target_noise = (
            moved(factor) if held else None
            for factor, held in zip(row.target(a, s), row.target_holds, strict=True)
        )
        level = row.noise_level(a, s, timesteps)
        noise_input = moved(level) if level.is_floating_point() else level.to(device)
        return LevelTables(
            moved(scale * a), moved(scale * s), target_x0, target_noise, noise_input,
            None if weights is None else moved(weights),
        )  # fmt: skip


class DenoisingObjective(Objective):
    """The weighted squared error of what the network predicts; by default L_simple.

    Args:
        schedule: the noise schedule.
        prediction: what the network predicts, a key of `PARAMETERIZATIONS`.
        inputs: mirrored images, conditions, and the seed of levels and noise.
        levels: how often each noise level is trained; None: uniform timesteps.
        weights: of each timestep's squared error, `[T]`; None: ones.
        loss: prediction whose squared error is taken, a key of `PARAMETERIZATIONS`; None: that of
            the network.
        loss_limit: largest weight of the error of x_0 in that loss; None: none.
        learned_variance: whether the network has 2C outputs, the second half of which is trained by
            the variational bound: the hybrid objective, if the weights are ones.
        offset_noise: standard deviation of noise that all pixels of a channel share; it is added to
            ε, and predicted with it.
        dtype: of the tables, and so of the arithmetic.
        input_dtype: of the network's input, to which it is rounded once; None: `dtype`.

    Raises:
        UserError: an unknown prediction; or one that takes a timestep, at levels of a continuum.
        ValueError: weights or a learned variance, which belong to timesteps, at such levels.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str,
        inputs: TrainingInputs,
        *,
        levels: LevelSampler | None = None,
        weights: Tensor | None = None,
        loss: str | None = None,
        loss_limit: float | None = None,
        learned_variance: bool = False,
        offset_noise: float = 0.0,
        dtype: torch.dtype = torch.float32,
        input_dtype: torch.dtype | None = None,
    ) -> None:
        self.timesteps = schedule.timesteps
        self.parameterization = row = parameterization(prediction, schedule)
        self.inputs = inputs
        self.levels = levels or UniformTimesteps(schedule.timesteps)
        self.learns_on_host = self.levels.learns
        self.offset_noise = offset_noise
        self.dtype = dtype
        self.input_dtype = input_dtype or dtype
        self._space = parameterization(loss or prediction, schedule)
        self._loss_limit = loss_limit
        self._bound = self._bound_weight = None
        if learned_variance:
            self._bound = self._table(bound_table(schedule, prediction))
            self._bound_weight = torch.full(
                (), BOUND_WEIGHT * schedule.timesteps, dtype=dtype, device=inputs.device
            )
        self._chain: LevelTables | None = None
        if not self.levels.continuous:
            a, s = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
            own = self._space_weights(a, s)
            if weights is not None:
                own = weights if own is None else own * weights
            self._chain = LevelTables.build(
                row, a, s, torch.arange(schedule.timesteps), inputs.device, dtype, own
            )
        elif row.takes_timestep:
            raise UserError(
                f"`prediction` is {prediction}, whose network is given the timestep; it cannot be "
                "trained at noise levels of a continuum",
                "prediction",
            )
        elif weights is not None or learned_variance:
            raise ValueError("weights and a learned variance belong to timesteps of a schedule")
        self._losses: list[tuple[Tensor, Tensor]] = []

    def __call__(self, network: Network, batch: Batch) -> Tensor:
        """See `Objective`."""
        inputs = self.inputs.prepare(batch, self.levels.integers)
        seed, positions = self.inputs.seed, inputs.positions
        levels = self.levels.sample(seed, positions, inputs.integers)
        tables, entry = self._tables_of(levels)
        noise_level = tables.noise_input[entry]
        # What offset noise is added to is rounded after that.
        z = q_sample(
            inputs.images, entry, tables.signal, tables.noise, seed, positions, inputs.flip,
            self.dtype if self.offset_noise else self.input_dtype,
            latent_scale=self.inputs.latent_scale, latent_shift=self.inputs.latent_shift,
        )  # fmt: skip
        if self.offset_noise:
            in_input, in_target = self._offsets(tables, entry, positions, z.shape[1])
            z = (z + in_input).to(self.input_dtype)
            output = network(z, noise_level, inputs.conditioning) - in_target
        else:
            output = network(z, noise_level, inputs.conditioning)
        loss = denoising_loss(
            output, inputs.images, entry, tables.target_x0, tables.target_noise, seed, positions,
            weights=None if tables.weights is None else tables.weights[entry],
            flip=inputs.flip,
            bound_table=self._bound,
            bound_weights=(
                None if self._bound_weight is None else self._bound_weight.expand(len(entry))
            ),
            latent_scale=self.inputs.latent_scale,
            latent_shift=self.inputs.latent_shift,
        )  # fmt: skip
        correction = self.levels.correction(levels)
        if correction is None:
            return loss
        self._losses.append((positions, loss.detach()))
        return loss * correction.to(loss.dtype)

    def end_step(self, ranks: Ranks | None) -> None:
        """See `Objective`: the sampling of levels learns."""
        kept, self._losses = self._losses, []
        if ranks is None or not kept:
            return
        positions, losses = (ranks.gather(torch.cat(column)) for column in zip(*kept, strict=True))
        # The same levels again: nothing has been learnt since.
        levels = self.levels.sample(self.inputs.seed, positions)
        # In the order of positions, whichever rank and micro-batch they were on.
        order = positions.argsort()
        self.levels.update(levels[order].cpu(), losses[order].cpu())

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`: what the sampling of levels has learnt."""
        return self.levels.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Objective`."""
        self.levels.load(state)

    def _tables_of(self, levels: Tensor) -> tuple[LevelTables, Tensor]:
        """Return tables, and the entry of each sample in them, int64 `[B]`."""
        if self._chain is not None:
            return self._chain, levels
        a = (1 + levels.square()).rsqrt()
        tables = LevelTables.build(
            self.parameterization, torch.ones_like(levels), levels, levels, self.inputs.device,
            self.dtype, self._space_weights(a, levels * a),
        )  # fmt: skip
        return tables, torch.arange(len(levels), device=self.inputs.device)

    def _space_weights(self, a: Tensor, s: Tensor) -> Tensor | None:
        """Return the weights of levels, `[N]`, that the space of the loss gives; None: ones."""
        if self._space == self.parameterization and self._loss_limit is None:
            return None
        return in_space_of(self._space, self.parameterization, a, s, self._loss_limit)

    def _offsets(
        self, tables: LevelTables, entry: Tensor, positions: Tensor, channels: int
    ) -> tuple[Tensor, Tensor]:
        """Return what offset noise adds to the input and to the target: `[B, C, 1, 1]` each."""
        noise = gaussian_noise(
            self.inputs.seed, positions, (channels, 1, 1), 0, Stream.OFFSET_NOISE
        )
        offset = self.offset_noise * noise
        in_input = tables.noise[entry][:, None, None, None] * offset
        if tables.target_noise is None:
            return in_input, torch.zeros_like(offset)
        return in_input, tables.target_noise[entry][:, None, None, None] * offset

    def _table(self, values: Tensor) -> Tensor:
        return values.to(self.inputs.device, self.dtype)


def bound_table(schedule: NoiseSchedule, prediction: str) -> Tensor:
    """Return what the bound of a learned variance needs of each timestep: float64 `[T, 3]`.

    By `ddpm_kernels.variational_bound.BoundColumn`: the logarithms of β̃_t and β_t, between which
    the variance lies, and the error of the reverse step's mean for an error of one in the output.
    """
    table = schedule.betas.new_empty(schedule.timesteps, len(BoundColumn))
    table[:, BoundColumn.LOG_VARIANCE_MIN] = schedule.posterior_log_variance_clipped
    table[:, BoundColumn.LOG_VARIANCE_MAX] = schedule.betas.log()
    table[:, BoundColumn.MEAN_FROM_ERROR] = schedule.posterior_mean_x0 * x0_from_error(
        schedule, prediction
    )
    return table
