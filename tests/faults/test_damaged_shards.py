"""Damaged shards cost the damaged samples: each is replaced, named and counted over all ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import ShardDataset

Launch = Callable[..., Any]
Damage = Callable[[Path, list[int]], set[int]]
POSITIONS = 12 * 4  # of the whole run


def dataset(folder: Path) -> ShardDataset:
    return ShardDataset(folder, seed=0)


def truncate(shard: Path, offsets: list[int]) -> set[int]:
    """Lose the second half, of which a file system makes zeros; returns the rows that are hit."""
    cut = offsets[10]
    with shard.open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(cut)
        file.truncate(size)
    return set(range(10, 20))


def overwrite_headers(shard: Path, offsets: list[int]) -> set[int]:
    """Garbage instead of tar headers: samples are not read by these."""
    content = bytearray(shard.read_bytes())
    for offset in offsets:
        content[offset - 512 : offset] = bytes(range(256)) * 2
    shard.write_bytes(content)
    return set()


def flip_bits(shard: Path, offsets: list[int]) -> set[int]:
    content = bytearray(shard.read_bytes())
    for row in (0, 7, 19):
        content[offsets[row] + 50] ^= 16
    shard.write_bytes(content)
    return {0, 7, 19}


def damage_third(folder: Path, damage: Damage) -> set[int]:
    """Damage the shard of samples 40 to 59; returns the samples that cannot be read any more."""
    shards = dataset(folder).shards
    offsets = [int(offset) for offset in shards.indexes[2]["offset"]]
    return {40 + row for row in damage(folder / shards.manifest.shards[2].name, offsets)}


@pytest.fixture
def damaged(config: RunConfig, tmp_path: Path) -> RunConfig:
    """The run on a copy of its shards."""
    copy = tmp_path / "shards"
    shutil.copytree(Path(config.data.path), copy)
    return replace(config, data=replace(config.data, path=copy))


@pytest.mark.parametrize("damage", [truncate, overwrite_headers, flip_bits])
def test_only_damaged_samples_are_replaced(
    damage: Damage, config: RunConfig, damaged: RunConfig
) -> None:
    whole = dataset(Path(config.data.path))
    epoch = range(len(whole))
    lost = damage_third(Path(damaged.data.path), damage)
    found = dataset(Path(damaged.data.path)).__getitems__(epoch)
    samples = whole.order.samples_at(epoch).tolist()
    for sample, before, after in zip(samples, whole.__getitems__(epoch), found, strict=True):
        assert bool(after.faults) == (sample in lost)
        assert all("000002" in fault.shard and fault.key for fault in after.faults)
        if sample not in lost:
            assert np.array_equal(before.image, after.image)


def test_a_shard_that_vanishes_while_training(config: RunConfig, damaged: RunConfig) -> None:
    whole = dataset(Path(config.data.path))
    reading = dataset(Path(damaged.data.path))
    gone = sorted(Path(damaged.data.path).glob("*.tar"))[2]
    gone.unlink()
    replaced = {s.position for s in reading.__getitems__(range(POSITIONS)) if s.faults}
    # The third shard holds samples 40 to 59.
    samples = whole.order.samples_at(range(POSITIONS)).tolist()
    assert replaced == {p for p, sample in enumerate(samples) if 40 <= sample < 60}
    assert replaced


@pytest.mark.slow
def test_replaced_samples_are_counted_over_all_ranks(damaged: RunConfig, launch: Launch) -> None:
    damage_third(Path(damaged.data.path), truncate)
    expected = [
        len(sample.faults)
        for sample in dataset(Path(damaged.data.path)).__getitems__(range(POSITIONS))
    ]
    ended = launch(damaged)
    assert ended.status == [0, 0], ended.output
    named = [len(re.findall("replaced an unreadable sample", output)) for output in ended.output]
    assert min(named) > 0
    assert sum(named) == sum(expected)
    rows = map(json.loads, (damaged.out / "metrics.jsonl").read_text().splitlines())
    assert [row["bad_samples"] for row in rows] == [sum(expected[: 4 * n]) for n in range(1, 13)]

    # Neither rank alone exceeds the budget; after the relaunch the count goes on where it was.
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
        assert f"more than `data.max_bad_samples` {budget}" in ended.output[0]
        assert "Traceback" not in ended.output[0] + ended.output[1]
    assert "resuming" in ended.output[0]
