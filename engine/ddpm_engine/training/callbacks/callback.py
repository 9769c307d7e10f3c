"""The points of a run at which callbacks are called."""

from __future__ import annotations

from ddpm_engine.training.run import Run, Values


class Callback:
    """Something that happens besides stepping; inherit it and define the methods that are needed.

    Every rank has the same callbacks in the same order and calls each method at the same step, so
    a method may use collectives. An exception ends the run.
    """

    def on_start(self, run: Run) -> None:
        """Prepare, once: the run has resumed and at least one step is left."""

    def on_step_begin(self, run: Run) -> None:
        """Act before an optimizer step; `run.step` steps are done."""

    def on_log(self, run: Run, step: int, values: Values) -> None:
        """Report the values of a log line: means since the line before, and counters.

        There is one every `log.every` steps and of the last. It is known when the host reads what
        the step has reported: one step later, or as soon as anything calls `run.settle()`, as
        saving does; of the last step before `on_step_end`.

        Args:
            run: the run, which may be a step further.
            step: the line is of this step.
            values: by name. A mean is None if there is nothing to take it of, because every step
                was skipped.
        """

    def on_measured(self, run: Run, step: int, values: Values) -> None:
        """Report what another callback has measured of the model, and given to `run.measured`.

        Args:
            run: the run.
            step: optimizer steps that the measured weights have done.
            values: by name, the same on every rank.
        """

    def on_step_end(self, run: Run) -> None:
        """Act after an optimizer step has been started; `run.step` counts it.

        What is done on the device comes after the step. The counters of the run are those of the
        step before, until `run.settle()` is called, which waits for the device.

        `run.finished` and `run.interrupted` are True after the last step of this process, whose
        counters are settled.
        """

    def on_stop(self, run: Run) -> None:
        """Save what would be lost: the run stops while it waits for the data of its next step.

        `on_step_end` was called when nobody had asked to stop.
        """

    def on_finished(self, run: Run) -> None:
        """Do what an earlier start could not: the run has resumed and no step is left.

        Called instead of all other methods.
        """

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Release what `on_start` took, however training ended.

        Args:
            run: the run.
            error: exception that ended training; None: it is finished, or was asked to stop.
        """
