"""The order of samples: a pure function of seed and position, with random access.

A position counts samples from the beginning of training, over all epochs and all ranks. Each epoch
is a permutation of the whole set: shards are permuted, the permuted shards are grouped into windows
of a few, and samples are permuted within their window, so that a reader needs only a few shards at
a time. Positions map to windows, and places in a window to shards, by prefix sums; the permutation
within a window is evaluated at single places (see `Permutation`). So a look-up costs the same in
sets of any size and for any number of ranks, and there is no state: to resume is to know the
position.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ddpm_engine.errors import UserError
from ddpm_kernels.philox import Stream, random_words

Indices = NDArray[np.int64]

_ROUNDS = 6


class Permutation:
    """A random permutation of [0, count), evaluated at single places.

    A Feistel network (Luby & Rackoff 1988) permutes the smallest set of 4^k numbers that holds
    them; its round function is the finalizer of MurmurHash3 under keys from Philox. Values outside
    [0, count) are permuted again until they are inside, fewer than 4 times on average (cycle
    walking, Black & Rogaway 2002).

    Args:
        count: from 1 to 2⁶².
        seed: any int64.
        identity: number of the permutation within the epoch.
        epoch: from 0.
        stream: tag that separates uses of one seed.
    """

    def __init__(self, count: int, seed: int, identity: int, epoch: int, stream: Stream) -> None:
        self._count = np.uint64(count)
        half = max(1, (int(count - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        words = random_words(seed, torch.tensor([identity]), 2 * _ROUNDS, epoch, stream)[0]
        pairs = words.numpy().astype(np.uint64).reshape(_ROUNDS, 2)
        self._keys = list(pairs[:, 0] << np.uint64(32) | pairs[:, 1])

    def __call__(self, places: Indices) -> Indices:
        """Permute places: int64 `[N]` to int64 `[N]`."""
        values = self._feistel(places.astype(np.uint64))
        outside = np.flatnonzero(values >= self._count)
        while outside.size:
            values[outside] = self._feistel(values[outside])
            outside = outside[values[outside] >= self._count]
        return values.astype(np.int64)

    def _feistel(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half | right


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the 64-bit finalizer of MurmurHash3; products wrap."""
    words = (words ^ words >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    words = (words ^ words >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return words ^ words >> np.uint64(33)


class Order:
    """The map from positions to sample indices.

    Samples are counted through the shards in their own order: sample i of shard s has index
    `sum(shard_sizes[:s]) + i`.

    It keeps a few numbers per shard, of the last epoch only.

    Args:
        shard_sizes: samples of each shard, `[S]`; empty shards are allowed, an empty set is not.
        seed: any int64.
        window_shards: shards per window. More of them mix better and keep more files open.

    Raises:
        UserError: no samples, a negative size, or `window_shards` below 1.
    """

    def __init__(self, shard_sizes: ArrayLike, seed: int, window_shards: int = 16) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        if self._sizes.sum() < 1 or self._sizes.min() < 0:
            raise UserError(f"cannot order shards of sizes {self._sizes}: no samples")
        if window_shards < 1:
            raise UserError(
                f"`window_shards` is {window_shards}; it must be at least 1",
                field="window_shards",
            )
        self.seed = seed
        self.window_shards = window_shards
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        # The permutations of the last epoch and window, to be used again.
        self._epoch: tuple[int, Indices, Indices] | None = None
        self._window: tuple[int, int, Permutation] | None = None

    def __len__(self) -> int:
        """Return the number of samples in one epoch."""
        return int(self._sizes.sum())

    def sample_at(self, position: int) -> int:
        """Return the index of the sample at one position ≥ 0."""
        return int(self.samples_at([position])[0])

    def samples_at(self, positions: ArrayLike) -> Indices:
        """Return the indices of the samples at many positions: int64 `[N]` to int64 `[N]`.

        Costs a pass over the shards per epoch other than the last one used, a few hashes per
        window, and a few operations per position.

        Raises:
            ValueError: a negative position.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and wanted.min() < 0:
            raise ValueError(f"positions count from 0; got {wanted.min()}")
        samples = np.empty_like(wanted)
        epochs, within = np.divmod(wanted, len(self))
        for epoch in np.unique(epochs):
            shards, before = self._shards_of(int(epoch))
            windows = np.searchsorted(before[:: self.window_shards], within, side="right") - 1
            for window in np.unique(windows[epochs == epoch]):
                chosen = (epochs == epoch) & (windows == window)
                first = int(window) * self.window_shards
                last = min(first + self.window_shards, len(shards))
                start, end = before[first], before[last]
                permutation = self._permutation_of(int(epoch), int(window), int(end - start))
                places = permutation(within[chosen] - start) + start
                slots = np.searchsorted(before[first:last], places, side="right") - 1 + first
                samples[chosen] = self._starts[shards[slots]] + places - before[slots]
        return samples

    def _shards_of(self, epoch: int) -> tuple[Indices, Indices]:
        """Return an epoch's permutation of shards `[S]`, and the samples before each `[S + 1]`."""
        if self._epoch is None or self._epoch[0] != epoch:
            everything = torch.arange(len(self._sizes))
            words = random_words(self.seed, everything, 2, epoch, Stream.SHARD_ORDER).numpy()
            keys = words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1].astype(np.uint64)
            # Stable, so that a tie (one in 2⁶⁴ per pair) gives the same permutation everywhere.
            shards = np.argsort(keys, kind="stable")
            self._epoch = (epoch, shards, np.concatenate([[0], np.cumsum(self._sizes[shards])]))
        return self._epoch[1:]

    def _permutation_of(self, epoch: int, window: int, count: int) -> Permutation:
        if self._window is None or self._window[:2] != (epoch, window):
            permutation = Permutation(count, self.seed, window, epoch, Stream.SAMPLE_ORDER)
            self._window = (epoch, window, permutation)
        return self._window[2]


def rank_positions(step: int, global_batch: int, rank: int, world_size: int) -> range:
    """Return the positions that a rank handles at a step.

    Step k is [k·B, (k+1)·B), of which rank r takes the r-th contiguous slice. All ranks together
    cover each step exactly once whatever their number, so a run may resume on another world size.

    Raises:
        UserError: `global_batch` is not a positive multiple of `world_size`.
        ValueError: `rank` is not in [0, world_size) or `step` is negative.
    """
    if world_size < 1 or global_batch < 1 or global_batch % world_size:
        raise UserError(
            f"global batch {global_batch} is not divisible by {world_size} processes; "
            "choose a multiple of the world size"
        )
    if not 0 <= rank < world_size or step < 0:
        raise ValueError(f"no rank {rank} of {world_size} at step {step}")
    share = global_batch // world_size
    first = step * global_batch + rank * share
    return range(first, first + share)
