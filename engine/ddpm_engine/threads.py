"""Work that a few threads share, such as encoding and decoding of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MOST = 16


def threads_to_use() -> int:
    """Return this process's share of the cores, at least 1 and at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST, (cores or 1) // ranks))


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
