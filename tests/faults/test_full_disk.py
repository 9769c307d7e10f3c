"""A full disk costs checkpoints, never the run nor the checkpoints that are there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm_engine.checkpoints.store import CheckpointStore, verify
from ddpm_engine.config import RunConfig

Launch = Callable[..., Any]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_it_went_on(out: Path, ended: Any) -> None:
    """No room from step 5 to step 8: the checkpoint of step 6 fails, the others stand."""
    assert ended.status == [0, 0], ended.output
    assert "checkpoint of step 6 failed (failure 1 of this run)" in ended.output[0]
    assert "older checkpoints are untouched" in ended.output[0]
    store = CheckpointStore(out / "checkpoints")
    assert store.steps() == [3, 9, 12]
    assert [verify(store.path(step))[1] for step in store.steps()] == [[]] * 3
    assert store.leftovers() == []
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["failed_checkpoints"] == 1


@pytest.fixture
def keeping(config: RunConfig) -> RunConfig:
    return replace(config, log=replace(config.log, keep_checkpoints=9))


@pytest.mark.slow
def test_a_file_system_without_room(keeping: RunConfig, launch: Launch, small_disk: Path) -> None:
    config = replace(keeping, out=small_disk / "run")
    assert_it_went_on(config.out, launch(config, (0, "full_disk", 5, 8)))


def test_a_last_checkpoint_that_one_rank_cannot_write(config: RunConfig, launch: Launch) -> None:
    ended = launch(config, (1, "no_large_files", 10, 99))
    assert ended.status == [2, 2], ended.output
    (line,) = [line for line in ended.output[0].splitlines() if line.startswith("error: ")]
    newest = config.out / "checkpoints" / "step-00000009"
    assert "checkpoint of step 12, the last of this run so far" in line
    assert line.endswith(f"the newest checkpoint is {newest}")
    assert verify(newest)[1] == []
    assert CheckpointStore(config.out / "checkpoints").leftovers() == []
    assert launch(config).status == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_files_that_cannot_grow_on_one_rank(rank: int, keeping: RunConfig, launch: Launch) -> None:
    assert_it_went_on(keeping.out, launch(keeping, (rank, "no_large_files", 5, 8)))
