"""Shards in a folder that cannot be written: whatever only reads them works, indexing too."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.data.sets import PIXELS, contents, flip, pack, write_tar

from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import ShardDataset
from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.packing.pack import prepare_shards
from ddpm_engine.data.shards import records
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.shards.verify import verify
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.sources import folder_source
from ddpm_engine.images.codec import encode
from ddpm_engine.training.trainer import Trainer


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Shards without an index, in a folder that stays as it is."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    for name, images in (("a", PIXELS[:5]), ("b", PIXELS[5:9])):
        members = ((f"{k}.png", encode(image, "png")) for k, image in enumerate(images))
        write_tar(folder / f"{name}.tar", *members)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Permissions do not bind the superuser, whom tests may run as.
    monkeypatch.setattr(records, "may_be_written", lambda place: place != folder)
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def test_they_are_indexed_and_read(
    shards: Path, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        manifest = index_shards(shards)
    assert f"{shards} cannot be written" in caplog.text
    assert open_shards(shards).manifest == manifest
    assert len(ShardDataset(shards, seed=0)) == 9
    assert verify(shards) == []
    prepare_shards(shards, "digits")
    assert len(folder_source(shards).ids) == 9
    Trainer(replace(config, data=replace(config.data, path=shards))).fit()


def test_messages_name_the_files_at_fault(shards: Path, tmp_path: Path) -> None:
    index_shards(shards)
    place = records.records_of(shards)
    assert tmp_path / "cache" in place.parents
    with pytest.raises(UserError, match=f"indexed already.*move manifest.json out of {place}"):
        index_shards(shards)
    flip(place / "a.index.npy", 200)
    with pytest.raises(UserError, match=f"index {place}/a.index.npy is not the one"):
        open_shards(shards).indexes[0]
    (place / "b.index.npy").unlink()
    with pytest.raises(UserError, match=f"index {place}/b.index.npy cannot be read"):
        open_shards(shards)


def test_an_index_that_cannot_be_written_is_blamed_itself(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ddpm_engine.data.packing.index.atomic_write", refuse)
    with pytest.raises(UserError, match=r"cannot use .*/a\.index\.npy: Permission denied"):
        index_shards(shards)


def test_an_index_beside_the_shards_is_preferred(tmp_path: Path) -> None:
    folder = pack(tmp_path / "set")
    assert records.records_of(folder) == folder
