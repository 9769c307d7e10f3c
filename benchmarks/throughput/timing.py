"""Repetitions taken in turn, and what is said of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """The middle half of some numbers."""

    median: float
    lower: float
    """First quartile."""
    upper: float
    """Third quartile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles, with linear interpolation between the values."""
        lower, median, upper = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
        return cls(float(median), float(lower), float(upper))


def rates(seconds: Sequence[float], work: float) -> Spread:
    """Return work per second over repetitions of the same work."""
    return Spread.of([work / one for one in seconds])


def speed_ups(baseline: Sequence[float], seconds: Sequence[float]) -> Spread:
    """How many times as fast as the baseline, over pairs that were timed in the same round.

    A machine that is shared is slow and fast in turns; most pairs meet it in the same turn.
    """
    return Spread.of([a / b for a, b in zip(baseline, seconds, strict=True)])


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that the clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, up to the end of what it has queued."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def interleaved(rounds: int, works: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Call every work once a round, A B C A B C …, and collect the figure that each returns.

    The order turns around from round to round, so that none always comes after the same other.
    """
    figures: dict[str, list[float]] = {name: [] for name in works}
    for one in range(rounds):
        names = list(works) if one % 2 == 0 else list(works)[::-1]
        for name in names:
            figures[name].append(works[name]())
    return figures
