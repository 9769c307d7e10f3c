"""The cores of this process, and work that a few threads share, such as decoding images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MOST = 16


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_cores() -> int:
    """Return the number of cores for each of the ranks that were started here, at least 1."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def threads_to_use() -> int:
    """Return this process's share of the cores, at least 1 and at most 16."""
    return min(_MOST, share_of_cores())


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call a function with every item; return the results in the order of the items.

    Raises:
        Exception: of the first item that the function failed for; those begun are ended first.
    """
    threads = min(threads_to_use(), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
