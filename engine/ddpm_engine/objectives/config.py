"""Configuration of the objective, of distillation and of autoencoders' training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ddpm_engine.bounds import Ge, Gt, Le, out_of_bounds
from ddpm_engine.diffusion.parameterization import Prediction
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.config import SamplingConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimises."""

    weighting: Literal["simple", "vlb", "min-snr", "p2"] = "simple"
    """Weight of each timestep's squared error; simple: all alike."""
    min_snr_gamma: Annotated[float, Gt(0)] = 5.0
    """Signal-to-noise ratio at which min-snr weights are clamped, positive."""
    p2_gamma: Annotated[float, Ge(0), Le(100)] = 1.0
    """Exponent of p2 weights, 0 (all alike) or more: how much less timesteps of little noise count.
    """
    p2_k: Annotated[float, Gt(0)] = 1.0
    """Signal-to-noise ratio, positive, from which on p2 weights fall."""
    loss: Prediction | None = None
    """Prediction whose squared error is the loss, such as flow where x0 is predicted (Li & He
    2025); None: that of the network."""
    loss_limit: Annotated[float, Gt(0)] | None = None
    """Largest weight of the squared error of x0 in that loss, positive, such as 400 in flow's,
    which is 1 / tau^2; None: none."""
    learned_variance: bool = False
    """Variance of each step learned too, from the bound: the hybrid objective."""
    timestep_sampling: Literal["uniform", "logit-normal", "importance"] = "uniform"
    """Distribution of the timesteps that are trained, with flow prediction of the share of noise;
    importance: by how much the loss varies."""
    logit_mean: Annotated[float, Ge(-100), Le(100)] = 0.0
    """Mean of log(t / (T − t)) in logit-normal timestep sampling."""
    logit_std: Annotated[float, Gt(0), Le(100)] = 1.0
    """Standard deviation of log(t / (T − t)) in logit-normal timestep sampling, positive."""
    offset_noise: Annotated[float, Ge(0), Le(100)] = 0.0
    """Standard deviation of noise added to each channel as a whole; images span −1 to 1."""
    p_mean: Annotated[float, Ge(-20), Le(20)] = -1.2
    """Mean of ln sigma over the noise levels that are trained, with edm prediction."""
    p_std: Annotated[float, Gt(0), Le(20)] = 1.2
    """Standard deviation of ln sigma over those noise levels, positive."""

    def problems(self) -> Iterator[UserError]:
        """Report everything wrong with the values themselves."""
        return out_of_bounds(self)


@dataclass(frozen=True)
class AutoencodingConfig:
    """What the training of an autoencoder minimises, besides the error of reconstructions."""

    kl_weight: Annotated[float, Ge(0), Le(1e6)] = 1e-4
    """Weight of the divergence of latents from normal noise, in nats a latent, beside the mean
    absolute error of values from -1 to 1."""

    def problems(self) -> Iterator[UserError]:
        """Report everything wrong with the values themselves."""
        return out_of_bounds(self)


DistillationMethod = Literal["progressive", "consistency", "moments"]


@dataclass(frozen=True)
class DistillationConfig:
    """Learning to take one step where the teacher takes many.

    A run is divided into stages of equal length. In those of `progressive` distillation the student
    takes half as many steps as before and is the next stage's teacher; in those of `consistency`
    distillation the teacher takes twice as many. `moments` has one stage, and no steps of its
    teacher: it makes a student of another method better.
    """

    teacher: Path | None = None
    """Run, checkpoint or diffusers folder to distil; None: ordinary training."""
    method: DistillationMethod = "progressive"
    """Method: two steps of the last student learned as one; consistency with oneself one step
    later; or, from a student of these, the teacher's conditional moments."""
    steps: Annotated[int, Ge(1)] = 4
    """Steps of a sample of the last student: of ddim, or with moments, of ddpm."""
    start_steps: Annotated[int, Ge(1)] = 64
    """Steps of ddim that the first teacher takes, 2, 4, 8, … times as many; with moments, as
    many."""
    guidance_scale: Annotated[float, Ge(-1000), Le(1000)] | None = None
    """Guidance scale of the teacher, which its students then have built in; None: no guidance."""
    student: Path | None = None
    """Run that has been distilled to as many steps, which moments continues."""

    def problems(self) -> Iterator[UserError]:
        """Report everything wrong with the values, and with their combination if it distils."""
        bounds = list(out_of_bounds(self))
        yield from bounds
        if bounds or self.teacher is None:
            return
        if self.method == "moments":
            if self.start_steps != self.steps:
                yield UserError(
                    f"`start_steps` is {self.start_steps} and `steps` {self.steps}; moments takes "
                    "no more of its teacher, so both must be the same",
                    "start_steps",
                )
            if self.student is None:
                yield UserError(
                    "`method` is moments, which goes on from a student; distil the teacher to "
                    f"{self.steps} steps by progressive distillation first, and name that run with "
                    "`student`",
                    "student",
                )
            return
        if self.stages < 1 or self.start_steps != self.steps << self.stages:
            yield UserError(
                f"`start_steps` is {self.start_steps} and `steps` {self.steps}; the first must be "
                "2, 4, 8, … times the second, as 64 and 4",
                "start_steps",
            )
        if self.student is not None:
            yield UserError(
                f"`student` is {self.student}, but students of {self.method} distillation begin "
                "as their teacher; leave it out, or choose the `method` moments",
                "student",
            )

    @property
    def sampling(self) -> SamplingConfig:
        """Sampling configuration of the final student."""
        if self.method == "moments":
            return SamplingConfig("ddpm", self.steps, "trailing", "fixed_small")
        return SamplingConfig("ddim", self.steps, "trailing")

    @property
    def stages(self) -> int:
        """How often the number of steps is halved, or doubled; or 1."""
        if self.method == "moments":
            return 1
        return (self.start_steps // self.steps).bit_length() - 1

    def stage(self, step: int, training_steps: int) -> int:
        """The stage, from 0, that optimizer step `step` of `training_steps` belongs to."""
        return step * self.stages // training_steps

    def student_steps(self, stage: int) -> int:
        """Steps of ddim that a stage's student takes."""
        return self.start_steps >> (stage + 1) if self.method == "progressive" else self.steps

    def teacher_steps(self, stage: int) -> int:
        """Steps of ddim that a stage's teacher takes."""
        return (
            self.start_steps >> stage if self.method == "progressive" else 2 * self.steps << stage
        )

    def annealing(self, step: int, training_steps: int) -> float:
        """Factor of the learning rate: from 1 linearly towards 0, or 1 if nothing is distilled.

        With each new teacher of `progressive` it begins again, as in Salimans & Ho 2022.
        """
        if self.teacher is None:
            return 1.0
        repeats = self.stages if self.method == "progressive" else 1
        return 1 - step * repeats % training_steps / training_steps
