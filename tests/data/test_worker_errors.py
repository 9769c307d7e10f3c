"""An error in a data worker reads as it does without workers: the same message, in one line."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.data.conftest import Server
from tests.data.sets import pack
from torch.utils.data import Dataset

from ddpm_engine.data.dataset import Sample, ShardDataset
from ddpm_engine.data.loader import BatchPositions, explained_deaths, make_batches
from ddpm_engine.data.remote import cache as caching
from ddpm_engine.data.remote.cache import ShardCache
from ddpm_engine.data.remote.fetch import FetchError
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.stream import ShardStream
from ddpm_engine.errors import UserError


class Failing(Dataset[Sample]):
    """A set that does something else than return samples."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def __getitem__(self, position: int) -> Sample:
        self._act()
        raise AssertionError("unreached")


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def message(dataset: Any, workers: int) -> str:
    with pytest.raises(UserError) as raised, explained_deaths():
        next(make_batches(dataset, BatchPositions(4, end_step=4), workers))
    return str(raised.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("`data.path` is odd; give another", "data.path"), "`data.path` is odd"),
        (OSError(errno.EIO, "Input/output error", "shard"), "cannot be read: .*Input/output"),
        (FetchError("https://h/x", "gone"), "cannot be read: cannot fetch https://h/x: gone"),
        (MemoryError(), "not enough memory.*`data.workers`"),
    ],
    ids=["user", "disk", "network", "memory"],
)
def test_workers_change_no_word_of_an_error(error: Exception, said: str) -> None:
    without, within = (message(Failing(raising(error)), workers) for workers in (0, 1))
    assert within == without
    assert "\n" not in within
    assert re.search(said, within)


def test_a_field_comes_along() -> None:
    error = UserError("`data.path` is odd", "data.path")
    with pytest.raises(UserError) as raised:
        next(make_batches(Failing(raising(error)), BatchPositions(4, end_step=4), 1))
    assert raised.value.field == "data.path"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_nothing_is_one_line(tmp_path: Path, workers: int) -> None:
    for k in range(4):
        (tmp_path / f"empty-{k}.tar").touch()
    stream = ShardStream(f"{tmp_path}/empty-{{0..3}}.tar", 8, 3)
    assert "in a row of" in message(stream, workers)
    assert "\n" not in message(stream, workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_cache_stops_the_run_and_condemns_no_sample(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    pack(server.folder / "set")
    dataset = ShardDataset(open_shards(f"{server.url}/set", ShardCache(tmp_path / "c", 10**8)), 0)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caching.os, "fsync", no_room)
    said = message(dataset, workers)
    assert "`data.cache`" in said
    assert "cannot be written (No space left on device); free space" in said
    assert "\n" not in said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_is_killed_is_one_line(number: signal.Signals) -> None:
    said = message(Failing(lambda: os.kill(os.getpid(), number)), 1)
    assert "\n" not in said
    assert "a process that reads data is killed by signal: " in said
    assert "`data.workers`" in said
    assert ("/dev/shm" in said) == (number == signal.SIGBUS)


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="Traceback"):
        next(make_batches(Failing(lambda: 1 // 0), BatchPositions(4, end_step=4), 1))
