"""Which item runs when: the most valuable first, and none that no longer fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol

from benchmarks.gpu.item import Item
from benchmarks.gpu.results import End, Results

RESERVE = 5.0
"""Seconds that are left for the end: the last item is killed so long before the budget is over."""
RETRIES = 1
"""Attempts at an item that has failed, after the first."""


class Job(Protocol):
    """An item that runs."""

    item: Item

    def poll(self) -> End | None:
        """Return how it ended, or None."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


Launch = Callable[[Item, int, float], Job]
"""Starts an item, given the number of the attempt and its limit in seconds."""


def pending(items: Sequence[Item], results: Results, again: bool) -> list[Item]:
    """Return the items that are left: not done, and not failed more often than they may.

    An attempt that has no end was interrupted, and counts as one that failed.
    """
    ends, attempts = results.ends(), results.attempts()

    def left(item: Item) -> bool:
        end = ends.get(item.name)
        if end is not None and end.status in ("done", "skipped", "not here"):
            return end.status != "done"
        return again or attempts.get(item.name, 0) <= RETRIES

    return [item for item in items if left(item)]


def groups(items: Sequence[Item]) -> list[list[Item]]:
    """Split into those that run at the same time, in order."""
    numbered = enumerate(items)
    found = groupby(numbered, key=lambda pair: pair[1].together or pair[0])
    return [[item for _, item in group] for _, group in found]


def run(
    items: Sequence[Item],
    launch: Launch,
    results: Results,
    budget: float,
    jobs: int,
    ended: Callable[[End], None],
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Run items until they are through or the time is up.

    Args:
        items: the most valuable first.
        launch: starts one.
        results: where ends are kept.
        budget: seconds from now.
        jobs: items of a group that run at once, at most.
        ended: told of every end, after it is kept.
        clock: seconds.
        pause: waits for some.
    """
    begun = clock()
    attempts = results.attempts()

    def end(of: End) -> None:
        results.end(of)
        ended(of)

    for group in groups(items):
        waiting, running = list(group), list[Job]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    item = waiting.pop(0)
                    attempt = attempts.get(item.name, 0) + 1
                    left = budget - (clock() - begun) - RESERVE
                    if item.estimate > left:
                        message = f"needs {item.estimate:.0f} s, {max(left, 0):.0f} s are left"
                        end(End(item.name, attempt, "skipped", 0.0, message))
                        continue
                    results.begin(item.name, attempt)
                    running.append(launch(item, attempt, min(item.limit, left)))
                for job in list(running):
                    over = job.poll()
                    if over is not None:
                        running.remove(job)
                        end(over)
                if running:
                    pause(0.05)
        finally:
            for job in running:
                job.kill()
