"""Fill a store of numbered items, alone or together with other processes.

Each process works through its own chunks of ids round-robin, then takes over unfinished chunks of
the others, starting at the end. Items that exist are skipped, and so are chunks that another
process has reserved. So no process waits for another, chunks of a slow or dead process are picked
up, and an interrupted run is resumed by running it again, with any number of processes.

Nothing waits for files either: while a device computes a batch, the one before is collected, and
full chunks are written by a thread. A chunk stays reserved until it is written.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ddpm_engine.errors import UserError
from ddpm_engine.generation.filling import Compute, filling
from ddpm_engine.generation.id_store import IdStore
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.sample_formats import consecutive
from ddpm_engine.launched import launched_as


@dataclass(frozen=True)
class WorkShare:
    """This process among those that share the work."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> WorkShare:
        """Read what a launcher has set; without one, a single process.

        Raises:
            UserError: it is no rank and number of ranks.
        """
        return cls(*launched_as())


def fill_missing(
    store: IdStore,
    ids: Sequence[int],
    compute: Compute,
    *,
    batch_size: int = 64,
    chunk_size: int = 1024,
    share: WorkShare = WorkShare(),
    progress: Progress | None = None,
    wait: bool = False,
) -> bool:
    """Compute the missing items; the last process to leave also finishes the store.

    Args:
        store: where the items go.
        ids: everything wanted; a range of step 1, however long, is never put into a list.
        compute: the items of at most `batch_size` ids at a time; the next are asked for before
            those that a device is still computing are waited for.
        batch_size: items computed at a time.
        chunk_size: items reserved and written at a time. Where each item has a file of its own,
            chunks are single batches.
        share: this process among those that share the work.
        progress: counts the items written.
        wait: wait for chunks that other processes have reserved, instead of skipping them. On
            return everything is there.

    Returns:
        True for the last process to leave, once everything is there. False: other processes are
        still working in the store.

    Raises:
        UserError: the disk is full, or there are several processes but no file locks.
    """
    if share.world_size > 1 and not store.supports_locks:
        raise UserError(
            f"`{store.field}` is {store.directory}, on a file system without file locks, by which "
            "several processes share the work; choose another, or start one process",
            field=store.field,
        )
    ids = ids if isinstance(ids, range) else sorted(ids)
    if store.sharded:
        pieces = chunks(ids, chunk_size, aligned=True)
    else:
        # Small enough that every process has something to do.
        pieces = chunks(ids, min(batch_size, -(-len(ids) // share.world_size)), aligned=False)
    numbers = range(len(pieces))

    def pass_over() -> bool:
        """Compute every chunk that can be reserved; return whether there was any."""
        present, computed = store.ids(), False
        others = (i for i in reversed(numbers) if i % share.world_size != share.rank)
        with filling(store, compute, batch_size, progress) as under_way:
            for number in chain(numbers[share.rank :: share.world_size], others):
                piece = pieces[number]
                if present.issuperset(piece):
                    continue
                chunk = under_way.reserve(piece, wait)
                if chunk is None:
                    continue
                present = store.ids()
                missing = [k for k in piece if k not in present]
                under_way.fill(chunk, missing)
                computed |= bool(missing)
        return computed

    computed = True
    while computed:
        computed = pass_over()
        if not store.last_to_leave():
            return False
        if count_of(ids, store.ids()) == len(ids):
            store.finish(ids)
            return True
        # A process that had reserved a chunk died after this one passed it over.
    return False


def count_of(ids: Sequence[int], present: Set[int]) -> int:
    """Count the ids that are present."""
    if isinstance(ids, range):
        return sum(k in ids for k in present)
    return len(present & set(ids))


class RangeChunks(Sequence[range]):
    """A range cut into chunks, none of which is in memory.

    Args:
        ids: without gaps.
        size: largest number of ids in a chunk.
        aligned: cut at multiples of `size`.
    """

    def __init__(self, ids: range, size: int, aligned: bool) -> None:
        self._ids, self._size = ids, size
        self._first = ids.start - ids.start % size if aligned else ids.start

    def __len__(self) -> int:
        return -(-(self._ids.stop - self._first) // self._size) if self._ids else 0

    def __getitem__(self, number: Any) -> Any:
        """The chunk of a number, from 0."""
        if number not in range(len(self)):
            raise IndexError(number)
        start = self._first + number * self._size
        return range(max(start, self._ids.start), min(start + self._size, self._ids.stop))


def chunks(ids: Sequence[int], size: int, aligned: bool) -> Sequence[Sequence[int]]:
    """Cut ascending ids into chunks.

    Args:
        ids: ascending.
        size: largest number of ids in a chunk.
        aligned: cut at multiples of `size` and at gaps, as shards are, so that a shard holds the
            same ids whatever else is asked for.
    """
    if isinstance(ids, range):
        return RangeChunks(ids, size, aligned)
    if not aligned:
        return [list(ids[i : i + size]) for i in range(0, len(ids), size)]
    pieces: list[list[int]] = []
    for part in consecutive(ids):
        for k in ids[part]:
            if not pieces or k % size == 0 or k != pieces[-1][-1] + 1:
                pieces.append([])
            pieces[-1].append(k)
    return pieces
