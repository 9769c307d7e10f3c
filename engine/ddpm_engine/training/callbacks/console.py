"""Progress for people: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from datetime import timedelta

from tqdm import tqdm

from ddpm_engine.distributed import is_main
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run, Values

logger = logging.getLogger(__name__)


class Console(Callback):
    """Show progress on rank 0."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_start(self, run: Run) -> None:
        """See `Callback`."""
        if is_main() and sys.stderr.isatty():
            steps = run.config.training.steps
            self._bar = tqdm(total=steps, initial=run.step, unit="step", dynamic_ncols=True)

    def on_step_end(self, run: Run) -> None:
        """See `Callback`."""
        if self._bar is not None:
            self._bar.update()

    def on_log(self, run: Run, step: int, values: Values) -> None:
        """See `Callback`."""
        if not is_main():
            return
        speed = values["images_per_second"] or 0.0
        line = (
            f"loss {_number(values['loss'], '.4f')}  grad {_number(values['grad_norm'], '.3f')}  "
            f"lr {values['learning_rate']:.2e}  {speed:.0f} images/s  "
            f"data wait {values['data_wait_percent']:.1f}%  seen {values['samples_seen']:,.0f}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(line)
            return
        training = run.config.training
        images_left = (training.steps - step) * training.batch_size
        eta = timedelta(seconds=round(images_left / speed))
        logger.info("step %d/%d  %s  eta %s", step, training.steps, line, eta)

    def on_measured(self, run: Run, step: int, values: Values) -> None:
        """See `Callback`."""
        if is_main():
            line = "  ".join(f"{name} {_number(value, '.4g')}" for name, value in values.items())
            logger.info("step %d/%d  %s", step, run.config.training.steps, line)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """See `Callback`."""
        if self._bar is not None:
            self._bar.close()


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
