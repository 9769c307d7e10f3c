"""metrics.jsonl: what a run logged, for programs."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.distributed import is_main, raise_together
from ddpm_engine.errors import UserError
from ddpm_engine.json_files import to_json
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run, Values

logger = logging.getLogger(__name__)


class JsonLines:
    """An append-only file of one JSON object per row, each with its `step`.

    Args:
        path: the file, made if missing.
        start: steps done before; rows beyond them were logged after the checkpoint that the run
            resumed from. They are dropped, since those steps are taken again.

    Raises:
        OSError: the file cannot be read or opened.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self._pending = b""
        if path.exists():
            rows = [row for row in path.read_text().splitlines() if _step_of(row) <= start]
            with atomic_write(path) as file:
                file.write("".join(row + "\n" for row in rows).encode())
        # Unbuffered, so that it is known what has been written when the disk is full.
        self._file = path.open("ab", buffering=0)

    def append(self, step: int, values: Values) -> None:
        """Write a row; on a full disk it is kept and written before the next."""
        self._pending += to_json({"step": step, **values, "time": time.time()}).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            logger.error("%s cannot be written: %s. Training goes on", self.path, error)

    def flush(self) -> None:
        """Write the rows that could not be written before.

        Raises:
            OSError: they still cannot.
        """
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsFile(Callback):
    """Append log lines and what is measured to `metrics.jsonl` in the run directory, on rank 0."""

    def __init__(self) -> None:
        self._rows: JsonLines | None = None

    def on_start(self, run: Run) -> None:
        """See `Callback`.

        Raises:
            UserError: the file cannot be read or written.
        """
        path = run.config.out / "metrics.jsonl"
        with raise_together(UserError):
            if is_main():
                try:
                    self._rows = JsonLines(path, run.step)
                except OSError as error:
                    raise UserError(f"{path} cannot be written: {error}") from None

    def on_log(self, run: Run, step: int, values: Values) -> None:
        """See `Callback`."""
        if self._rows is not None:
            self._rows.append(step, values)

    def on_measured(self, run: Run, step: int, values: Values) -> None:
        """See `Callback`."""
        self.on_log(run, step, values)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """See `Callback`.

        Raises:
            UserError: the run is saved, but rows are missing from the file, which no other start
                would write.
        """
        if self._rows is None:
            return
        try:
            self._rows.flush()
        except OSError as failure:
            message = f"{self._rows.path} lacks the last rows of this run: {failure}"
            if error is None:
                raise UserError(f"{message}. The run itself is saved, at step {run.step}") from None
            logger.error("%s", message)
        finally:
            self._rows.close()


def _step_of(row: str) -> float:
    """The step of a row; a row cut short by a crash counts as beyond every step."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
