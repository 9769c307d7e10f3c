"""Configuration of the objective and of distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddpm_engine.samplers.config import SamplingConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimises."""

    weighting: Literal["simple", "vlb", "min-snr", "p2"] = "simple"
    """Weight of each timestep's squared error; simple: all alike."""
    min_snr_gamma: float = 5.0
    """min-snr: the signal-to-noise ratio beyond which timesteps weigh no more."""
    p2_gamma: float = 1.0
    """p2: how strongly timesteps of little noise are weighed down."""
    p2_k: float = 1.0
    """p2: the signal-to-noise ratio from which on they are."""
    learned_variance: bool = False
    """Learn the variance of each step too, from the bound: the hybrid objective."""
    timestep_sampling: Literal["uniform", "logit-normal", "importance"] = "uniform"
    """How often each timestep is trained; importance: by how much its loss varies."""
    logit_mean: float = 0.0
    """logit-normal: mean of log(t / (T − t))."""
    logit_std: float = 1.0
    """logit-normal: standard deviation of log(t / (T − t))."""
    offset_noise: float = 0.0
    """Standard deviation of noise added to each channel as a whole; images span −1 to 1."""
    p_mean: float = -1.2
    """edm prediction: mean of the log of the noise levels sigma that are trained."""
    p_std: float = 1.2
    """edm prediction: standard deviation of that log."""


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
    """Learn two steps of the last student at a time, to agree with oneself one step later, or to
    draw what the teacher expects."""
    steps: int = 4
    """Steps that the last student draws a picture in: of ddim, or with `moments`, of ddpm."""
    start_steps: int = 64
    """Most steps of ddim that a teacher takes: a power of two times as many; with `moments`, as
    many."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the teacher, which its students then have built in; None: none.
    """
    student: Path | None = None
    """Run that has been distilled to as many steps, to go on from with `moments`."""

    @property
    def sampling(self) -> SamplingConfig:
        """How the last student draws."""
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
