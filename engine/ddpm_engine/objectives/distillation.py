"""Progressive distillation: one step of the student for two of its teacher.

Both take steps of DDIM without noise, the teacher 2N a picture and the student N, at every other
of the teacher's timesteps ("trailing" spacing, whose grids are nested). Let a student's step lead
from a noise level 0 over 1, where only the teacher stops, to 2, with ρ = a / s and x = a x_0 + s ε.
DDIM keeps ε̂, so that a step moves x / s along a straight line,

    x₁ / s₁ = x₀ / s₀ + (ρ₁ − ρ₀) x̂_0        by an estimate x̂_0 made at level 0,

and two steps are one with the mean of both estimates, by how far each was followed:

    x̃_0 = (1 − κ) x̂_0 + κ x̂_0′,        κ = (ρ₂ − ρ₁) / (ρ₂ − ρ₀)

with κ = 1 in the last step, which ends where ρ is infinite. That is the target of Salimans & Ho
(2022, algorithm 2), (x₂ − s₂/s₀ x₀) / (a₂ − s₂/s₀ a₀), without its differences of nearly equal
numbers; and where estimates are clipped, as samplers do, it lies in the same range.

The loss is max(SNR, 1) (x̂_0 − x̃_0)², their truncated SNR (section 4), as an error of whatever the
student predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_engine.data import Batch
from ddpm_engine.objectives.conditions import Conditions
from ddpm_engine.objectives.objective import Averaged, Network, Objective
from ddpm_engine.prediction import Prediction
from ddpm_engine.samplers.levels import noise_levels
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_engine.schedule import NoiseSchedule
from ddpm_kernels import Column, Stream, denoising_loss, q_sample, random_integers

if TYPE_CHECKING:
    from ddpm_engine.config import DistillationConfig
    from ddpm_engine.unet import UNet


@dataclass(frozen=True, eq=False)
class Teacher:
    """What a distillation begins with."""

    network: UNet
    """In eval mode; its weights are replaced after each stage."""
    prediction: Prediction
    """What it predicts, until it is replaced."""


@dataclass(frozen=True, eq=False)
class Halving:
    """The tables of one stage; a student's step is a row, or two of the teacher's."""

    teacher: CoefficientTable
    """DDIM in 2N steps."""
    student: CoefficientTable
    """DDIM in N steps."""
    signal: Tensor
    """float64 `[N]`: factor of the image in the state that a student's step begins with."""
    sigma: Tensor
    """float64 `[N]`: factor of the noise."""
    share: Tensor
    """float64 `[N]`: κ, that of the teacher's second estimate in the target."""
    weights: Tensor
    """float64 `[N]`: of the squared error of the student's output."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Halving:
        """The same on a device, in a precision."""

        def moved(table: CoefficientTable) -> CoefficientTable:
            shown = None if table.shown is None else table.shown.to(device, dtype)
            return CoefficientTable(
                table.timesteps.to(device), table.rows.to(device, dtype), shown=shown
            )

        rest = (self.signal, self.sigma, self.share, self.weights)
        return Halving(
            moved(self.teacher), moved(self.student), *(table.to(device, dtype) for table in rest)
        )


def halving(
    schedule: NoiseSchedule, steps: int, prediction: Prediction, teacher: Prediction
) -> Halving:
    """The tables of a stage.

    Args:
        schedule: that both networks know.
        steps: N, of the student.
        prediction: what the student predicts.
        teacher: what its teacher predicts; `"edm"` if and only if the student does.

    Raises:
        UserError: more than T / 2 steps; or ε prediction with zero terminal SNR.
    """
    two = build_table(schedule, "ddim", 2 * steps, prediction=teacher)
    one = build_table(schedule, "ddim", steps, prediction=prediction)
    a, s = (level[:-1] for level in noise_levels(schedule, one.timesteps))
    scale = 1 if one.scale is None else one.scale[:-1]
    truncated_snr = (a / s).square().clamp(min=1)
    return Halving(
        two,
        one,
        signal=scale * a,
        sigma=scale * s,
        # In a row of DDIM, the factor of the estimate is s′ (ρ′ − ρ).
        share=two.rows[1::2, Column.X0] / one.rows[:, Column.X0],
        weights=truncated_snr * one.rows[:, Column.X0_FROM_OUTPUT].square(),
    )


class ProgressiveDistillation(Objective):
    """The error of a student's step against two steps of its teacher.

    Which step of the student a sample trains is uniform, by its position. At the end of a stage the
    averaged weights, which would be sampled from, become the teacher's; so the teacher, whole on
    every rank, is a part of the state.

    Args:
        schedule: the noise schedule.
        prediction: what the student predicts.
        conditions: mirrored images and dropped labels; with the seed of steps and noise.
        teacher: on the device.
        plan: numbers of steps, and guidance.
        training_steps: optimizer steps in all.
        device: where the networks run.
        clip: whether samplers clip estimates of x_0 to [-1, 1].
        dtype: of the tables, and so of the arithmetic.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
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

    def draw(self, positions: Tensor) -> Tensor:
        """Steps of the student, int64 `[B]` in [0, N), for positions int64 `[B]`."""
        steps = self.tables.student.evaluations
        return random_integers(self.conditions.seed, positions, steps, 0, Stream.TRAINING_TIMESTEP)

    def __call__(self, model: Network, batch: Batch) -> Tensor:
        """See `Objective`."""
        conditions, tables = self.conditions, self.tables
        steps = self._here(self.draw(batch.positions))
        images, positions = self._here(batch.images), self._here(batch.positions)
        flips = conditions.flip(batch.positions)
        labels = conditions.labels(batch.positions, batch.labels)
        told = conditions.told(images, batch.positions, labels, flips)
        flip = None if flips is None else self._here(flips)
        x = q_sample(
            images, steps, tables.signal, tables.sigma, self._seed, positions, flip, self.dtype
        )
        x0 = self.target(x, steps, told)
        rows = _rows(tables.student, steps)
        wanted = (x0 - rows[Column.X0_FROM_X] * x) / rows[Column.X0_FROM_OUTPUT]
        output = model(x, _noise(tables.student, steps), *told)
        # What is wanted stands for an image that is predicted itself.
        return denoising_loss(
            output[:, : x.shape[1]], wanted, steps, tables.signal, tables.sigma, self._seed,
            positions, weights=tables.weights[steps], target="x0",
        )  # fmt: skip

    @torch.no_grad()
    def target(self, x: Tensor, steps: Tensor, told: tuple[Tensor | None, ...] = ()) -> Tensor:
        """x̃_0, shaped as `x`: with it the student's step ends where the teacher's two do.

        Args:
            x: the state that each step begins with, `[B, C, H, W]`.
            steps: int64 `[B]`, of the student.
            told: what `Conditions.told` says of the samples.
        """
        first, second = 2 * steps, 2 * steps + 1
        x0 = self._estimate(x, first, told)
        rows = _rows(self.tables.teacher, first)
        between = rows[Column.X] * x + rows[Column.X0] * x0
        share = self.tables.share[steps][:, None, None, None]
        return x0.lerp(self._estimate(between, second, told), share)

    def begin_step(self, step: int, averaged: Averaged) -> None:
        """See `Objective`: with a stage, the teacher changes."""
        stage = self.plan.stage(step, self.training_steps)
        if stage != int(self._stage):
            self.teacher.network.load_state_dict(averaged())
            self._enter(stage)

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`: the stage, int64 `[]`, and the teacher's weights."""
        weights = self.teacher.network.state_dict()
        return {"stage": self._stage, **{f"teacher.{name}": w for name, w in weights.items()}}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Objective`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self._enter(int(self._stage))

    def _enter(self, stage: int) -> None:
        """Prepare for a stage; the teacher is in place."""
        self._stage.fill_(stage)
        known = self.teacher.prediction if stage == 0 else self.prediction
        tables = halving(
            self.schedule, self.plan.student_steps(stage), self.prediction, teacher=known
        )
        self.tables = tables.to(self.device, self.dtype)

    def _estimate(self, x: Tensor, steps: Tensor, told: tuple[Tensor | None, ...]) -> Tensor:
        """The teacher's estimate of x_0 where its own steps, `[B]`, begin."""
        table = self.tables.teacher
        rows = _rows(table, steps)
        output = self._evaluate(x, _noise(table, steps), told)
        x0 = rows[Column.X0_FROM_X] * x + rows[Column.X0_FROM_OUTPUT] * output
        return x0.clamp(-1, 1) if self.clip else x0

    def _evaluate(self, x: Tensor, noise: Tensor, told: tuple[Tensor | None, ...]) -> Tensor:
        """What the teacher predicts, guided if it is to be."""
        network, scale, channels = self.teacher.network, self.plan.guidance_scale, x.shape[1]
        # What guidance does is in the weights after the first stage.
        if scale is None or int(self._stage) > 0:
            return network(x, noise, *told)[:, :channels].to(self.dtype)
        labels, *rest = told
        assert labels is not None, "guidance needs labels"
        null = torch.full_like(labels, self.conditions.null_class or 0)
        doubled = [None if tensor is None else torch.cat([tensor, tensor]) for tensor in rest]
        both = network(
            torch.cat([x, x]), torch.cat([noise, noise]), torch.cat([labels, null]), *doubled
        )
        conditional, unconditional = both[:, :channels].to(self.dtype).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def _noise(table: CoefficientTable, steps: Tensor) -> Tensor:
    """What a network is told of the noise where steps begin: `[B]`."""
    return (table.timesteps if table.shown is None else table.shown)[steps]


def _rows(table: CoefficientTable, steps: Tensor) -> Tensor:
    """Coefficients of steps: `[columns, B, 1, 1, 1]`."""
    return table.rows[steps].T[:, :, None, None, None]
