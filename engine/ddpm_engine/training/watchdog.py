"""End a run of several ranks when one of them fails, dies or hangs, and name that rank.

A collective does not know which rank it is waiting for, and on GPUs it cannot be interrupted. So a
thread of each rank writes every second into the process group's store what the rank is doing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Event, Thread
from types import TracebackType

import torch.distributed as dist

from ddpm_engine.errors import UserError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""Time between two heartbeats of a rank; a rank without one for three times as long is silent."""
GRACE_SECONDS = 10.0
"""Time that a rank has to end by itself after another has failed."""
_FAILURE = "failure"
_STORE_IS_GONE = "rank 0, or the launcher that keeps the group's store, no longer answers"
_RANKS_LISTED = 8


class Watchdog:
    """While the block runs, no rank waits forever for another; does nothing for a single rank.

    An error that ends the block on one rank ends the others too, with a `UserError` that says what
    happened on which rank. A rank that is stuck in a collective, or does not call `doing` for too
    long, exits with status 1 and a log line that names the rank at fault.

    Args:
        timeout_seconds: longest time between two calls of `doing`, in seconds. Time during which
            the whole process was stopped does not count.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._doing = "starting"
        self._limited = False
        self._seconds = 0.0
        self._failure: str | None = None
        self._over = Event()
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if dist.is_initialized() else 0

    def doing(self, what: str, limited: bool = True) -> None:
        """Record what this rank does from now on.

        Args:
            what: a verb phrase, such as "reading data", for "rank 3 is reading data".
            limited: whether the timeout applies to it.
        """
        self._doing, self._limited, self._seconds = what, limited, 0.0

    def __enter__(self) -> Watchdog:
        if self._world > 1:
            for work in (self._beat, self._guard):
                Thread(target=work, name="watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._limited = False
        try:
            if self._world > 1 and isinstance(error, Exception):
                self._share(error)
        finally:
            self._over.set()

    def _share(self, error: Exception) -> None:
        """Publish this rank's error to the others, unless an error of theirs has caused it."""
        own = f"rank {self._rank} failed: {error}"

        def find_cause(store: dist.Store) -> str:
            if not isinstance(error, UserError) and not store.check([_FAILURE]):
                # A collective fails as soon as a rank has died or left with an error: find which.
                silent = self._observe(store)[0]
                if silent:
                    return _publish(store, f"{_name(silent)} no longer answers: killed, or cut off")
            return _publish(store, own)

        cause = _ask(find_cause)
        if self._rank > 0 and cause in (own, _STORE_IS_GONE):  # the commands print rank 0's error
            logger.error("rank %d ends: %s", self._rank, cause)
        if cause != own and not isinstance(error, UserError):
            raise UserError(f"{cause}; this rank ends with it") from error

    def _beat(self) -> None:
        """Publish a heartbeat and look for failures of other ranks, every second."""
        try:
            store = _own_store()
            beats = 0
            while not self._over.wait(BEAT_SECONDS):
                beats += 1
                store.set(str(self._rank), json.dumps([beats, self._doing]))
                if store.check([_FAILURE]):
                    self._failure = store.get(_FAILURE).decode()
                    return
        except RuntimeError:  # torch's network errors
            self._failure = _STORE_IS_GONE

    def _guard(self) -> None:
        """End this process if its main thread does not end in time."""
        while not self._over.wait(BEAT_SECONDS):
            # Counted in heartbeats: a process that was stopped and continued does not time out.
            self._seconds += BEAT_SECONDS
            if self._failure is not None:
                if not self._over.wait(GRACE_SECONDS):
                    logger.error("rank %d ends, because %s", self._rank, self._failure)
                    os._exit(1)
            elif self._limited and self._seconds > self._timeout:
                message = (
                    f"no progress for {self._timeout:g} s (`training.timeout_seconds`): "
                    f"{_ask(lambda store: _publish(store, self._report(store)))}"
                )
                logger.error("rank %d ends: %s", self._rank, message)
                os._exit(1)

    def _report(self, store: dist.Store) -> str:
        """Describe what every rank is doing."""
        silent, doing = self._observe(store)
        found = [f"{_name(silent)} does not answer"] if silent else []
        found += [f"{_name(ranks)} is {what}" for what, ranks in doing.items()]
        return "; ".join(found)

    def _observe(self, store: dist.Store) -> tuple[list[int], dict[str, list[int]]]:
        """Find the silent ranks and what the others are doing; takes three heartbeats."""
        before = [_read(store, rank) for rank in range(self._world)]
        time.sleep(3 * BEAT_SECONDS)
        silent, doing = [], defaultdict(list)
        for rank, last in enumerate(before):
            now = _read(store, rank)
            if rank != self._rank and now == last:
                silent.append(rank)
            else:
                doing[self._doing if rank == self._rank or now is None else now[1]].append(rank)
        return silent, doing


def _own_store() -> dist.Store:
    """Connect to the store of the process group, for the calling thread alone."""
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return dist.PrefixStore("ddpm_engine.watch", store)


def _read(store: dist.Store, rank: int) -> tuple[int, str] | None:
    if not store.check([str(rank)]):
        return None
    beats, doing = json.loads(store.get(str(rank)))
    return beats, doing


def _publish(store: dist.Store, message: str) -> str:
    """Record a failure unless there is one; returns the one on record."""
    return store.compare_set(_FAILURE, "", message).decode()


def _ask(question: Callable[[dist.Store], str]) -> str:
    """Query the store, which does not answer if the process that keeps it has stopped."""
    answer: list[str] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answer.append(question(_own_store()))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(GRACE_SECONDS)
    return answer[0] if answer else _STORE_IS_GONE


def _name(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    listed = ", ".join(map(str, ranks[:_RANKS_LISTED])) + (", …" * (len(ranks) > _RANKS_LISTED))
    return f"rank {listed}"
