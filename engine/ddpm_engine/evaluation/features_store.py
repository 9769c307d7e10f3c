"""Features of numbered pictures on disk, which several processes fill together."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.generation.id_store import IdStore
from ddpm_engine.generation.sample_formats import consecutive, ids_in


class FeatureSet(IdStore):
    """Rows of numbers, one for each picture, in NumPy archives that hold a range of ids each.

    An archive `00000000-00000255.npz` holds ids int64 `[N]` and rows `[N, D]`.

    Args:
        directory: made if missing. If it holds rows of the same settings, more are added.
        settings: JSON values: whatever determines a row, besides its id.
        flag: how the user chose the directory, for error messages.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], flag: str = "--out") -> None:
        folder = directory / "shards"
        super().__init__(directory, folder, {**settings, "format": "features"}, flag)

    @property
    def sharded(self) -> bool:
        """True: a file holds many."""
        return True

    def write(
        self, ids: Sequence[int], things: np.ndarray, labels: Sequence[int | None] | None = None
    ) -> None:
        """Write rows whose ids this process has claimed, one archive for each range without gaps.

        Args:
            ids: N ascending ids.
            things: `[N, D]`.
            labels: not kept.

        Raises:
            UserError: the disk is full or the folder cannot be written; whole files stay.
        """
        with self.writing():
            self.folder.mkdir(exist_ok=True)
            for part in consecutive(ids):
                content = io.BytesIO()
                numbers = np.asarray(ids[part], dtype=np.int64)
                np.savez(content, allow_pickle=False, ids=numbers, rows=things[part])
                name = f"{ids[part][0]:08d}-{ids[part][-1]:08d}.npz"
                with atomic_write(self.folder / name) as file:
                    file.write(content.getvalue())

    def blocks(self, ids: Sequence[int]) -> Iterator[NDArray[np.floating]]:
        """Rows of these ids in ascending order, file by file: `[n, D]` each.

        Raises:
            KeyError: one is not there.
        """
        wanted = np.unique(np.asarray(ids, dtype=np.int64))
        found = 0
        files = [(held, name) for name in self._names() if (held := ids_in(name)) is not None]
        for held, name in sorted(files, key=lambda file: file[0].start):
            if not _any_within(wanted, held):
                continue
            with np.load(self.folder / name, allow_pickle=False) as archive:
                rows = archive["rows"][np.isin(archive["ids"], wanted)]
            found += len(rows)
            yield rows
        if found < len(wanted):
            raise KeyError(f"{len(wanted) - found} of {len(wanted)} rows are not in {self.folder}")

    def read(self, ids: Sequence[int]) -> NDArray[np.floating]:
        """Rows of these ids in ascending order: `[N, D]`.

        Raises:
            KeyError: one is not there.
        """
        return np.concatenate(list(self.blocks(ids)))


def _any_within(ascending: NDArray[np.int64], held: range) -> bool:
    first = int(np.searchsorted(ascending, held[0]))
    return first < len(ascending) and int(ascending[first]) <= held[-1]
