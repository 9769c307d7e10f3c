"""Drawing what is missing from a set of pictures, alone or beside other processes.

Every process goes through all of the ids: first the pieces that are its own by turn, then, from the
end, those of the others. What is there is skipped, and so is what another process has claimed. So
nobody waits for anybody, whoever is late or dead has its pieces taken over, and a run that was
ended is run again with any number of processes. The last one that leaves finishes the set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ddpm_engine.errors import UserError
from ddpm_engine.generation.id_store import IdStore, units


def fill(
    pictures: IdStore,
    ids: Sequence[int],
    draw: Callable[[Sequence[int]], np.ndarray],
    label_of: Callable[[int], int | None] = lambda _: None,
    on_written: Callable[[int], None] = lambda _: None,
    *,
    batch_size: int = 64,
    per_shard: int = 1024,
    rank: int = 0,
    ranks: int = 1,
) -> bool:
    """Draw the missing pictures; the last process that does so makes the grid.

    Args:
        pictures: where they go.
        ids: all that is wanted.
        draw: ids `[N]` to uint8 `[N, H, W, C]`.
        label_of: the class of a picture, to be noted beside it.
        on_written: called with how many pictures were just written.
        batch_size: pictures to draw at a time.
        per_shard: ids of a shard. One PNG a picture is written batch by batch.
        rank: of this process.
        ranks: how many there are.

    Returns:
        Whether the set is finished; False: other processes are still drawing what is missing.

    Raises:
        UserError: the disk is full, or there are several processes and no file locks.
    """
    if ranks > 1 and not pictures.locks:
        raise UserError(
            f"{pictures.flag} {pictures.directory} is on a file system without file locks, by "
            "which several processes divide the pictures; choose another, or start one process"
        )
    ids = sorted(ids)
    if pictures.sharded:
        pieces = units(ids, per_shard, aligned=True)
    else:
        # Not larger than leaves something to do for everyone.
        pieces = units(ids, min(batch_size, -(-len(ids) // ranks)), aligned=False)
    own = pieces[rank::ranks]
    others = [piece for i, piece in enumerate(pieces) if i % ranks != rank]

    def pass_over() -> bool:
        """Draw what can be claimed; whether there was anything."""
        present, drawn = pictures.ids(), False
        for piece in [*own, *reversed(others)]:
            if present.issuperset(piece):
                continue
            with pictures.claim(piece) as granted:
                if not granted:
                    continue
                present = pictures.ids()
                if missing := [k for k in piece if k not in present]:
                    batches = (
                        missing[i : i + batch_size] for i in range(0, len(missing), batch_size)
                    )
                    images = np.concatenate([draw(batch) for batch in batches])
                    pictures.write(missing, images, [label_of(k) for k in missing])
                    on_written(len(missing))
                    drawn = True
        return drawn

    drawn = True
    while drawn:
        drawn = pass_over()
        if not pictures.leave():
            return False
        if pictures.ids().issuperset(ids):
            pictures.finish(ids)
            return True
        # Somebody who had claimed a piece has died since it was passed over.
    return False
