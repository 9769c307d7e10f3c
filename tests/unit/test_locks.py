"""Locks between processes: exclusion, ranges, and release by a killed owner."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddpm_engine.locks import LocksUnsupportedError, acquire, locked, release


def in_child(action: Callable[[], bool]) -> bool:
    """Evaluate a condition in a forked process."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if action() else 1)
        finally:
            os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1)
    return status == 0


@contextmanager
def sleeping_child(action: Callable[[], object]) -> Iterator[None]:
    """Fork a process that acts and sleeps until it is killed on leaving."""
    ready, notify = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = action()  # keeps the file open
        os.write(notify, b"y" if held else b"n")
        signal.pause()
    try:
        assert os.read(ready, 1) == b"y"
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def granted(path: Path, **arguments: int) -> bool:
    """Whether another opening of the file, in another process, gets the lock."""
    return in_child(lambda: acquire(path.open("r+b"), **arguments))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "lock"
    path.touch()
    return path


@pytest.mark.parametrize("inherit", [False, True])
def test_exclusion_and_release(path: Path, inherit: bool) -> None:
    with path.open("r+b") as file:
        assert acquire(file, inherit=inherit)
        assert not granted(path, inherit=inherit)
        assert not granted(path, inherit=inherit, shared=True)
        release(file, inherit=inherit)
        assert granted(path, inherit=inherit)
        assert acquire(file, inherit=inherit, shared=True)
        assert granted(path, inherit=inherit, shared=True)
        assert not granted(path, inherit=inherit)
    assert granted(path, inherit=inherit)


def test_ranges_are_locked_apart(path: Path) -> None:
    with path.open("r+b") as file:
        assert acquire(file, start=10, length=5)
        assert not granted(path, start=14, length=1)
        assert granted(path, start=15, length=1)
        assert granted(path, start=0, length=10)
        release(file, start=10, length=5)
        assert granted(path, start=14, length=1)


@pytest.mark.parametrize("inherit", [False, True])
def test_a_killed_owner_releases_its_lock(path: Path, inherit: bool) -> None:
    def own() -> object:
        file = path.open("r+b")
        return acquire(file, inherit=inherit) and file

    with sleeping_child(own):
        assert not granted(path, inherit=inherit)
    assert granted(path, inherit=inherit)


@pytest.mark.parametrize("inherit", [False, True])
def test_children_hold_only_inherited_locks(path: Path, inherit: bool) -> None:
    file = path.open("r+b")
    assert acquire(file, inherit=inherit)
    with sleeping_child(lambda: True):
        file.close()
        assert granted(path, inherit=inherit) is not inherit
    assert granted(path, inherit=inherit)


def test_locked_excludes_other_openings(tmp_path: Path) -> None:
    path = tmp_path / "made"
    with locked(path):
        assert not acquire(path.open("r+b"), inherit=True)
    assert acquire(path.open("r+b"), inherit=True)


def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with path.open("r+b") as file:
        for inherit in (False, True):
            with pytest.raises(LocksUnsupportedError, match="No locks available"):
                acquire(file, inherit=inherit)
            with pytest.raises(LocksUnsupportedError):
                release(file, inherit=inherit)
