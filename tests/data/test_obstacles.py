"""Whatever stands where temporary files go, the work is done and foreign files stay."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.conftest import Server
from tests.data.test_packing import source

from ddpm_engine.atomic_io import atomic_write, discard
from ddpm_engine.checkpoints.store import CheckpointStore, verify
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.remote.cache import ShardCache
from ddpm_engine.data.shards.verify import verify as verify_shards
from ddpm_engine.evaluation.features_store import FeatureStore


def a_file(path: Path) -> None:
    path.write_bytes(b"precious")


def a_read_only_file(path: Path) -> None:
    a_file(path)
    path.chmod(0o400)


def a_folder(path: Path) -> None:
    path.mkdir()
    a_file(path / "inside")


def a_link(path: Path) -> None:
    a_file(path.parent.parent / "target")
    path.symlink_to(path.parent.parent / "target")


def a_link_to_a_folder(path: Path) -> None:
    (path.parent.parent / "elsewhere").mkdir(exist_ok=True)
    a_file(path.parent.parent / "elsewhere" / "inside")
    path.symlink_to(path.parent.parent / "elsewhere")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


Obstacle = Callable[[Path], None]
OBSTACLES = [a_file, a_read_only_file, a_folder, a_link, a_link_to_a_folder, a_dangling_link]


def write_a_file(folder: Path, obstruct: Callable[[str], None]) -> None:
    obstruct("report.json.tmp")
    with atomic_write(folder / "report.json") as file:
        file.write(b"{}")
    assert (folder / "report.json").read_bytes() == b"{}"


def save_checkpoints(folder: Path, obstruct: Callable[[str], None]) -> None:
    store = CheckpointStore(folder)
    weights = {"model": {"weight": torch.ones(3)}}
    store.save(1, weights, {})
    obstruct("step-00000002.tmp")
    obstruct("step-00000003")
    obstruct("step-00000001.old.tmp")
    for step in (2, 3, 4):
        store.save(step, weights, {})
        assert verify(store.path(step))[1] == []
    assert store.steps() == [3, 4]


def fill_a_store(folder: Path, obstruct: Callable[[str], None]) -> None:
    FeatureStore(folder, {})
    (folder / "shards").mkdir()
    obstruct("shards/00000000-00000001.npz.tmp")
    store = FeatureStore(folder, {})
    store.write([0, 1], np.ones((2, 3)))
    assert store.ids() == {0, 1}


def pack_again(folder: Path, obstruct: Callable[[str], None]) -> None:
    (folder / ".packing").touch()
    obstruct("shard-000000.tar.tmp")
    write_shards(source(), folder)
    assert verify_shards(folder) == []


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("work", [write_a_file, save_checkpoints, fill_a_store, pack_again])
def test_work_is_done_whatever_stands_in_the_way(
    work: Callable[[Path, Callable[[str], None]], None], obstacle: Obstacle, tmp_path: Path
) -> None:
    folder = tmp_path / "folder" / "work"
    folder.mkdir(parents=True)
    work(folder, lambda name: obstacle(folder / name))
    for kept in (folder.parent / "target", folder.parent / "elsewhere" / "inside"):
        assert not kept.exists() or kept.read_bytes() == b"precious"


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_cache_makes_room_beside_whatever_is_in_it(
    obstacle: Obstacle, server: Server, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 100)
    files = cache.directory / "files"
    obstacle(files / "old")
    for name in ("one", "two"):  # the second needs the room of the first
        content = name.encode() * 30
        (server.folder / name).write_bytes(content)
        url, digest = f"{server.url}/{name}", hashlib.sha256(content).hexdigest()
        key = f"{hashlib.sha256(url.encode()).hexdigest()}-{digest}"
        (files / f"{key}.tmp").mkdir()
        descriptor = cache.open(url, digest, len(content))
        assert os.read(descriptor, 100) == content
        os.close(descriptor)


def test_discarding_never_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in" / "it"
    folder.mkdir(parents=True)
    for make in OBSTACLES:
        path = folder / make.__name__
        make(path)
        discard(path)
        assert not os.path.lexists(path)
        discard(path)
    for kept in (tmp_path / "in" / "target", tmp_path / "in" / "elsewhere" / "inside"):
        assert kept.read_bytes() == b"precious"
    assert not caplog.records

    def refuse(*_arguments: object, **_named: object) -> None:
        raise PermissionError(13, "Permission denied")

    a_folder(tmp_path / "stays")
    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr(os, "rmdir", refuse)
    discard(tmp_path / "stays")
    assert "stays is left over and cannot be removed" in caplog.text
