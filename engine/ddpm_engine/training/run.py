"""A run in force: what its configuration has become on this process, and how far it has come."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import torch
from accelerate import Accelerator

from ddpm_engine.config import RunConfig
from ddpm_engine.data.classes import ClassNames
from ddpm_engine.data.open import TrainingData
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.distributed import Ranks, world_size
from ddpm_engine.errors import NotFiniteError, UserError
from ddpm_engine.graphs import Capture
from ddpm_engine.images.data_codec import Codec, PixelCodec
from ddpm_engine.locations import redacted
from ddpm_engine.objectives.base import Objective
from ddpm_engine.training.latents import RunLatents
from ddpm_engine.training.lr_schedule import learning_rate
from ddpm_engine.training.meters import Meters
from ddpm_engine.training.reports import Report, Reports
from ddpm_engine.training.strategies.strategy import Strategy
from ddpm_engine.training.text import RunText
from ddpm_engine.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

Values = Mapping[str, float | None]
"""Values of a log line."""


@dataclass
class Run:
    """What a training step and the callbacks work on; `build_run` makes one.

    The state to save is the strategy's, the objective's and the counters here. Data order and all
    noise follow from the seed and the step.

    `step` counts the steps that the device has been given. What follows from their outcome (the
    meters, `bad_steps`, `changed`, `bad_samples` and `stops_at`) is one step behind until `settle`
    is called.
    """

    config: RunConfig
    accelerator: Accelerator
    dataset: TrainingData
    schedule: NoiseSchedule
    objective: Objective
    strategy: Strategy
    watchdog: Watchdog
    reports: Reports
    """What steps report to the host."""
    capture: Capture | None
    """Records a step as a graph; None: every step is run anew."""
    lock: BinaryIO | None
    """Lock of the run directory, held until the file is closed; None on all ranks but the first."""
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0
    """Optimizer steps done, the one under way on the device included."""
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
    stops_at: int | None = None
    """Step after which the run stops, since a signal has asked any rank to; the same on all ranks.
    """
    text: RunText | None = None
    """What encodes its captions; None: the network is not conditioned on text."""
    latents: RunLatents | None = None
    """The latents that are diffused; None: images are."""
    on_log: Callable[[Run, int, Values], None] = lambda run, step, values: None
    """Is given every log line: the run, the step and the values."""
    on_measured: Callable[[Run, int, Values], None] = lambda run, step, values: None
    """Is given what callbacks measure, likewise."""

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.accelerator.device

    @property
    def codec(self) -> Codec:
        """What stands between images and what is diffused."""
        return PixelCodec() if self.latents is None else self.latents.codec

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
        return self.stops_at is not None and self.step >= self.stops_at and not self.finished

    def measured(self, values: Values) -> None:
        """Report what a callback has measured of the model as it is; all ranks call this together.

        Args:
            values: by name, the same on every rank.
        """
        self.on_measured(self, self.step, values)

    def settle(self, but: int = 0) -> None:
        """Read what steps have reported, and count it; all ranks call this together.

        Everything that needs exact counters calls it first: whoever saves the run's state does.

        Args:
            but: number of steps, the last ones, that need not have ended yet.

        Raises:
            NotFiniteError: gradients stay non-finite.
            UserError: too many samples are unreadable.
        """
        while len(self.reports) > but:
            started = time.perf_counter()
            report = self.reports.read()
            self.meters.add_time(time.perf_counter() - started)
            self._count(report)
            last = self.config.training.steps
            if report.step % self.config.log.every == 0 or report.step == last:
                self.on_log(self, report.step, self._take_values(report.step))

    def _count(self, report: Report) -> None:
        """Count what became of a step."""
        if report.stops and self.stops_at is None:
            # No earlier, even if this is known earlier: the step may be under way.
            self.stops_at = report.step + 1
        self._count_bad_samples(report.replaced)
        # The norm is the same on every rank, so all of them decide alike.
        loss = report.loss_sum / world_size()
        if report.finite:
            self.meters.add(loss, report.grad_norm)
            self.bad_steps, self.changed = 0, report.step
        else:
            self._count_bad_step(report.step, loss, report.grad_norm)

    def _count_bad_step(self, step: int, loss: float, norm: float) -> None:
        """Report a step that was skipped; too many in a row end the run."""
        self.bad_steps += 1
        self.meters.skipped += 1
        training = self.config.training
        last = step * training.batch_size - 1
        first = last + 1 - training.batch_size
        logger.warning(
            "step %d is skipped: loss %s, gradient norm %s; samples at positions %d to %d",
            step, loss, norm, first, last,
        )  # fmt: skip
        if self.bad_steps >= training.max_bad_steps:
            raise NotFiniteError(
                f"the gradient was not finite for {self.bad_steps} steps in a row, lastly at step "
                f"{step} (loss {loss}, positions {first} to {last}). Lower "
                f"`optimizer.learning_rate` ({self.config.optimizer.learning_rate}) or let "
                f"`training.precision` be no ({training.precision})"
            )

    def _count_bad_samples(self, replaced: int) -> None:
        """Count the samples that all ranks replaced in a step; too many end the run."""
        self.bad_samples += replaced
        data = self.config.data
        if self.bad_samples > data.max_bad_samples:
            raise UserError(
                f"{self.bad_samples} samples of {redacted(str(data.path))} were unreadable (each "
                f"is named above), more than `data.max_bad_samples` {data.max_bad_samples}. Verify "
                "the shards, and pack them again",
                "data.max_bad_samples",
            )

    def _take_values(self, step: int) -> Values:
        """Values to log of a step, averaged since the last call; the meters start again.

        The loss and the gradient norm are None if all steps were skipped, or if one is infinite.
        """
        meters, self.meters = self.meters, Meters()
        batch_size = self.config.training.batch_size
        return {
            "loss": meters.mean_loss,
            "grad_norm": meters.mean_grad_norm,
            "learning_rate": learning_rate(self.config, step - 1),
            "samples_seen": step * batch_size,
            "skipped_steps": meters.skipped,
            "bad_samples": self.bad_samples,
            "failed_checkpoints": self.failed_checkpoints,
            "images_per_second": meters.steps_per_second * batch_size,
            "data_wait_percent": meters.data_wait_percent,
            "checkpoint_stall_seconds": meters.checkpoint_stall_seconds,
            "checkpoint_write_seconds": meters.checkpoint_write_seconds,
        }
