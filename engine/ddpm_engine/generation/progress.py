"""Progress of filling a store of numbered items, over all processes that fill it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

_SECONDS_ON_A_TERMINAL = 2
_SECONDS_IN_A_LOG = 30


class Progress:
    """Print one line, renewed every two seconds on a terminal or every half minute in a log.

    Args:
        total: items wanted.
        count: returns how many of them are there; called for every line.
        steps: steps per item; `step` counts them.
        active: whether to print anything.
        unit: what the items are called.
    """

    def __init__(
        self,
        total: int,
        count: Callable[[], int],
        steps: int = 1,
        active: bool = True,
        unit: str = "samples",
    ) -> None:
        self._total, self._count, self._steps = total, count, steps
        self._active, self._unit = active, unit
        self._terminal = sys.stderr.isatty()
        self._interval = _SECONDS_ON_A_TERMINAL if self._terminal else _SECONDS_IN_A_LOG
        self._at_first = count() if active else 0
        self._began = self._printed = time.monotonic()
        self._in_flight = 0.0
        self._counting = threading.Lock()  # what is written is noted by the thread that writes

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, items: int) -> None:
        """Advance this many items by one step in this process."""
        with self._counting:
            self._in_flight += items / self._steps
        if self._active and time.monotonic() - self._printed >= self._interval:
            self._print()

    def written(self, items: int) -> None:
        """Note that this many items of this process are where `count` sees them."""
        with self._counting:
            self._in_flight -= items

    def close(self) -> None:
        """End the line."""
        if self._active and self._terminal:
            self._print()
            print(file=sys.stderr)

    def _print(self) -> None:
        self._printed = time.monotonic()
        done = self._count() + self._in_flight
        rate = (done - self._at_first) / (self._printed - self._began)
        left = timedelta(seconds=round((self._total - done) / rate)) if rate > 0 else "unknown"
        line = f"{done:,.0f}/{self._total:,} {self._unit}  {rate:.3g} per second  eta {left}"
        if self._terminal:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
