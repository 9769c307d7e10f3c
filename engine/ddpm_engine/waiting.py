"""Waits that a person can see: what takes longer than a few seconds is said."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

SECONDS = 5.0
"""Time after which it is said what is waited for."""


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Log what is going on, once, if the block takes longer than `SECONDS`.

    Args:
        what: such as "waiting for https://host/shard.tar".
    """
    timer = threading.Timer(SECONDS, logger.warning, ("%s ...", what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
