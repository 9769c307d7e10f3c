"""Where the manifest and the indexes of a folder of shards are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ddpm_engine.cache_directories import may_be_written, user_cache
from ddpm_engine.data.shards.manifest import MANIFEST_NAME


def records_of(folder: Path) -> Path:
    """Return the folder with the manifest and the indexes of a folder of shards.

    They are beside the shards; of a folder that could not be written, in the user's cache.
    """
    if (folder / MANIFEST_NAME).exists() or not _is_cached(folder):
        return folder
    return _cached(folder)


def place_for_records(folder: Path) -> Path:
    """Return the folder to put the manifest and the indexes into, made if it is in the cache.

    Raises:
        OSError: it cannot be made.
    """
    if may_be_written(folder):
        return folder
    place = _cached(folder)
    place.mkdir(parents=True, exist_ok=True)
    return place


def _is_cached(folder: Path) -> bool:
    return (_cached(folder) / MANIFEST_NAME).exists()


def _cached(folder: Path) -> Path:
    path = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return user_cache("indexes") / path[:32]
