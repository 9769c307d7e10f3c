"""The training loop."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from ddpm_engine.atomic_io import atomic_write, discard
from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.data.loader import BatchPositions, explained_deaths, make_batches
from ddpm_engine.distributed import is_main, rank, world_size
from ddpm_engine.errors import UserError
from ddpm_engine.training.build import build_callbacks, build_run
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run, Values
from ddpm_engine.training.saving import explain_end, resume
from ddpm_engine.training.signals import Stopped, StopRequest, stop_on_signals
from ddpm_engine.training.step import TrainingStep

logger = logging.getLogger(__name__)

REQUEUE_MARKER = "requeue"
"""Name of the file in the run directory that marks an interrupted run to be requeued."""

STEPS_UNTIL_FROZEN = 100
"""Step, counted from the start of the process, after which garbage collection skips all objects
that exist by then. Most of them last as long as the run, and a full collection of them takes as
long as several steps."""


class Trainer:
    """One training run on this process's share of the hardware (Ho et al. 2020, algorithm 1).

    Args:
        config: the run. Its directory is made, or continued if it holds the same run.
        callbacks: what happens besides stepping, in addition to `build_callbacks(config)`; the same
            on every rank.
        dtype: of the weights and of the objective's arithmetic.
        any_precision: run in a precision that this hardware emulates slowly, instead of refusing.

    Raises:
        UserError: the configuration, the data, the directory or the launch is wrong.
    """

    def __init__(
        self,
        config: RunConfig,
        callbacks: Sequence[Callback] = (),
        *,
        dtype: torch.dtype = torch.float32,
        any_precision: bool = False,
    ) -> None:
        self.run: Run = build_run(config, dtype=dtype, any_precision=any_precision)
        self.callbacks = [*build_callbacks(self.run.config), *callbacks]
        self.run.on_log = partial(_log, self.callbacks)
        self.run.on_measured = partial(_measured, self.callbacks)

    def fit(self) -> None:
        """Train to the last step, or until a signal asks to stop; resume if there is a checkpoint.

        Raises:
            UserError: gradients stay non-finite, too many samples are unreadable, or the last
                checkpoint or another last file of the run cannot be written.
        """
        run = self.run
        resume(run)
        marker = run.config.out / REQUEUE_MARKER
        if is_main():
            discard(marker)
        if run.finished:
            logger.info("%s is already trained to step %d", run.config.out, run.step)
            for callback in self.callbacks:
                callback.on_finished(run)
            self._leave()
            return
        for callback in self.callbacks:
            callback.on_start(run)
        with stop_on_signals() as stop, run.watchdog, explained_deaths():
            try:
                self._loop(stop)
            except UserError as error:
                self._end(error)
                raise explain_end(run, error) from error
            except BaseException as error:
                self._end(error)
                raise
            self._end(None)
        if run.changed < run.step:
            logger.warning(
                "the last %d steps were skipped, so the weights are those of step %d; a run that "
                "goes on like this has diverged", run.step - run.changed, run.changed,
            )  # fmt: skip
        main = is_main()  # of a group that is left, every rank would be the first
        self._leave()
        if run.interrupted:
            if main:
                self._mark(marker)
            logger.info("stopped at step %d; run the same command to go on", run.step)

    def _end(self, error: BaseException | None) -> None:
        with ExitStack() as endings:  # all of them, even if one raises
            endings.callback(gc.unfreeze)
            for callback in reversed(self.callbacks):
                endings.callback(callback.on_end, self.run, error)

    def _mark(self, marker: Path) -> None:
        """Ask whoever started the run to start it again."""
        try:
            with atomic_write(marker) as file:
                file.write(f"stopped at step {self.run.step}\n".encode())
        except OSError as error:
            raise UserError(
                f"the run is saved at step {self.run.step}, but {marker}, which asks for another "
                f"start, cannot be written: {error}"
            ) from None

    def _loop(self, stop: StopRequest) -> None:
        """Step until the run is finished or interrupted."""
        run, first = self.run, self.run.step
        step = TrainingStep(run, self._batches(), stop)
        while not run.finished and not run.interrupted:
            for callback in self.callbacks:
                callback.on_step_begin(run)
            # The first step compiles, and reads data that may have to be fetched from afar.
            try:
                step.take(limited=run.step > first)
            except Stopped:
                run.stops_at = run.step
                run.settle()
                if run.step > first:
                    for callback in self.callbacks:
                        callback.on_stop(run)
                return
            if run.step == first + STEPS_UNTIL_FROZEN:
                gc.collect()
                gc.freeze()
            if run.finished or run.interrupted:
                run.settle()
            for callback in self.callbacks:
                callback.on_step_end(run)

    def _batches(self) -> Iterator[Batch]:
        """Micro-batches of this rank, from the next step on."""
        run, training = self.run, self.run.config.training
        positions = BatchPositions(
            training.batch_size,
            rank(),
            world_size(),
            training.accumulation,
            start_step=run.step,
            end_step=training.steps,
        )
        workers = run.config.data.workers
        return make_batches(run.dataset, positions, workers, pin_memory=run.device.type == "cuda")

    def _leave(self) -> None:
        """Leave the other ranks; not after an error, when those that had left would be awaited."""
        self.run.strategy.close()
        self.run.accelerator.state.destroy_process_group()


def _log(callbacks: Sequence[Callback], run: Run, step: int, values: Values) -> None:
    for callback in callbacks:
        callback.on_log(run, step, values)


def _measured(callbacks: Sequence[Callback], run: Run, step: int, values: Values) -> None:
    for callback in callbacks:
        callback.on_measured(run, step, values)
