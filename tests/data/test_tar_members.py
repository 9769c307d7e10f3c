"""All readers of tars agree on what is a sample in them: indexing, verifying, streams, samples."""

from __future__ import annotations

import itertools
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.sets import PIXELS, write_tar

from ddpm_engine.data.dataset import ShardDataset
from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.shards.verify import verify
from ddpm_engine.data.stream import ShardStream
from ddpm_engine.errors import UserError
from ddpm_engine.generation.sample_reader import open_samples
from ddpm_engine.images.codec import encode

PNG = [encode(image, "png") for image in PIXELS[:4]]
IMAGES = [(f"0000000{k}.png", png) for k, png in enumerate(PNG)]


def by_index(path: Path) -> list[np.ndarray]:
    index_shards(path.parent)
    assert verify(path.parent) == []
    dataset = ShardDataset(path.parent, seed=0)
    samples = [dataset[p] for p in range(len(dataset))]
    assert not any(sample.faults for sample in samples)
    return [sample.image for sample in samples]


def by_stream(path: Path) -> list[np.ndarray]:
    stream = ShardStream(str(path), 8, 3)
    samples = list(itertools.islice(stream, 120))
    assert not any(sample.faults for sample in samples)
    return [sample.image for sample in samples]


def by_ids(path: Path) -> list[np.ndarray]:
    (path.parent / "shards").mkdir()
    path.rename(path.parent / "shards" / "00000000-00000003.tar")
    (path.parent / "manifest.json").write_text(json.dumps({"format": "tar"}))
    return list(open_samples(path.parent).read(range(4)))


Read = Callable[[Path], "list[np.ndarray]"]
READERS = pytest.mark.parametrize("read", [by_index, by_stream, by_ids])

LINK = {"type": tarfile.LNKTYPE, "linkname": "00000000.png"}
FOREIGN: dict[str, list[Any]] = {
    "nothing": [],
    "macOS": [(".DS_Store", b"x"), ("._00000000.png", b"x")],
    "macOS in folders": [("a/.DS_Store", b"x"), ("a/._0.png", b"x"), ("__MACOSX/._0.png", b"x")],
    "a folder": [("a", b"", {"type": tarfile.DIRTYPE}), ("b.png", b"", {"type": tarfile.DIRTYPE})],
    "links": [("hard.png", b"", LINK), ("soft.png", b"", LINK | {"type": tarfile.SYMTYPE})],
    "PAX": [("global", b"", {"type": tarfile.XGLTYPE}), ("k" * 300 + ".txt", b"x")],
    "notes": [("README.txt", b"x"), ("LICENSE", b"x"), ("a/notes.md", b"x"), ("00000009.txt", b"")],
    "twice": [("x.txt", b"1"), ("x.txt", b"2")],
}


def distinct(images: list[np.ndarray]) -> set[bytes]:
    return {image.tobytes() for image in images}


@READERS
@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("first", [False, True])
def test_foreign_members_are_left_out_by_all(
    tmp_path: Path, read: Read, foreign: str, first: bool
) -> None:
    extra = FOREIGN[foreign]
    path = tmp_path / "a.tar"
    write_tar(path, *([*extra, *IMAGES] if first else [*IMAGES[:2], *extra, *IMAGES[2:]]))
    assert distinct(read(path)) == distinct(list(PIXELS[:4]))


@pytest.mark.parametrize("foreign", ["links", "notes"])
def test_what_is_left_out_of_an_index_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, foreign: str
) -> None:
    write_tar(tmp_path / "a.tar", *FOREIGN[foreign], *IMAGES)
    with caplog.at_level(logging.WARNING):
        index_shards(tmp_path)
    (record,) = caplog.records
    assert FOREIGN[foreign][0][0] in record.getMessage()


@pytest.mark.parametrize("misnamed", ["x.v2.jpg", "x.cls"])
def test_a_sample_without_an_image_is_a_fault_to_all(tmp_path: Path, misnamed: str) -> None:
    write_tar(tmp_path / "a.tar", (misnamed, b"0"), *IMAGES)
    with pytest.raises(UserError, match=r"sample 'x' of .* has no image"):
        index_shards(tmp_path)
    faults = {
        fault.key: fault.reason
        for sample in itertools.islice(ShardStream(str(tmp_path / "a.tar"), 8, 3), 120)
        for fault in sample.faults
    }
    assert list(faults) == ["x"]
    assert "no image" in faults["x"]
