"""Distillation: one step of the student for many of its teacher.

Both take steps of DDIM without noise, the teacher M a picture and the student N, where M is a
multiple of N, at timesteps whose spacing is "trailing": the student's are among the teacher's. Let
a step of the student lead from a noise level 0 to 2, with a level 1 of the teacher between, and let
ρ = a / s and x = a x_0 + s ε. DDIM keeps ε̂, so that a step moves x / s along a straight line,

    x₁ / s₁ = x₀ / s₀ + (ρ₁ − ρ₀) x̂_0        by an estimate x̂_0 made at level 0,

and two steps, from 0 to 1 and from 1 to 2, are one with the mean of both estimates, by how far each
was followed:

    x̃_0 = (1 − κ) x̂_0 + κ x̂_0′,        κ = (ρ₂ − ρ₁) / (ρ₂ − ρ₀)

with κ = 1 in a last step, which ends where ρ is infinite. x̃_0 is the target of both methods here,
which differ in whose the second estimate is, and where steps begin:

| method      | first estimate | second estimate | begins                                | M      |
|-------------|----------------|-----------------|---------------------------------------|--------|
| progressive | the teacher's  | the teacher's   | where a step of the student does      | 2N     |
| consistency | the teacher's  | the student's   | anywhere on the way of such a step; κ | 2N, 4N,|
|             |                |                 | is 0 in the last place, where the     | 8N …   |
|             |                |                 | teacher's step ends with the student's|        |

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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.conditioning import UNCONDITIONAL, Conditioning, ConditioningSpec, cat
from ddpm_engine.objectives.inputs import Conditions
from ddpm_engine.objectives.objective import Averaged, Network, Objective
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import Column, Stream, denoising_loss, q_sample, random_integers

if TYPE_CHECKING:
    from ddpm_engine.networks.unet.unet import UNet
    from ddpm_engine.objectives.config import DistillationConfig


@dataclass(frozen=True, eq=False)
class Teacher:
    """What a distillation begins with."""

    network: UNet
    """In eval mode; progressive distillation replaces its weights after each stage."""
    prediction: str
    """What it predicts, until it is replaced."""
    student: UNet | None = None
    """What the student begins as, where that is not the teacher; moment matching needs it."""
    critic: UNet | None = None
    """A copy of the teacher, to be trained; moment matching needs it."""


@dataclass(frozen=True, eq=False)
class Jumps:
    """The tables of a stage; an entry each for the M noise levels that the teacher visits."""

    teacher: CoefficientTable
    """DDIM in M steps."""
    student: CoefficientTable
    """The same steps for a network that predicts what the student does."""
    signal: Tensor
    """float64 `[M]`: factor of the image in the state."""
    sigma: Tensor
    """float64 `[M]`: factor of the noise."""
    share: Tensor
    """float64 `[M]`: κ, that of the second estimate in the target."""
    weights: Tensor
    """float64 `[M]`: of the squared error of the student's output."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Jumps:
        """The same on a device, in a precision."""

        def moved(table: CoefficientTable) -> CoefficientTable:
            levels = table.noise_input
            return CoefficientTable(
                table.timesteps.to(device),
                table.rows.to(device, dtype),
                table.state_scale.to(device, dtype),
                levels.to(device, dtype if levels.is_floating_point() else None),
            )

        rest = (self.signal, self.sigma, self.share, self.weights)
        return Jumps(
            moved(self.teacher), moved(self.student), *(table.to(device, dtype) for table in rest)
        )


def jumps(
    schedule: NoiseSchedule, steps: int, teacher_steps: int, prediction: str,
    teacher: str,
) -> Jumps:  # fmt: skip
    """The tables of a stage.

    Args:
        schedule: that both networks know.
        steps: N, of the student.
        teacher_steps: M, a multiple of N.
        prediction: what the student predicts.
        teacher: what its teacher predicts; `"edm"` if and only if the student does.

    Raises:
        UserError: more than T steps; or ε prediction with zero terminal SNR.
    """
    theirs = build_table(schedule, "ddim", teacher_steps, prediction=teacher)
    ours = build_table(schedule, "ddim", teacher_steps, prediction=prediction)
    a, s = noise_levels(schedule, ours.timesteps)
    level = torch.arange(teacher_steps)
    # Level M is the image itself, where ρ would be infinite; nothing begins there.
    rho = (a / s)[:-1]
    stride = teacher_steps // steps
    end = (level // stride + 1) * stride
    between = (level + 1).clamp(max=teacher_steps - 1)
    share = (a[end] - s[end] * rho[between]) / (a[end] - s[end] * rho)
    share[stride - 1 :: stride] = 0
    scale = ours.state_scale[:-1]
    return Jumps(
        theirs,
        ours,
        signal=scale * a[:-1],
        sigma=scale * s[:-1],
        share=share,
        weights=rho.square().clamp(min=1) * ours.rows[:, Column.X0_FROM_OUTPUT].square(),
    )


class Distillation(Objective, ABC):
    """The error of a student's estimate against one made with the help of its teacher.

    Where a sample's step begins is uniform, by its position.

    Args:
        schedule: the noise schedule.
        prediction: what the student predicts.
        conditions: mirrored images and dropped labels; with the seed of levels and noise.
        teacher: on the device.
        plan: method, numbers of steps, and guidance.
        training_steps: optimizer steps in all.
        device: where the networks run.
        clip: whether samplers clip estimates of x_0 to [-1, 1].
        dtype: of the tables, and so of the arithmetic.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str,
        conditions: Conditions,
        teacher: Teacher,
        plan: DistillationConfig,
        training_steps: int,
        device: torch.device | str = "cpu",
        *,
        clip: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.schedule = schedule
        self.prediction = prediction
        self.conditions = conditions
        self.teacher = teacher
        self.plan = plan
        self.training_steps = training_steps
        self.device = torch.device(device)
        self.clip = clip
        self.dtype = dtype
        self._seed = torch.tensor(conditions.seed, device=self.device)
        self._stage = torch.tensor(0)
        self._enter(0)

    @abstractmethod
    def draw(self, positions: Tensor) -> Tensor:
        """Levels that steps begin with, int64 `[B]` in [0, M), for positions int64 `[B]`."""

    @abstractmethod
    def second_estimate(
        self, model: Network, x: Tensor, levels: Tensor, told: Conditioning
    ) -> Tensor:
        """The estimate x̂_0′ from where the teacher's step has led; arguments as `target`'s."""

    def __call__(self, model: Network, batch: Batch) -> Tensor:
        """See `Objective`."""
        conditions, tables = self.conditions, self.tables
        levels = self._here(self.draw(batch.positions))
        images, positions = self._here(batch.images), self._here(batch.positions)
        flips = conditions.flip(batch.positions)
        labels = conditions.labels(batch.positions, batch.labels)
        told = conditions.told(images, batch.positions, labels, flips)
        flip = None if flips is None else self._here(flips)
        x = q_sample(
            images, levels, tables.signal, tables.sigma, self._seed, positions, flip, self.dtype
        )
        x0 = self.target(model, x, levels, told)
        rows = _rows(tables.student, levels)
        wanted = (x0 - rows[Column.X0_FROM_X] * x) / rows[Column.X0_FROM_OUTPUT]
        output = model(x, _noise(tables.student, levels), told)
        # What is wanted stands for an image that is predicted itself.
        return denoising_loss(
            output[:, : x.shape[1]], wanted, levels, torch.ones_like(tables.signal), None,
            self._seed, positions, weights=tables.weights[levels],
        )  # fmt: skip

    @torch.no_grad()
    def target(
        self, model: Network, x: Tensor, levels: Tensor, told: Conditioning = UNCONDITIONAL
    ) -> Tensor:
        """x̃_0, shaped as `x`: with it the student's step ends where the two steps do.

        Args:
            model: the student.
            x: the state that each step begins with, `[B, C, H, W]`.
            levels: int64 `[B]`, of the teacher's.
            told: what `Conditions.told` says of the samples.
        """
        x0 = self._teachers_estimate(x, levels, told)
        rows = _rows(self.tables.teacher, levels)
        between = rows[Column.X] * x + rows[Column.X0] * x0
        # After the last of all levels there is none, but what is estimated there has no share.
        after = (levels + 1).clamp(max=len(self.tables.share) - 1)
        share = self.tables.share[levels][:, None, None, None]
        return x0.lerp(self.second_estimate(model, between, after, told), share)

    def begin_step(self, step: int, averaged: Averaged) -> None:
        """See `Objective`: with a stage, the teacher changes."""
        stage = self.plan.stage(step, self.training_steps)
        if stage != int(self._stage):
            self._enter(stage)

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`: the stage, int64 `[]`."""
        return {"stage": self._stage}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Objective`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self._enter(int(self._stage))

    def _enter(self, stage: int) -> None:
        """Prepare for a stage; the teacher is in place."""
        self._stage.fill_(stage)
        tables = jumps(
            self.schedule,
            self.plan.student_steps(stage),
            self.plan.teacher_steps(stage),
            self.prediction,
            self._taught(),
        )
        self.tables = tables.to(self.device, self.dtype)

    def _taught(self) -> str:
        """What the teacher of this stage predicts."""
        return self.teacher.prediction

    def _guided(self) -> bool:
        """Whether the teacher of this stage is to be guided."""
        return self.plan.guidance_scale is not None

    def _teachers_estimate(self, x: Tensor, levels: Tensor, told: Conditioning) -> Tensor:
        """The teacher's estimate of x_0, at levels `[B]`."""
        table = self.tables.teacher
        output = self._evaluate(x, _noise(table, levels), told)
        return self._estimate(table, x, levels, output)

    def _estimate(
        self, table: CoefficientTable, x: Tensor, levels: Tensor, output: Tensor
    ) -> Tensor:
        rows = _rows(table, levels)
        x0 = rows[Column.X0_FROM_X] * x + rows[Column.X0_FROM_OUTPUT] * output
        return x0.clamp(-1, 1) if self.clip else x0

    def _evaluate(self, x: Tensor, noise: Tensor, told: Conditioning) -> Tensor:
        """What the teacher predicts, guided if it is to be."""
        scale = self.plan.guidance_scale if self._guided() else None
        null = self.conditions.null_class
        return guided(self.teacher.network, x, noise, told, scale, null, self.dtype)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class ProgressiveDistillation(Distillation):
    """The error of a student's step against two steps of its teacher (Salimans & Ho 2022).

    At the end of a stage the averaged weights, which would be sampled from, become the teacher's;
    so the teacher, whole on every rank, is a part of the state.
    """

    def draw(self, positions: Tensor) -> Tensor:
        """See `Distillation`: every other level, where steps of the student begin."""
        steps = self.plan.student_steps(int(self._stage))
        return 2 * random_integers(
            self.conditions.seed, positions, steps, 0, Stream.TRAINING_TIMESTEP
        )

    def second_estimate(
        self, model: Network, x: Tensor, levels: Tensor, told: Conditioning
    ) -> Tensor:
        """See `Distillation`: the teacher's."""
        return self._teachers_estimate(x, levels, told)

    def begin_step(self, step: int, averaged: Averaged) -> None:
        """See `Objective`: with a stage, the student becomes the teacher."""
        if self.plan.stage(step, self.training_steps) != int(self._stage):
            self.teacher.network.load_state_dict(averaged())
        super().begin_step(step, averaged)

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`: the stage, int64 `[]`, and the teacher's weights."""
        weights = self.teacher.network.state_dict()
        return {**super().state(), **{f"teacher.{name}": w for name, w in weights.items()}}

    def _taught(self) -> str:
        return self.teacher.prediction if int(self._stage) == 0 else self.prediction

    def _guided(self) -> bool:
        # What guidance does is in the weights after the first stage.
        return super()._guided() and int(self._stage) == 0


class ConsistencyDistillation(Distillation):
    """The error of a student's estimate against its own from one step of the teacher later.

    Multistep consistency distillation (Heek, Hoogeboom & Salimans 2024, section 3). The student
    that is asked for the second estimate is the one that is being trained, without gradients and
    not its average (Song & Dhariwal 2024, section 3.2).
    """

    def draw(self, positions: Tensor) -> Tensor:
        """See `Distillation`: all of the teacher's levels."""
        steps = self.tables.teacher.evaluations
        return random_integers(self.conditions.seed, positions, steps, 0, Stream.TRAINING_TIMESTEP)

    def second_estimate(
        self, model: Network, x: Tensor, levels: Tensor, told: Conditioning
    ) -> Tensor:
        """See `Distillation`: the student's."""
        table = self.tables.student
        output = model(x, _noise(table, levels), told)[:, : x.shape[1]].to(self.dtype)
        return self._estimate(table, x, levels, output)


DISTILLATIONS: dict[str, type[Distillation]] = {
    "progressive": ProgressiveDistillation,
    "consistency": ConsistencyDistillation,
}
"""By `DistillationConfig.method`."""


def guided(
    network: Network, x: Tensor, noise: Tensor, told: Conditioning, scale: float | None,
    null_class: int | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What a network predicts, without its variance, shaped as `x` in `dtype`.

    Args:
        network: the teacher's.
        x: `[B, C, H, W]`.
        noise: what it is told of the noise, `[B]`.
        told: what `Conditions.told` says of the samples.
        scale: of classifier-free guidance, or None.
        null_class: the label of no class, needed for guidance.
        dtype: of the result and of the arithmetic.
    """
    channels = x.shape[1]
    if scale is None:
        return network(x, noise, told)[:, :channels].to(dtype)
    both = network(
        torch.cat([x, x]),
        torch.cat([noise, noise]),
        cat([told, told.null(ConditioningSpec(null_class))]),
    )
    conditional, unconditional = both[:, :channels].to(dtype).chunk(2)
    return unconditional + scale * (conditional - unconditional)


def _noise(table: CoefficientTable, levels: Tensor) -> Tensor:
    """What a network is told of the noise at levels: `[B]`."""
    return table.noise_input[levels]


def _rows(table: CoefficientTable, levels: Tensor) -> Tensor:
    """Coefficients of steps that begin at levels: `[columns, B, 1, 1, 1]`."""
    return table.rows[levels].T[:, :, None, None, None]
