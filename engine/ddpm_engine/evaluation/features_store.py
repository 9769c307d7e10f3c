"""Features of numbered images on disk, filled by several processes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_engine.atomic_io import atomic_write, sha256_of
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.feature_networks import FeatureNetwork
from ddpm_engine.evaluation.fid import Moments, moments
from ddpm_engine.evaluation.sources import RealImages, SampleSource
from ddpm_engine.generation.archives import DamagedArchiveError, read_arrays
from ddpm_engine.generation.id_store import IdStore
from ddpm_engine.generation.sample_formats import consecutive, ids_in


class FeatureStore(IdStore):
    """Rows of numbers, one per image, in NumPy archives that hold a range of ids each.

    An archive `00000000-00000255.npz` holds ids int64 `[N]` and rows `[N, D]`.

    Args:
        directory: created if missing. If it holds rows of the same settings, more are added.
        settings: JSON values: everything that determines a row besides its id.
        field: the configuration field that named the directory, for error messages.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], field: str = "out") -> None:
        folder = directory / "shards"
        super().__init__(directory, folder, {**settings, "format": "features"}, field)

    @property
    def sharded(self) -> bool:
        """True: a file holds many rows."""
        return True

    def write(self, ids: Sequence[int], items: np.ndarray) -> None:
        """Write rows whose ids this process has reserved, one archive per range without gaps.

        Args:
            ids: N ascending ids.
            items: `[N, D]`.

        Raises:
            UserError: the disk is full or the folder cannot be written; whole files stay.
        """
        with self.writing():
            self.folder.mkdir(exist_ok=True)
            for part in consecutive(ids):
                content = io.BytesIO()
                numbers = np.asarray(ids[part], dtype=np.int64)
                np.savez(content, allow_pickle=False, ids=numbers, rows=items[part])
                name = f"{ids[part][0]:08d}-{ids[part][-1]:08d}.npz"
                with atomic_write(self.folder / name) as file:
                    file.write(content.getvalue())

    def blocks(self, ids: Sequence[int]) -> Iterator[NDArray[np.floating]]:
        """Yield the rows of these ids in ascending order, file by file: `[n, D]` each.

        Raises:
            KeyError: one is not there.
            UserError: a file is damaged.
        """
        wanted = np.unique(np.asarray(ids, dtype=np.int64))
        found = 0
        files = [(held, name) for name in self._names() if (held := ids_in(name)) is not None]
        for held, name in sorted(files, key=lambda file: file[0].start):
            if not _any_within(wanted, held):
                continue
            path = self.folder / name
            try:
                numbers, all_rows = read_arrays(path, "ids", "rows")
                rows = all_rows[np.isin(numbers, wanted)]
            except (DamagedArchiveError, OSError, IndexError) as error:
                raise UserError(
                    f"cannot read {path}: {error}; remove it, and run the evaluation again"
                ) from error
            found += len(rows)
            yield rows
        if found < len(wanted):
            raise KeyError(f"{len(wanted) - found} of {len(wanted)} rows are not in {self.folder}")

    def read(self, ids: Sequence[int]) -> NDArray[np.floating]:
        """Read the rows of these ids in ascending order: `[N, D]`.

        Raises:
            KeyError: one is not there.
        """
        return np.concatenate(list(self.blocks(ids)))

    def moments(
        self, ids: Sequence[int], device: torch.device | str = "cpu"
    ) -> tuple[Moments, str]:
        """Return the moments of all rows, kept beside them, and the SHA-256 of their file.

        Args:
            ids: of all rows.
            device: that computes them.

        Raises:
            UserError: the folder cannot be written.
        """
        path = self.directory / "moments.npz"
        if (kept := _read_moments(path)) is not None:
            return kept, sha256_of(path)
        found = moments(self.blocks(ids), device)
        content = io.BytesIO()
        np.savez(
            content, allow_pickle=False, count=np.int64(found.count), mean=found.mean,
            covariance=found.covariance,
        )  # fmt: skip
        with self.writing(), atomic_write(path) as file:
            file.write(content.getvalue())
        return found, sha256_of(path)


def open_real_features(cache: Path, images: RealImages, network: FeatureNetwork) -> FeatureStore:
    """Open the features of a data set, kept by fingerprint, feature network and resize rule.

    Raises:
        UserError: the cache cannot be written.
    """
    fingerprint = images.shards.manifest.fingerprint
    shape = "x".join(map(str, images.shape))
    settings = {
        "data": fingerprint,
        "count": len(images),
        "of": images.total,
        "shape": images.shape,
        "rule": images.rule,
        "features": network.name,
        "hash": network.hash,
        "resize": network.resize,
    }
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    name = f"{fingerprint[:12]}-{network.name}-{shape}-{key[:12]}"
    return FeatureStore(cache / name, settings, "cache")


def open_sample_features(out: Path, source: SampleSource, network: FeatureNetwork) -> FeatureStore:
    """Open the features of the evaluated samples.

    Raises:
        UserError: the folder cannot be written.
    """
    settings = {
        "pictures": source.hash,
        "features": network.name,
        "hash": network.hash,
        "resize": network.resize,
    }
    # Of samples too: a folder may get more of them, or others, and be evaluated again.
    name = f"{network.name}-{network.hash[:12]}-{source.hash[:12]}"
    return FeatureStore(out / "features" / name, settings)


def _any_within(ascending: NDArray[np.int64], held: range) -> bool:
    first = int(np.searchsorted(ascending, held[0]))
    return first < len(ascending) and int(ascending[first]) <= held[-1]


def _read_moments(path: Path) -> Moments | None:
    try:
        count, mean, covariance = read_arrays(path, "count", "mean", "covariance")
        sound = covariance.shape == (len(mean), len(mean))
        if sound and np.isfinite(mean).all() and np.isfinite(covariance).all():
            return Moments(int(count), mean, covariance)
    except (DamagedArchiveError, OSError, TypeError):
        pass  # they can be computed again
    return None
