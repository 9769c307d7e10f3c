"""Writing beside computing: a thread that takes one task after the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from ddpm_engine.errors import UserError

logger = logging.getLogger(__name__)

_WAITING = 1
"""Tasks that wait for the one at work; whoever has more waits too, so that memory is bounded."""


class Writer:
    """Runs tasks in their order, in one thread, while the caller computes what comes next.

    As a context manager it waits for all of them, also where the block fails: what was handed over
    is written. Errors are raised at the next call, in the order of the tasks.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writer")
        self._places = threading.Semaphore(1 + _WAITING)
        self._tasks: list[Future[None]] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            if isinstance(error, UserError) and isinstance(failure, UserError):
                raise UserError(f"{failure}; {error}", failure.field) from error
            logger.error("%s", failure)  # beside what ends the block anyway

    def submit(self, task: Callable[[], None]) -> None:
        """Hand over a task; waits while too many are under way.

        Args:
            task: called once, in the thread.

        Raises:
            Exception: of an earlier task; of several `UserError`s, one that names them all.
        """
        self._raise([task for task in self._tasks if task.done()])
        self._tasks = [task for task in self._tasks if not task.done()]
        self._places.acquire()
        self._tasks.append(self._thread.submit(self._run, task))

    def wait(self) -> None:
        """Wait for every task.

        Raises:
            Exception: of the first that failed; if all are `UserError`s, one that names them all.
        """
        tasks, self._tasks = self._tasks, []
        self._raise(tasks)

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        finally:
            self._places.release()

    @staticmethod
    def _raise(tasks: list[Future[None]]) -> None:
        failures = [failure for task in tasks if (failure := task.exception()) is not None]
        if not failures:
            return
        first = failures[0]
        messages = dict.fromkeys(map(str, failures))
        if len(messages) > 1 and all(isinstance(failure, UserError) for failure in failures):
            assert isinstance(first, UserError)
            raise UserError("; ".join(messages), first.field) from first
        raise first
