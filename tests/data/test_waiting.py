"""Waits for what may never come: said after a moment, bounded, and given up when asked to stop."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.data.conftest import Server
from tests.data.sets import pack

from ddpm_engine import waiting
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig
from ddpm_engine.data import stream
from ddpm_engine.data.dataset import Batch
from ddpm_engine.data.remote import fetch
from ddpm_engine.data.remote.cache import ShardCache
from ddpm_engine.data.remote.fetch import FetchError
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.stream import ShardStream
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import digit_classifier
from ddpm_engine.locks import locked
from ddpm_engine.training import signals
from ddpm_engine.training.signals import Stopped, StopRequest, stop_on_signals
from ddpm_engine.training.trainer import Trainer


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SECONDS", 0.01)
    monkeypatch.setattr(fetch, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(fetch, "_given_up", {})
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_silent_server_is_named_while_it_is_waited_for_and_then_given_up(
    silent: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_SECONDS", 0.05)
    with pytest.raises(UserError, match="timed out"):
        open_shards(f"{silent}/set")
    assert f"waiting for {silent}/set/manifest.json ..." in caplog.text
    assert "timed out; trying again for up to" in caplog.text
    # Its other files do not wait as long again.
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UserError, match="timed out"):
        next(iter(ShardStream(f"{silent}/a-{{0..9}}.tar", 8, 3)))


def test_nothing_is_tried_again_for_ever(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_SECONDS", 0.0)
    pack(server.folder / "set")
    server.faults["/set/manifest.json"] = ["503"] * 9
    with pytest.raises(UserError, match="503"):
        open_shards(f"{server.url}/set")
    assert len(server.requests) == 1
    with pytest.raises(FetchError, match="503"):
        ShardCache(tmp_path / "cache", 10**6).open(f"{server.url}/set/x", "0" * 64, 10)
    assert len(server.requests) == 1


def test_a_stream_that_only_breaks_is_given_up_in_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"2 samples or shards in a row of .*404"):
        next(iter(ShardStream(f"{server.url}/a-{{0..9}}.tar", 8, 3)))


def test_a_run_that_waits_again_saves_what_it_has_learned(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.05)
    pack(tmp_path / "set")
    data = replace(config.data, path=tmp_path / "set")
    config = replace(config, data=data, log=replace(config.log, checkpoint_every=100))
    trainer = Trainer(config)
    batches = trainer._batches()

    def three_and_no_more() -> Iterator[Batch]:
        yield from itertools.islice(batches, 3)
        signal.raise_signal(signal.SIGTERM)
        threading.Event().wait(10)

    monkeypatch.setattr(trainer, "_batches", three_and_no_more)
    trainer.fit()
    assert (config.out / "requeue").read_text() == "stopped at step 3\n"
    assert CheckpointStore(config.out / "checkpoints").steps() == [3]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_that_waits_for_data_stops_on_a_signal(
    config: RunConfig, silent: str, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.2)
    data = replace(config.data, path=f"{silent}/a-{{0..9}}.tar", workers=workers)
    trainer = Trainer(replace(config, data=data))
    asked = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    asked.start()
    began = time.monotonic()
    trainer.fit()
    assert time.monotonic() - began < 15
    assert (config.out / "requeue").read_text() == "stopped at step 0\n"
    assert CheckpointStore(config.out / "checkpoints").steps() == []


def test_what_comes_in_time_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.05)
    with stop_on_signals() as stop:
        for gives_up in (True, False):
            with stop.waiting("data", gives_up):
                signal.raise_signal(signal.SIGTERM)
        assert stop
        # Asked already: the next wait is not longer than the moment of grace.
        with pytest.raises(Stopped), stop.waiting("data", gives_up=True):
            threading.Event().wait(10)


def test_nothing_fires_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 60.0)
    with stop_on_signals() as stop, stop.waiting("data", gives_up=True):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_training_says_that_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ANNOUNCED_SECONDS", 0.0)
    request, over = StopRequest(), threading.Event()
    said = threading.Event()
    monkeypatch.setattr(signals.logger, "warning", lambda *_: said.set())
    thread = threading.Thread(target=request._announce, args=(over,))
    thread.start()
    with request.waiting("the data of step 1", gives_up=False):
        assert said.wait(10)
    over.set()
    thread.join()


def test_a_lock_that_another_holds_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = threading.Event()
    monkeypatch.setattr(waiting.logger, "warning", lambda *_: said.set())
    path = tmp_path / "lock"
    with open(path, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def wait() -> None:
            with locked(path):
                pass

        thread = threading.Thread(target=wait)
        thread.start()
        assert said.wait(10)
        fcntl.flock(held, fcntl.LOCK_UN)
        thread.join()


def test_training_the_classifier_of_digits_is_said_and_bounded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        digit_classifier(8)
    assert "training the classifier of digits of 8×8 pixels" in caplog.text
    with pytest.raises(UserError, match=r"GB of memory.*use features inception"):
        digit_classifier(100_000)
