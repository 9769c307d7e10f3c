"""Saving while training goes on: checkpoints, and snapshots of the power-function averages."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
import torch.distributed as dist

from ddpm_engine.checkpoints.recorded_config import record
from ddpm_engine.checkpoints.store import SNAPSHOTS, CheckpointStore, check_sizes
from ddpm_engine.errors import UserError
from ddpm_engine.training.async_save import BackgroundSaver, Saved
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_engine.training.saving import checkpoint_store, embedders_of, parts_of, state_of
from ddpm_engine.training.strategies.strategy import State

logger = logging.getLogger(__name__)


class _Saving(Callback):
    """One kind of save: at most one is in flight, and training goes on until the next is due.

    Waiting any earlier would gain nothing. Whoever is killed during a write has lost the time since
    the step that the last whole save is of, whether it has been trained or waited meanwhile; and
    one copy of the state is in memory either way.

    A save that fails is reported, and training goes on, since there will be another. The last of a
    process is tried once more, and its failure ends the run.
    """

    kind: str
    """`checkpoint` or `snapshot`, for messages."""
    _saver: BackgroundSaver | None = None

    def on_step_begin(self, run: Run) -> None:
        """See `Callback`: report the save in flight, if it is done."""
        self._report(run, wait=False)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """See `Callback`: a `UserError` ends the run too, but not half-way through a save."""
        if isinstance(error, UserError):
            try:
                self._report(run)
            except UserError as another:
                logger.error("%s", another)

    def _start(self, run: Run, what: str, parts: State, state: dict[str, Any]) -> None:
        """Copy the tensors and begin to write them."""
        assert self._saver is not None, "on_start came first"
        self._report(run)
        started = time.perf_counter()
        run.watchdog.doing(f"copying the {what} of step {run.step}", limited=False)
        self._saver.start(run.step, parts, state)
        run.meters.checkpoint_stall_seconds += time.perf_counter() - started

    def _report(self, run: Run, wait: bool = True) -> None:
        """Report the save in flight, if there is one, when it is done."""
        if self._saver is None or self._saver.step is None:
            return
        if wait:
            what = f"saving the {self.kind} of step {self._saver.step}"
            run.watchdog.doing(what, limited=False)
        started = time.perf_counter()
        saved = self._saver.finished(wait)
        run.meters.checkpoint_stall_seconds += time.perf_counter() - started
        if saved is not None and not self._count(run, saved):
            logger.error(
                "%s of step %d failed (failure %d of this run): %s. Training goes on; "
                "older %ss are untouched",
                self.kind, saved.step, run.failed_checkpoints, saved.error, self.kind,
            )  # fmt: skip

    def _finish(self, run: Run) -> None:
        """Wait for the last save of this process, of which there will be no other.

        Raises:
            UserError: it failed, and failed again.
        """
        if self._saver is None or self._saver.step is None:
            return
        run.watchdog.doing(f"saving the {self.kind} of step {self._saver.step}", limited=False)
        saved = self._saver.finish()
        if saved is not None and not self._count(run, saved):
            raise UserError(
                f"the {self.kind} of step {saved.step}, the last of this run so far, could not be "
                f"written, and neither when it was tried again: {saved.error}"
            )

    def _count(self, run: Run, saved: Saved) -> bool:
        """Count a save; return whether it succeeded."""
        run.meters.checkpoint_write_seconds += saved.seconds
        run.failed_checkpoints += saved.error is not None
        return saved.error is None


class Checkpoints(_Saving):
    """Save the state every `log.checkpoint_every` steps, after the last, and when asked to stop."""

    kind = "checkpoint"

    def on_start(self, run: Run) -> None:
        """See `Callback`."""
        store = checkpoint_store(run.config, _group_for_saving())
        # Whatever this start has changed about the run, it can be changed back.
        store.protected = {run.start}
        self._saver = BackgroundSaver(store)

    def on_step_end(self, run: Run) -> None:
        """See `Callback`.

        Raises:
            UserError: the last save of this process failed twice.
        """
        ending = run.finished or run.interrupted
        if ending or run.step % run.config.log.checkpoint_every == 0:
            self._start(run, "state", parts_of(run), state_of(run))
        if ending:
            self._finish(run)

    def on_stop(self, run: Run) -> None:
        """See `Callback`.

        Raises:
            UserError: the last save of this process failed twice.
        """
        self.on_step_end(run)


class Snapshots(_Saving):
    """Save the power-function averages every `log.snapshot_every` steps and after the last."""

    kind = "snapshot"

    def on_start(self, run: Run) -> None:
        """See `Callback`."""
        directory = run.config.out / SNAPSHOTS
        store = CheckpointStore(directory, keep_every=1, group=_group_for_saving())
        self._saver = BackgroundSaver(store)

    def on_step_end(self, run: Run) -> None:
        """See `Callback`.

        Raises:
            UserError: the last save of this process failed twice.
        """
        if run.finished or run.step % run.config.log.snapshot_every == 0:
            averages = {n: part for n, part in run.strategy.averages().items() if n != "ema"}
            state = {
                "config": record(run.config), "classes": run.classes, **embedders_of(run)
            }  # fmt: skip
            self._start(run, "averages", averages, state)
        if run.finished or run.interrupted:
            self._finish(run)

    def on_stop(self, run: Run) -> None:
        """See `Callback`.

        Raises:
            UserError: the last save of this process failed twice.
        """
        self._finish(run)

    def on_finished(self, run: Run) -> None:
        """See `Callback`: write the last snapshot, unless it is there.

        Raises:
            UserError: that failed twice.
        """
        there = check_sizes(run.config.out / SNAPSHOTS / f"step-{run.step:08d}")[0] is not None
        if not run.ranks.sum(torch.tensor(float(there), device=run.device)).item():
            self.on_start(run)
            self.on_step_end(run)


def _group_for_saving() -> dist.ProcessGroup | None:
    """A process group that nothing else uses: saves talk over it while training goes on."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None
