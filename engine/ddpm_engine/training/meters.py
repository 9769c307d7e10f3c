"""What a run reports: a line or a progress bar for people, metrics.jsonl for programs."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from ddpm_engine.atomic_io import atomic_write

logger = logging.getLogger(__name__)


class MetricsLog:
    """Append-only metrics of one run, kept in step with its checkpoints.

    Args:
        path: the jsonl file, one object a row, each with its `step`.
        start: steps done before; rows beyond them, logged after the checkpoint that the run
            resumed from, are dropped, since they are about to be made again.
        total: steps in all.
        active: whether this rank writes and shows anything.
    """

    def __init__(self, path: Path, start: int, total: int, active: bool) -> None:
        self.path = path
        self.total = total
        self.active = active
        self._bar: tqdm | None = None
        self._waiting = ""
        if not active:
            return
        if path.exists():
            rows = [row for row in path.read_text().splitlines() if _step(row) <= start]
            with atomic_write(path) as file:
                file.write("".join(row + "\n" for row in rows).encode())
        # Unbuffered, so that it is known what has been written when the disk is full.
        self._file = path.open("ab", buffering=0)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def record(self, step: int, values: dict[str, float], seconds_a_step: float) -> None:
        """Write one row, and show it; rows that find no room are kept and written with the next."""
        if not self.active:
            return
        self._waiting += json.dumps({"step": step, **values, "time": time.time()}) + "\n"
        self._write()
        shown = (
            f"loss {values['loss']:.4f}  grad {values['grad_norm']:.3f}  "
            f"lr {values['learning_rate']:.2e}  {values['images_per_second']:.0f} images/s  "
            f"data wait {values['data_wait_percent']:.1f}%  seen {values['samples_seen']:,.0f}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        else:
            left = timedelta(seconds=round((self.total - step) * seconds_a_step))
            logger.info("step %d/%d  %s  eta %s", step, self.total, shown, left)

    def _write(self) -> None:
        try:
            while self._waiting:
                written = self._file.write(self._waiting.encode())
                self._waiting = self._waiting[written:]  # JSON is ASCII
        except OSError as error:
            logger.error("%s cannot be written: %s. Training goes on", self.path, error)

    def close(self) -> None:
        """End the bar and the file."""
        if self.active:
            self._file.close()
        if self._bar is not None:
            self._bar.close()


def _step(row: str) -> float:
    """The step of a row; a row cut short by a crash counts as beyond every step."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
