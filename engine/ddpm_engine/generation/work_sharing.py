"""Fill a store of numbered items, alone or together with other processes.

Each process works through its own chunks of ids round-robin, then takes over unfinished chunks of
the others, starting at the end. Items that exist are skipped, and so are chunks that another
process has reserved. So no process waits for another, chunks of a slow or dead process are picked
up, and an interrupted run is resumed by running it again, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_engine.errors import UserError
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
    compute: Callable[[Sequence[int]], np.ndarray],
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
        ids: everything wanted.
        compute: ids `[N]` to items `[N, ...]`, at most `batch_size` at a time.
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
    ids = sorted(ids)
    if store.sharded:
        pieces = chunks(ids, chunk_size, aligned=True)
    else:
        # Small enough that every process has something to do.
        pieces = chunks(ids, min(batch_size, -(-len(ids) // share.world_size)), aligned=False)
    own = pieces[share.rank :: share.world_size]
    others = [piece for i, piece in enumerate(pieces) if i % share.world_size != share.rank]

    def pass_over() -> bool:
        """Compute every chunk that can be reserved; return whether there was any."""
        present, computed = store.ids(), False
        for piece in [*own, *reversed(others)]:
            if present.issuperset(piece):
                continue
            with store.reserve(piece, wait=wait) as reserved:
                if not reserved:
                    continue
                present = store.ids()
                if missing := [k for k in piece if k not in present]:
                    batches = (
                        missing[i : i + batch_size] for i in range(0, len(missing), batch_size)
                    )
                    store.write(missing, np.concatenate([compute(batch) for batch in batches]))
                    if progress is not None:
                        progress.written(len(missing))
                    computed = True
        return computed

    computed = True
    while computed:
        computed = pass_over()
        if not store.last_to_leave():
            return False
        if store.ids().issuperset(ids):
            store.finish(ids)
            return True
        # A process that had reserved a chunk died after this one passed it over.
    return False


def chunks(ids: Sequence[int], size: int, aligned: bool) -> list[list[int]]:
    """Cut ascending ids into chunks.

    Args:
        ids: ascending.
        size: largest number of ids in a chunk.
        aligned: cut at multiples of `size` and at gaps, as shards are, so that a shard holds the
            same ids whatever else is asked for.
    """
    if not aligned:
        return [list(ids[i : i + size]) for i in range(0, len(ids), size)]
    pieces: list[list[int]] = []
    for part in consecutive(ids):
        for k in ids[part]:
            if not pieces or k % size == 0 or k != pieces[-1][-1] + 1:
                pieces.append([])
            pieces[-1].append(k)
    return pieces
