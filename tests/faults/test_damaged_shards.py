"""Damaged shards cost the damaged samples: each is replaced, named and counted over all ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_engine.config import RunConfig
from ddpm_engine.data import ShardDataset

Launch = Callable[..., Any]
POSITIONS = 12 * 4  # of the whole run


def dataset(folder: Path) -> ShardDataset:
    return ShardDataset(folder, seed=0)


def truncate(shard: Path) -> None:
    with shard.open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(size // 2)
        file.truncate(size)  # of the right size again: zeros where the rest was lost


def overwrite_headers(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    for start in range(0, 4096, 1024):
        content[start : start + 512] = bytes(range(256)) * 2
    shard.write_bytes(content)


def flip_bits(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    for place in (600, 5000, 9000):
        content[place] ^= 16
    shard.write_bytes(content)


@pytest.fixture
def damaged(config: RunConfig, tmp_path: Path) -> RunConfig:
    """The run on a copy of its shards."""
    copy = tmp_path / "shards"
    shutil.copytree(config.data.path, copy)
    return replace(config, data=replace(config.data, path=copy))


@pytest.mark.parametrize("damage", [truncate, overwrite_headers, flip_bits])
def test_only_damaged_samples_are_replaced(
    damage: Callable[[Path], None], config: RunConfig, damaged: RunConfig
) -> None:
    whole = dataset(config.data.path).__getitems__(range(POSITIONS))
    damage(sorted(damaged.data.path.glob("*.tar"))[2])
    found = dataset(damaged.data.path).__getitems__(range(POSITIONS))
    for before, after in zip(whole, found, strict=True):
        same = bool((torch.from_numpy(before.image) == torch.from_numpy(after.image)).all())
        assert same or after.faults
        assert all("000002" in fault.shard for fault in after.faults)
    # Headers are not what samples are read by.
    assert any(sample.faults for sample in found) == (damage is not overwrite_headers)


def test_a_shard_that_vanishes_while_training(config: RunConfig, damaged: RunConfig) -> None:
    whole = dataset(config.data.path)
    reading = dataset(damaged.data.path)
    gone = sorted(damaged.data.path.glob("*.tar"))[2]
    gone.unlink()
    replaced = {s.position for s in reading.__getitems__(range(POSITIONS)) if s.faults}
    # The third shard holds samples 40 to 59.
    samples = whole.order.samples_at(range(POSITIONS)).tolist()
    assert replaced == {p for p, sample in enumerate(samples) if 40 <= sample < 60}
    assert replaced


@pytest.mark.slow
def test_replaced_samples_are_counted_over_all_ranks(damaged: RunConfig, launch: Launch) -> None:
    truncate(sorted(damaged.data.path.glob("*.tar"))[2])
    expected = [
        len(sample.faults) for sample in dataset(damaged.data.path).__getitems__(range(POSITIONS))
    ]
    ended = launch(damaged)
    assert ended.status == [0, 0], ended.output
    named = [len(re.findall("replaced an unreadable sample", output)) for output in ended.output]
    assert min(named) > 0
    assert sum(named) == sum(expected)
    rows = map(json.loads, (damaged.out / "metrics.jsonl").read_text().splitlines())
    assert [row["bad_samples"] for row in rows] == [sum(expected[: 4 * n]) for n in range(1, 13)]

    # Neither rank alone has so many; after the relaunch the count goes on where it was.
    budget = sum(expected) - 1
    assert max(named) <= budget
    config = replace(
        damaged,
        out=damaged.out.with_name("budget"),
        data=replace(damaged.data, max_bad_samples=budget),
    )
    for _ in range(2):
        ended = launch(config)
        assert ended.status == [2, 2], ended.output
        assert f"more than --data.max-bad-samples {budget}" in ended.output[0]
        assert "Traceback" not in ended.output[0] + ended.output[1]
    assert "resuming" in ended.output[0]
