"""Samples are computed and written at the same time, and a folder is whole however that ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import TINY

from ddpm_engine import atomic_io
from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.generation.generate import generate
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.sample_formats import Format
from ddpm_engine.generation.work_sharing import fill_missing
from ddpm_engine.generation.writer import Writer
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers import sampler as sampler_module

COUNT = 10


def images_of(ids: Sequence[int]) -> np.ndarray:
    """An image of two pixels for each id."""
    return np.array([[[[k], [2 * k]]] for k in ids], dtype=np.uint8)


def store_in(folder: Path, format: Format = "png") -> SampleDir:
    return SampleDir(folder, {"seed": 0}, format)


# --- Order


def test_the_next_batch_begins_before_the_last_is_waited_for(tmp_path: Path) -> None:
    """As on a GPU, whose images are not there when they are asked for."""
    events: list[str] = []

    def start(ids: Sequence[int]) -> Callable[[], np.ndarray]:
        events.append(f"start {ids[0]}")

        def wait() -> np.ndarray:
            events.append(f"collect {ids[0]}")
            return images_of(ids)

        return wait

    store = store_in(tmp_path, "tar")
    assert fill_missing(store, range(6), start, batch_size=2, chunk_size=4)
    assert events == ["start 0", "start 2", "collect 0", "start 4", "collect 2", "collect 4"]
    assert np.array_equal(store.read(range(6)), images_of(range(6)))


def test_chunks_are_written_beside_computing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path)
    computing_next = threading.Event()
    write = SampleDir.write

    def slow(self: SampleDir, ids: Sequence[int], items: np.ndarray) -> None:
        if ids[0] == 0:
            assert computing_next.wait(10), "the next chunk waits for this one's files"
        write(self, ids, items)

    def compute(ids: Sequence[int]) -> np.ndarray:
        if ids[0] > 0:
            computing_next.set()
        return images_of(ids)

    monkeypatch.setattr(SampleDir, "write", slow)
    assert fill_missing(store, range(6), compute, batch_size=2)


def test_a_writer_takes_no_more_than_fits_and_keeps_the_order() -> None:
    begin, done = threading.Event(), []
    submitted: list[int] = []

    def task(number: int) -> Callable[[], None]:
        def run() -> None:
            begin.wait(10)
            done.append(number)

        return run

    def submit_all() -> None:
        with Writer() as writer:
            for number in range(5):
                writer.submit(task(number))
                submitted.append(number)

    thread = threading.Thread(target=submit_all)
    thread.start()
    deadline = time.monotonic() + 10
    while len(submitted) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert submitted == [0, 1]
    begin.set()
    thread.join()
    assert done == [0, 1, 2, 3, 4]


# --- Errors


def test_errors_are_raised_in_order_and_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path)
    computed: list[int] = []
    write = SampleDir.write

    def failing(self: SampleDir, ids: Sequence[int], items: np.ndarray) -> None:
        while not computed[-1] >= 4:
            time.sleep(0.001)
        if ids[0] == 2:
            raise UserError("the disk is full", "out")
        write(self, ids, items)

    def compute(ids: Sequence[int]) -> np.ndarray:
        computed.append(ids[0])
        if ids[0] == 4:
            raise UserError("sample 4 is not finite")
        return images_of(ids)

    monkeypatch.setattr(SampleDir, "write", failing)
    with pytest.raises(UserError, match="the disk is full; sample 4 is not finite") as raised:
        fill_missing(store, range(8), compute, batch_size=2)
    assert raised.value.field == "out"
    assert store.ids() == {0, 1}
    # Nothing stays reserved: in this process, or one that is forked now and sees its locks.
    child = os.fork()
    if child == 0:
        try:
            with store_in(tmp_path).reserve(range(8)) as reserved:
                os._exit(0 if reserved else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_was_computed_before_an_error_is_written(tmp_path: Path) -> None:
    def start(ids: Sequence[int]) -> Callable[[], np.ndarray]:
        if ids[0] == 2:
            raise UserError("no such image")
        return lambda: images_of(ids)

    store = store_in(tmp_path)
    with pytest.raises(UserError, match="no such image"):
        fill_missing(store, range(4), start, batch_size=2)
    assert store.ids() == {0, 1}


# --- Killed at any point


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(0)
    network = UNet(TINY).eval().requires_grad_(False)
    return LoadedModel.from_config(network, RunConfig(model=TINY), "0" * 64)


def run(model: LoadedModel, out: Path, format: Format, **options: Any) -> None:
    request = model.request(steps=2, seed=3)
    generate(model, request, range(COUNT), out, format=format, batch_size=2, per_shard=4, **options)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Killed:
    """Ends this process at one of its calls, before or after what it stands for."""

    def __init__(self, replaced: Callable[..., Any], call: int, after: bool) -> None:
        self.replaced, self.left, self.after = replaced, call, after
        self.counting = threading.Lock()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self.counting:
            self.left -= 1
            now = self.left == 0
        if now and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.replaced(*arguments, **options)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


POINTS = {
    "a file is not synced": (atomic_io.os, "fsync", 4, False),
    "a file has no name yet": (atomic_io.os, "replace", 2, False),
    "a file just got its name": (atomic_io.os, "replace", 2, True),
    "a batch is sampled": (sampler_module.StepRunner, "step", 7, True),
    "the grid is written": (atomic_io.os, "replace", COUNT + 1, False),
}


@pytest.mark.parametrize("format", ["png", "tar"])
@pytest.mark.parametrize("point", POINTS)
def test_a_folder_is_completed_to_the_bit_after_a_kill(
    model: LoadedModel, tmp_path: Path, format: Format, point: str
) -> None:
    where, name, call, after = POINTS[point]
    if format == "tar" and call > COUNT:
        call = 4  # three shards, then the grid
    run(model, tmp_path / "whole", format)
    child = os.fork()
    if child == 0:
        try:
            killed = Killed(getattr(where, name), call, after)
            setattr(where, name, lambda *arguments: killed(*arguments))  # binds as a method
            run(model, tmp_path / "killed", format)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "killed") != whole
    run(model, tmp_path / "killed", format)
    assert contents(tmp_path / "killed") == whole
