"""A run in force: what its configuration has become on this process, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import BinaryIO

import torch
from accelerate import Accelerator

from ddpm_engine.config import RunConfig
from ddpm_engine.data.classes import ClassNames
from ddpm_engine.data.open import TrainingData
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.distributed import Ranks
from ddpm_engine.objectives.base import Objective
from ddpm_engine.training.lr_schedule import learning_rate
from ddpm_engine.training.meters import Meters
from ddpm_engine.training.strategies.strategy import Strategy
from ddpm_engine.training.watchdog import Watchdog


@dataclass
class Run:
    """What a training step and the callbacks work on; `build_run` makes one.

    The state to save is the strategy's, the objective's and the counters here. Data order and all
    noise follow from the seed and the step.
    """

    config: RunConfig
    accelerator: Accelerator
    dataset: TrainingData
    schedule: NoiseSchedule
    objective: Objective
    strategy: Strategy
    watchdog: Watchdog
    lock: BinaryIO | None
    """Lock of the run directory, held until the file is closed; None on all ranks but the first."""
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0
    """Optimizer steps done."""
    start: int = 0
    """Those done when this process started."""
    meters: Meters = field(default_factory=Meters)
    bad_steps: int = 0
    """Steps in a row, since this start, whose gradient was not finite."""
    changed: int = 0
    """Step that last changed the weights; all steps after it were skipped."""
    bad_samples: int = 0
    """Unreadable samples that were replaced, on all ranks."""
    failed_checkpoints: int = 0
    """Checkpoints and snapshots that could not be written since this start."""
    stop_requested: bool = False
    """A signal has asked any rank to stop; the same on all ranks."""

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.accelerator.device

    @property
    def classes(self) -> ClassNames | None:
        """Names of the classes that the network is trained on, if it is and they have names."""
        return None if self.config.model.num_class_embeds is None else self.dataset.classes

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.config.training.steps

    @property
    def interrupted(self) -> bool:
        """Whether the run ends here, before its last step."""
        return self.stop_requested and not self.finished

    def take_report(self) -> dict[str, float | None]:
        """Values to log, averaged since the last call; the meters start again.

        The loss and the gradient norm are None if all steps were skipped, or if one is infinite.
        """
        meters, self.meters = self.meters, Meters()
        batch_size = self.config.training.batch_size
        return {
            "loss": meters.mean_loss,
            "grad_norm": meters.mean_grad_norm,
            "learning_rate": learning_rate(self.config, self.step - 1),
            "samples_seen": self.step * batch_size,
            "skipped_steps": meters.skipped,
            "bad_samples": self.bad_samples,
            "failed_checkpoints": self.failed_checkpoints,
            "images_per_second": meters.steps_per_second * batch_size,
            "data_wait_percent": meters.data_wait_percent,
            "checkpoint_stall_seconds": meters.checkpoint_stall_seconds,
            "checkpoint_write_seconds": meters.checkpoint_write_seconds,
        }
