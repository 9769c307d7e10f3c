"""Experiment trackers, through Accelerate's adapters."""

from __future__ import annotations

import logging

from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run, Values

logger = logging.getLogger(__name__)


class Trackers(Callback):
    """Send every log line to the tracker that `log.tracker` names."""

    def on_start(self, run: Run) -> None:
        """See `Callback`."""
        # Entries beyond the checkpoint resumed from are hidden: those steps are taken again.
        run.accelerator.init_trackers(
            "tensorboard", init_kwargs={"tensorboard": {"purge_step": run.step + 1}}
        )

    def on_log(self, run: Run, step: int, values: Values) -> None:
        """See `Callback`."""
        known = {name: value for name, value in values.items() if value is not None}
        try:
            run.accelerator.log(known, step=step)
        except OSError as error:
            logger.error("the tracker cannot write: %s. Training goes on", error)

    def on_measured(self, run: Run, step: int, values: Values) -> None:
        """See `Callback`."""
        self.on_log(run, step, values)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """See `Callback`."""
        for tracker in run.accelerator.trackers:
            try:
                tracker.finish()
            except OSError as failure:
                logger.error(
                    "the tracker's last entries are lost: %s; metrics.jsonl has them", failure
                )
