"""The order of samples, in small sets and in one of 10⁹ samples in 10⁵ shards."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_engine.data.loader import BatchPositions
from ddpm_engine.data.shuffle import Order, Permutation, rank_positions
from ddpm_engine.errors import UserError
from ddpm_kernels.philox import Stream

SHARDS, PER_SHARD, WORLD_SIZE = 100_000, 10_000, 256

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
seeds = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None, max_examples=40)
@given(sizes, seeds, st.integers(1, 5), st.integers(0, 2**31), st.data())
def test_every_epoch_is_a_permutation_that_can_be_entered_anywhere(
    shard_sizes: list[int], seed: int, window: int, epoch: int, data: st.DataObject
) -> None:
    order = Order(shard_sizes, seed, window)
    positions = np.arange(len(order)) + epoch * len(order)
    samples = order.samples_at(positions)
    assert sorted(samples) == list(range(sum(shard_sizes)))
    chosen = data.draw(st.lists(st.integers(0, len(order) - 1), max_size=8))
    fresh = Order(shard_sizes, seed, window)
    assert [fresh.sample_at(p) for p in positions[chosen].tolist()] == samples[chosen].tolist()
    assert fresh.samples_at(positions[chosen]).tolist() == samples[chosen].tolist()


def test_epochs_and_seeds_differ() -> None:
    order = Order([50] * 8, seed=1, window_shards=3)
    first = order.samples_at(np.arange(400))
    assert not np.array_equal(first, order.samples_at(np.arange(400, 800)))
    assert not np.array_equal(first, Order([50] * 8, 2, 3).samples_at(np.arange(400)))


def test_the_order_is_this_one() -> None:
    # Checkpoints hold a position: an order that changes between versions resumes elsewhere.
    found = Order([4, 3, 5], seed=7, window_shards=2).samples_at(range(12))
    assert found.tolist() == [2, 0, 6, 4, 3, 5, 1, 10, 9, 7, 8, 11]


def test_a_window_reads_only_its_own_shards() -> None:
    samples = Order([10] * 6, seed=3, window_shards=2).samples_at(np.arange(60))
    for window in samples.reshape(3, 20):
        assert len(set(window // 10)) == 2
        assert not np.array_equal(window, np.sort(window))


def test_a_permutation_prefers_no_place() -> None:
    count, trials = 12, 800
    where = np.array(
        [
            Permutation(count, seed, 0, 0, Stream.SAMPLE_ORDER)(np.arange(count))
            for seed in range(trials)
        ]
    )
    table = np.stack([np.bincount(where[:, place], minlength=count) for place in range(count)])
    expected = trials / count
    chi_square = float(((table - expected) ** 2 / expected).sum())
    # 121 degrees of freedom: mean 121, deviation 15.6.
    assert chi_square < 121 + 5 * 15.6
    # Neighbours do not stay neighbours more often than by chance (2/12 of all pairs, ±).
    near = np.abs(np.diff(where, axis=1)) == 1
    assert abs(near.mean() - 2 / count) < 0.02


def test_what_cannot_be_ordered_is_named() -> None:
    for empty in ([0, 0], []):
        with pytest.raises(UserError, match="no samples"):
            Order(empty, 0)
    with pytest.raises(UserError, match="window_shards"):
        Order([1], 0, 0)
    with pytest.raises(ValueError, match="-1"):
        Order([1], 0).sample_at(-1)


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 6))
def test_any_number_of_ranks_covers_a_step_once(step: int, world_size: int, share: int) -> None:
    batch = world_size * share
    slices = [rank_positions(step, batch, rank, world_size) for rank in range(world_size)]
    assert [p for part in slices for p in part] == list(range(step * batch, (step + 1) * batch))


def test_micro_batches_are_the_contiguous_parts_of_a_rank() -> None:
    one = list(BatchPositions(12, rank=1, world_size=2, accumulation=3, start_step=5, end_step=7))
    assert one == [[66, 67], [68, 69], [70, 71], [78, 79], [80, 81], [82, 83]]
    assert len(BatchPositions(12, accumulation=3, start_step=5, end_step=7)) == 6
    endless = iter(BatchPositions(4, start_step=10**9))
    assert next(endless) == [4 * 10**9 + i for i in range(4)]
    with pytest.raises(UserError, match="global batch 10 is not divisible by 4"):
        BatchPositions(10, world_size=4)
    with pytest.raises(UserError, match="accumulation"):
        BatchPositions(8, world_size=2, accumulation=3)


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_depends_on_the_shards_alone() -> None:
    def look_up(per_shard: int) -> int:
        shard_sizes = np.full(SHARDS, per_shard)
        positions = np.arange(64) + 7 * shard_sizes.sum()
        return peak_bytes(lambda: Order(shard_sizes, 1).samples_at(positions))

    few, many = look_up(10), look_up(PER_SHARD)
    assert many < 1.1 * few
    assert many < 100 * SHARDS


def test_a_look_up_permutes_only_its_own_positions() -> None:
    everything = Order([PER_SHARD] * SHARDS, seed=3, window_shards=SHARDS)
    positions = np.random.default_rng(0).integers(0, 10**9, 4096)
    everything.samples_at(positions)  # sorts the shards of the epoch, once
    # A window of 10⁹ samples: its permutation would take gigabytes, and these take 100 kB.
    assert peak_bytes(lambda: everything.samples_at(positions)) < 5e6


def test_all_ranks_together_read_a_window_once() -> None:
    shared = Order([PER_SHARD] * SHARDS, seed=3)
    batch = 16 * WORLD_SIZE
    step = 5 * 10**9 // batch
    seen = [
        shared.samples_at(np.array(rank_positions(step + k, batch, rank, WORLD_SIZE)))
        for k in range(3)
        for rank in range(WORLD_SIZE)
    ]
    samples = np.concatenate(seen)
    assert len(np.unique(samples)) == len(samples)
    # Read in windows: this step and its neighbours are in as many shards, not in all of them.
    assert len(np.unique(samples // PER_SHARD)) <= 2 * shared.window_shards
