"""How far a set of pictures is, over all processes that fill it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

_SECONDS_ON_A_TERMINAL = 2
_SECONDS_IN_A_LOG = 30


class Progress:
    """One line, renewed every other second on a terminal, or every half minute in a log.

    Args:
        total: pictures wanted.
        count: how many of them are there; it is asked at every line.
        evaluations: steps a picture.
        active: whether to show anything.
    """

    def __init__(
        self, total: int, count: Callable[[], int], evaluations: int, active: bool = True
    ) -> None:
        self.total = total
        self.active = active
        self._count = count
        self._evaluations = evaluations
        self._terminal = sys.stderr.isatty()
        self._interval = _SECONDS_ON_A_TERMINAL if self._terminal else _SECONDS_IN_A_LOG
        self._at_first = count() if active else 0
        self._began = self._shown = time.monotonic()
        self._in_flight = 0.0

    def step(self, pictures: int) -> None:
        """So many pictures are one step further in this process."""
        self._in_flight += pictures / self._evaluations
        if self.active and time.monotonic() - self._shown >= self._interval:
            self._show()

    def written(self, pictures: int) -> None:
        """So many pictures of this process are where `count` sees them."""
        self._in_flight -= pictures

    def close(self) -> None:
        """End the line."""
        if self.active and self._terminal:
            self._show()
            print(file=sys.stderr)

    def _show(self) -> None:
        self._shown = time.monotonic()
        done = self._count() + self._in_flight
        rate = (done - self._at_first) / (self._shown - self._began)
        left = timedelta(seconds=round((self.total - done) / rate)) if rate > 0 else "unknown"
        line = f"{done:,.0f}/{self.total:,} pictures  {rate:.3g} images/s  eta {left}"
        if self._terminal:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
