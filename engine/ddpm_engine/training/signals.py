"""Stop between two steps when the scheduler or a person asks for it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


logger = logging.getLogger(__name__)

ANNOUNCED_SECONDS = 10.0
"""Time after which it is said what is waited for."""


GRACE_SECONDS = 3.0
"""Time that a wait goes on after a signal: what is on its way is still used."""


class Stopped(BaseException):
    """A wait has been given up, because a signal has asked the run to stop."""


class StopRequest:
    """Whether a signal has asked the run to stop, and which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._gives_up = False
        self._wait: tuple[str, float] | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C twice: do not wait for the step to end
        self.signal = signal.Signals(number)
        if self._gives_up:
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if self._gives_up:
            self._gives_up = False
            raise Stopped

    @contextmanager
    def waiting(self, what: str, gives_up: bool) -> Iterator[None]:
        """Wait in the block for something that may never come, such as data from afar.

        Args:
            what: is waited for, which is logged if it takes long.
            gives_up: whether a signal ends the block, if that does not end within a few seconds.

        Raises:
            Stopped: it did.
        """
        self._wait, self._gives_up = (what, time.monotonic()), gives_up
        if self and gives_up:
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        try:
            yield
        finally:
            self._gives_up, self._wait = False, None

    def _announce(self, over: threading.Event) -> None:
        said = None
        while not over.wait(1.0):
            wait = self._wait
            late = wait is not None and time.monotonic() - wait[1] > ANNOUNCED_SECONDS
            if wait is not None and late and wait is not said:
                logger.warning("waiting for %s ...", wait[0])
                said = wait


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record SIGTERM, SIGUSR1 and SIGINT instead of dying, while the block runs."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread can handle signals
        return
    over = threading.Event()
    threading.Thread(target=request._announce, args=(over,), daemon=True).start()
    before = {number: signal.signal(number, request._handle) for number in _SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, request._give_up)
    try:
        yield request
    finally:
        over.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
