"""Chunks of items that are under way: computed by a device, then written by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ddpm_engine.errors import UserError
from ddpm_engine.generation.id_store import IdStore
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.writer import Writer
from ddpm_engine.images.transfer import Pending

Compute = Callable[[Sequence[int]], np.ndarray | Pending]
"""Ids `[N]` to items `[N, ...]`, or to a function that waits for those of a device."""


@dataclass
class Chunk:
    """Items that are reserved, computed and written together."""

    reservation: ExitStack
    ids: list[int] = field(default_factory=list)
    items: list[np.ndarray] = field(default_factory=list)


class Filling:
    """What is under way; see `filling`."""

    def __init__(
        self,
        store: IdStore,
        compute: Compute,
        batch_size: int,
        progress: Progress | None,
        writer: Writer,
    ) -> None:
        self._store, self._compute, self._batch_size = store, compute, batch_size
        self._progress, self._writer = progress, writer
        self._unwritten: list[Chunk] = []
        self._uncollected: Callable[[], None] | None = None

    def reserve(self, ids: Sequence[int], wait: bool) -> Chunk | None:
        """Reserve ids; None if another process has them, unless this one is to `wait`.

        Raises:
            UserError: of an earlier chunk.
        """
        chunk = Chunk(ExitStack())
        reserved = chunk.reservation.enter_context(self._store.reserve(ids))
        if not reserved and wait:
            # Whoever holds it may be waiting for a chunk of this process.
            self.finish()
            reserved = chunk.reservation.enter_context(self._store.reserve(ids, wait=True))
        if not reserved:
            return None
        self._unwritten.append(chunk)
        return chunk

    def fill(self, chunk: Chunk, ids: list[int]) -> None:
        """Compute ids of a reserved chunk, and see to it that they are written.

        Raises:
            UserError: of this chunk or of an earlier one.
        """
        chunk.ids = ids
        if not ids:
            self._unwritten.remove(chunk)
            chunk.reservation.close()
        for start in range(0, len(ids), self._batch_size):
            try:
                items = self._compute(ids[start : start + self._batch_size])
            except UserError:
                self.collect()  # what was computed before is sound
                raise
            self.collect()
            last = start + self._batch_size >= len(ids)
            self._uncollected = partial(self._add, chunk, items, last)
            if not callable(items):
                self.collect()

    def collect(self) -> None:
        """Wait for the last batch, and hand its chunk to the writer if it was the chunk's last."""
        collect, self._uncollected = self._uncollected, None
        if collect is not None:
            collect()

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: something could not be.
        """
        self.collect()
        self._writer.wait()

    def release(self) -> None:
        """Give up what was reserved and never reached the writer."""
        for chunk in self._unwritten:
            chunk.reservation.close()

    def _add(self, chunk: Chunk, items: np.ndarray | Pending, last: bool) -> None:
        chunk.items.append(items() if callable(items) else items)
        if last:
            self._writer.submit(partial(self._write, chunk))
            self._unwritten.remove(chunk)

    def _write(self, chunk: Chunk) -> None:
        with chunk.reservation:
            self._store.write(chunk.ids, np.concatenate(chunk.items))
        if self._progress is not None:
            self._progress.written(len(chunk.ids))


@contextmanager
def filling(
    store: IdStore, compute: Compute, batch_size: int, progress: Progress | None = None
) -> Iterator[Filling]:
    """Fill a store chunk by chunk, so that neither a device nor the disk waits for the other.

    While a device computes a batch, the one before is collected; a thread writes full chunks, each
    of which stays reserved until it is written. At the end everything is written, also where the
    block fails.

    Raises:
        UserError: items that cannot be computed or written, all of them in one.
    """
    under_way = None
    try:
        with Writer() as writer:
            under_way = Filling(store, compute, batch_size, progress, writer)
            yield under_way
            under_way.finish()
    finally:
        if under_way is not None:
            under_way.release()
