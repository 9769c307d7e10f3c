"""Small sets of shards, and ways to damage them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.source import Example, Source

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)


def pack(
    folder: Path,
    first: int = 0,
    count: int = 20,
    per_shard: int = 8,
    classes: tuple[str, ...] | None = None,
    labels: bool = True,
) -> Path:
    """Pack `PIXELS` from `first` on, labelled by their number unless classes are given."""
    examples = [
        Example(f"{i:08d}", PIXELS[i], (i % len(classes) if classes else i) if labels else None)
        for i in range(first, first + count)
    ]
    write_shards(Source("memory", examples, classes), folder, per_shard=per_shard)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_tar(path: Path, *members: tuple[str, bytes] | tuple[str, bytes, dict[str, Any]]) -> None:
    """Write members of name, payload, and perhaps further fields of their headers."""
    with tarfile.open(path, "w", errors="surrogateescape") as tar:
        for name, payload, *fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            for field, value in (fields[0] if fields else {}).items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(payload))


def flip(path: Path, offset: int) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


class Bomb:
    """Unpickling it leaves a folder, `executed`."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)
