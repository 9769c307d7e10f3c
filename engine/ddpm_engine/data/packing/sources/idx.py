"""IDX files, of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.data.packing.sources.source import Source, array_source, reading, revision_of
from ddpm_engine.errors import UserError

_MAGIC = {3: 0x00000803, 1: 0x00000801}


def idx_file(path: Path) -> Source:
    """Open an IDX file of images, and of labels if such a file is beside it; both may be .gz.

    Raises:
        UserError: a damaged file, or labels that do not match the images in number.
    """
    images = _read(path, dimensions=3)[..., None]
    labels_path = _labels_file(path)
    labels = None if labels_path is None else _read(labels_path, dimensions=1)
    if labels is not None and len(labels) != len(images):
        raise UserError(
            f"{labels_path} has {len(labels)} labels for the {len(images)} images of {path}: "
            "give matching files, or move the labels away"
        )
    files = [path] if labels_path is None else [path, labels_path]
    return array_source(str(path), images, labels, None, revision_of(files))


def _labels_file(path: Path) -> Path | None:
    """Find the labels file beside an images file, compressed or not."""
    base = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    candidates = (path.with_name(base), path.with_name(base + ".gz"))
    return next((c for c in candidates if c.is_file()), None)


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    with reading(path):
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    head = 4 * (1 + dimensions)
    if len(content) < head or int.from_bytes(content[:4], "big") != _MAGIC[dimensions]:
        raise UserError(f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) - head != math.prod(shape):
        raise UserError(
            f"{path} claims {list(shape)} but holds {len(content) - head} bytes: download it again"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
