"""Trajectory distillation: one step of the student for many of its teacher.

Both take steps of DDIM without noise, the teacher M per sample and the student N, where M is a
multiple of N, at timesteps with trailing spacing: the student's are among the teacher's. Let a step
of the student lead from noise level 0 to level 2, with level 1 of the teacher in between, and let
ρ = a / s and x = a x_0 + s ε. DDIM keeps ε̂, so that a step moves x / s along a straight line,

    x₁ / s₁ = x₀ / s₀ + (ρ₁ − ρ₀) x̂_0        by an estimate x̂_0 made at level 0,

and two steps, from 0 to 1 and from 1 to 2, are one step with the weighted mean of both estimates:

    x̃_0 = (1 − κ) x̂_0 + κ x̂_0′,        κ = (ρ₂ − ρ₁) / (ρ₂ − ρ₀)

with κ = 1 in a last step, which ends where ρ is infinite. x̃_0 is the target of both methods, which
differ in where the second estimate comes from and where steps begin:

| method      | first estimate | second estimate | a step begins                         | M      |
|-------------|----------------|-----------------|---------------------------------------|--------|
| progressive | the teacher's  | the teacher's   | where a step of the student does      | 2N     |
| consistency | the teacher's  | the student's   | anywhere along such a step; κ is 0 at | 2N, 4N,|
|             |                |                 | its last level, where the teacher's   | 8N …   |
|             |                |                 | step ends with the student's          |        |

The first is that of Salimans & Ho (2022, algorithm 2), who write (x₂ − s₂/s₀ x₀) / (a₂ − s₂/s₀ a₀)
for x̃_0, a quotient of differences of nearly equal numbers. The second is multistep consistency
distillation (Heek, Hoogeboom & Salimans 2024), also known as TRACT (Berthelot et al. 2023); with
N = 1 it is consistency distillation (Song et al. 2023). Where estimates are clipped, as samplers
do, x̃_0 lies in the same range.

The loss is max(SNR, 1) (x̂_0 − x̃_0)², the truncated SNR of Salimans & Ho (section 4), as an error of
whatever the student predicts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.conditioning import UNCONDITIONAL, Conditioning
from ddpm_engine.objectives.base import Averaged, Network, Objective
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.objectives.distillation.step_tables import step_tables
from ddpm_engine.objectives.distillation.teacher import Teacher, predict
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import Column, denoising_loss, q_sample, training_draws


class Distillation(Objective, ABC):
    """The error of a student's estimate against one made with the help of its teacher.

    Args:
        schedule: the noise schedule.
        prediction: what the student predicts.
        inputs: mirrored images, conditions, and the seed of levels and noise.
        teacher: on the device of the inputs.
        config: method, numbers of steps, and guidance.
        training_steps: optimizer steps in all.
        clip: whether estimates of x_0 are clipped to [-1, 1], as the sampler does.
        dtype: of the tables, and so of the arithmetic.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str,
        inputs: TrainingInputs,
        teacher: Teacher,
        config: DistillationConfig,
        training_steps: int,
        *,
        clip: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.schedule = schedule
        self.prediction = prediction
        self.inputs = inputs
        self.teacher = teacher
        self.config = config
        self.training_steps = training_steps
        self.clip = clip
        self.dtype = dtype
        self._enter(0)

    @abstractmethod
    def sample_levels(self, positions: Tensor) -> Tensor:
        """Choose the levels that steps begin at, uniformly by position.

        Args:
            positions: int64 `[B]`.

        Returns:
            int64 `[B]` in [0, M).
        """

    @abstractmethod
    def second_estimate(
        self, network: Network, z: Tensor, levels: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Return the estimate x̂_0′ from where the teacher's step led; arguments as `target`'s."""

    def __call__(self, network: Network, batch: Batch) -> Tensor:
        """See `Objective`."""
        tables = self.tables
        inputs = self.inputs.prepare(batch)
        levels = self.sample_levels(inputs.positions)
        z = q_sample(
            inputs.images, levels, tables.signal, tables.noise, self.inputs.seed, inputs.positions,
            inputs.flip, self.dtype, latent_scale=self.inputs.latent_scale,
            latent_shift=self.inputs.latent_shift,
        )  # fmt: skip
        x0 = self.target(network, z, levels, inputs.conditioning)
        rows = _rows(tables.student, levels)
        target = (x0 - rows[Column.X0_FROM_X] * z) / rows[Column.X0_FROM_OUTPUT]
        output = network(z, tables.student.noise_input[levels], inputs.conditioning)
        # The target takes the place of the images: the output is regressed onto it directly.
        return denoising_loss(
            output[:, : z.shape[1]], target, levels, torch.ones_like(tables.signal), None,
            self.inputs.seed, inputs.positions, weights=tables.weights[levels],
        )  # fmt: skip

    @torch.no_grad()
    def target(
        self,
        network: Network,
        z: Tensor,
        levels: Tensor,
        conditioning: Conditioning = UNCONDITIONAL,
    ) -> Tensor:
        """Return x̃_0, shaped as `z`, by which the student's step ends where the two steps do.

        Args:
            network: the student.
            z: the networks' input where each step begins, `[B, C, H, W]`.
            levels: int64 `[B]`, the teacher's.
            conditioning: of the samples.
        """
        x0 = self._teacher_x0(z, levels, conditioning)
        rows = _rows(self.tables.teacher, levels)
        between = rows[Column.X] * z + rows[Column.X0] * x0
        # No level follows the last one, but κ is zero there.
        following = (levels + 1).clamp(max=len(self.tables.kappa) - 1)
        kappa = self.tables.kappa[levels][:, None, None, None]
        return x0.lerp(self.second_estimate(network, between, following, conditioning), kappa)

    def begin_step(self, step: int, averaged: Averaged) -> bool:
        """See `Objective`: the teacher changes with the stage."""
        stage = self.config.stage(step, self.training_steps)
        if stage == self._stage:
            return False
        self._enter(stage)
        return True

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`: the stage, int64 `[]`."""
        return {"stage": torch.tensor(self._stage)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Objective`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self._enter(int(state["stage"]))

    def _enter(self, stage: int) -> None:
        """Prepare for a stage; the teacher is in place."""
        self._stage = stage
        tables = step_tables(
            self.schedule,
            self.config.student_steps(stage),
            self.config.teacher_steps(stage),
            self.prediction,
            self._teacher_prediction(),
        )
        self.tables = tables.to(self.inputs.device, self.dtype)

    def _integers(self, positions: Tensor, count: int) -> Tensor:
        """Return an integer in [0, count) for each position: int64 `[B]`."""
        integers = training_draws(self.inputs.seed, positions, integers=count).integers
        assert integers is not None
        return integers

    def _teacher_prediction(self) -> str:
        """Return what the teacher of this stage predicts."""
        return self.teacher.prediction

    def _guidance_scale(self) -> float | None:
        """Return the guidance scale of this stage's teacher, or None."""
        return self.config.guidance_scale

    def _teacher_x0(self, z: Tensor, levels: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the teacher's estimate of x_0, at levels `[B]`."""
        table = self.tables.teacher
        output = predict(
            self.teacher.network, z, table.noise_input[levels], conditioning, self.inputs.spec,
            self._guidance_scale(), self.dtype,
        )  # fmt: skip
        return self._x0(table, z, levels, output)

    def _x0(self, table: CoefficientTable, z: Tensor, levels: Tensor, output: Tensor) -> Tensor:
        rows = _rows(table, levels)
        x0 = rows[Column.X0_FROM_X] * z + rows[Column.X0_FROM_OUTPUT] * output
        return x0.clamp(-1, 1) if self.clip else x0


class ProgressiveDistillation(Distillation):
    """The error of a student's step against two steps of its teacher (Salimans & Ho 2022).

    At the end of a stage the averaged weights, which would be sampled from, become the teacher's;
    so the teacher, whole on every rank, is a part of the state.
    """

    def sample_levels(self, positions: Tensor) -> Tensor:
        """See `Distillation`: every other level, where steps of the student begin."""
        return 2 * self._integers(positions, self.config.student_steps(self._stage))

    def second_estimate(
        self, network: Network, z: Tensor, levels: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """See `Distillation`: the teacher's."""
        return self._teacher_x0(z, levels, conditioning)

    def begin_step(self, step: int, averaged: Averaged) -> bool:
        """See `Objective`: with a stage, the student becomes the teacher."""
        if self.config.stage(step, self.training_steps) != self._stage:
            self.teacher.network.load_state_dict(averaged())
        return super().begin_step(step, averaged)

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`: the stage, int64 `[]`, and the teacher's weights."""
        weights = self.teacher.network.state_dict()
        return {**super().state(), **{f"teacher.{name}": w for name, w in weights.items()}}

    def _teacher_prediction(self) -> str:
        return self.teacher.prediction if self._stage == 0 else self.prediction

    def _guidance_scale(self) -> float | None:
        # After the first stage the weights have it built in.
        return super()._guidance_scale() if self._stage == 0 else None


class ConsistencyDistillation(Distillation):
    """The error of a student's estimate against its own from one step of the teacher later.

    Multistep consistency distillation (Heek, Hoogeboom & Salimans 2024, section 3). The second
    estimate is made by the student in training, without gradients, rather than by its average
    (Song & Dhariwal 2024, section 3.2).
    """

    def sample_levels(self, positions: Tensor) -> Tensor:
        """See `Distillation`: all of the teacher's levels."""
        return self._integers(positions, self.tables.teacher.evaluations)

    def second_estimate(
        self, network: Network, z: Tensor, levels: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """See `Distillation`: the student's."""
        table = self.tables.student
        output = network(z, table.noise_input[levels], conditioning)[:, : z.shape[1]]
        return self._x0(table, z, levels, output.to(self.dtype))


DISTILLATIONS: dict[str, type[Distillation]] = {
    "progressive": ProgressiveDistillation,
    "consistency": ConsistencyDistillation,
}
"""By `DistillationConfig.method`."""


def _rows(table: CoefficientTable, levels: Tensor) -> Tensor:
    """Return the coefficients of steps that begin at levels: `[columns, B, 1, 1, 1]`."""
    return table.rows[levels].T[:, :, None, None, None]
