"""A set of 10⁹ samples in 10⁵ shards, read by 1024 ranks."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from ddpm_engine.data import shuffle as order
from ddpm_engine.data.shards.manifest import Manifest, Shard
from ddpm_engine.data.shards.shard_set import MAX_OPEN_INDEXES, ShardSet
from ddpm_engine.data.shuffle import Order, rank_positions

SHARDS, PER_SHARD, WORLD = 100_000, 10_000, 1024


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_a_few_numbers_a_shard_whatever_the_samples() -> None:
    def look_up(per_shard: int) -> int:
        sizes = np.full(SHARDS, per_shard)
        return peak_bytes(lambda: Order(sizes, 1).samples_at(np.arange(64) + 7 * sizes.sum()))

    small, large = look_up(10), look_up(PER_SHARD)
    assert large < 1.1 * small
    assert large < 100 * SHARDS


def test_a_look_up_costs_hashes_of_its_own_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    original = order._mix

    def counted(words: np.ndarray) -> np.ndarray:
        hashed.append(words.size)
        return original(words)

    monkeypatch.setattr(order, "_mix", counted)
    positions = np.random.default_rng(0).integers(0, 10**9, 4096)
    everything = Order([PER_SHARD] * SHARDS, seed=3, window_shards=SHARDS)
    everything.samples_at(positions)
    # A Feistel round each, repeated less than 4 times on average to stay within the set.
    assert sum(hashed) < 4 * order._ROUNDS * len(positions)


def test_all_ranks_together_see_a_window_once() -> None:
    shared = Order([PER_SHARD] * SHARDS, seed=3)
    batch = 16 * WORLD
    step = 5 * 10**9 // batch
    seen = [
        shared.samples_at(np.array(rank_positions(step + k, batch, rank, WORLD)))
        for k in range(3)
        for rank in range(WORLD)
    ]
    samples = np.concatenate(seen)
    assert len(np.unique(samples)) == len(samples)
    # Read in windows: this step and its neighbours are in as many shards, not in all of them.
    assert len(np.unique(samples // PER_SHARD)) <= 2 * shared.window_shards


def test_opening_reads_no_index_and_few_are_kept() -> None:
    class Nowhere:
        opened = 0

        def open(self, name: str, sha256: str, at_most: int) -> int:
            self.opened += 1
            raise FileNotFoundError(name)

        def manifest(self, name: str) -> bytes:
            raise AssertionError

    shard = Shard("0.tar", PER_SHARD, 1, "0" * 64, "0" * 64)
    shards = tuple(dataclasses.replace(shard, name=f"{i}.tar") for i in range(1000))
    storage = Nowhere()
    opened = ShardSet(storage, Manifest(shards, 8, 8, 3, None))
    assert (storage.opened, opened.manifest.samples) == (0, 1000 * PER_SHARD)
    assert MAX_OPEN_INDEXES * PER_SHARD * 64 < 64e6


def test_a_permutation_leaves_no_place_preferred() -> None:
    count, seeds = 12, 1500
    where = np.array(
        [
            order.Permutation(count, seed, 0, 0, order.Stream.SAMPLE_ORDER)(np.arange(count))
            for seed in range(seeds)
        ]
    )
    table = np.stack([np.bincount(where[:, place], minlength=count) for place in range(count)])
    expected = seeds / count
    chi_square = float(((table - expected) ** 2 / expected).sum())
    # 121 degrees of freedom: mean 121, deviation 15.6.
    assert chi_square < 121 + 5 * 15.6
    # Neighbours do not stay neighbours more often than by chance (2/12 of all pairs, ±).
    near = np.abs(np.diff(where, axis=1)) == 1
    assert abs(near.mean() - 2 / count) < 0.02
