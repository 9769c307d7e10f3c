"""File systems that lack what others have: hard links, locks, folders that can be synced."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from ddpm_engine.atomic_io import atomic_write, fsync_directory, write_once
from ddpm_engine.data.remote.cache import ShardCache
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.features_store import FeatureStore
from ddpm_engine.generation.id_store import IdStore
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.work_sharing import fill_missing


def refuse(monkeypatch: pytest.MonkeyPatch, module: object, name: str, code: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, name, fail)


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, os, "link", request.param)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, fcntl, "flock", errno.ENOLCK)
    refuse(monkeypatch, fcntl, "lockf", errno.ENOLCK)


def visible(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}


@pytest.mark.usefixtures("no_links")
def test_without_links_the_first_content_stays_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        write_once(tmp_path / "once", content)
    assert (tmp_path / "once").read_bytes() == b"first"
    assert visible(tmp_path) == {"once"}


@pytest.mark.usefixtures("no_links", "no_locks")
def test_without_links_and_locks_one_process_can_still_write(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        write_once(tmp_path / "once", content)
    assert (tmp_path / "once").read_bytes() == b"first"
    assert visible(tmp_path) == {"once"}


@pytest.mark.usefixtures("no_links")
def test_without_links_processes_agree_on_one_content(tmp_path: Path) -> None:
    path, ready = tmp_path / "once", os.pipe()
    children = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            os.close(ready[1])
            os.read(ready[0], 1)  # until the parent lets all of them go at once
            write_once(path, bytes([number]) * 5000)
            found = path.read_bytes()
            os._exit(found[0] if len(found) == 5000 and len(set(found)) == 1 else 99)
        children.append(pid)
    os.close(ready[1])
    seen = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children}
    os.close(ready[0])
    assert seen == {path.read_bytes()[0]}


@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("kind", ["samples", "features"])
def test_stores_are_filled_and_resumed_without_links(
    kind: str, locks: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not locks:
        request.getfixturevalue("no_locks")

    def store(seed: int) -> IdStore:
        settings = {"seed": seed}
        if kind == "samples":
            return SampleDir(tmp_path / "out", settings, "npz")
        return FeatureStore(tmp_path / "out", settings)

    def compute(ids: object) -> np.ndarray:
        shape = (8, 8, 1) if kind == "samples" else (5,)
        return np.zeros((len(list(ids)), *shape), np.uint8)  # type: ignore[call-overload]

    assert fill_missing(store(0), range(4), compute)
    assert fill_missing(store(0), range(9), compute)
    assert store(0).ids() == set(range(9))
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        store(1)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_folders_that_cannot_be_synced(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"content")
    write_once(tmp_path / "once", b"content")
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"content"}


def test_a_folder_that_fails_to_sync_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, os, "fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_directory(tmp_path)


@pytest.mark.usefixtures("no_locks")
def test_a_cache_without_locks_is_refused_before_it_is_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`data\.cache` .* \(No locks available\)"):
        ShardCache(tmp_path / "cache", 1 << 20)


@pytest.mark.parametrize("name", [".", "..", "/", "folder/"])
def test_folders_are_not_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder" if name.startswith(".") else tmp_path)
    for write in (lambda: atomic_write(name).__enter__(), lambda: write_once(name, b"")):
        with pytest.raises(IsADirectoryError):
            write()
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]
