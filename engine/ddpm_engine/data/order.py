"""Which sample is n-th: a pure function of the seed, reachable anywhere at once.

A position counts samples from the beginning of training, over all epochs and all ranks. Each epoch
is a permutation of the whole set: shards are permuted, the permuted shards are grouped into windows
of a few, and samples are permuted within their window, so that a reader meets a few shards at a
time. Positions map to windows by prefix sums. Nothing is stored: to resume is to know the position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ddpm_engine.errors import UserError
from ddpm_kernels.philox import Stream, random_words

Indices = NDArray[np.int64]


class Order:
    """The map from positions to sample indices.

    Samples are counted through the shards in their own order: sample i of shard s has index
    `sum(shard_sizes[:s]) + i`.

    Args:
        shard_sizes: samples of each shard; empty shards are allowed, an empty set is not.
        seed: any int64.
        window_shards: shards mixed with each other. More mixes better and touches more files.

    Raises:
        UserError: no samples, a negative size, or `window_shards` below 1.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window_shards: int = 16) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        if self._sizes.sum() < 1 or self._sizes.min() < 0:
            raise UserError(f"cannot order shards of sizes {list(shard_sizes)}: no samples")
        if window_shards < 1:
            raise UserError(f"window_shards must be at least 1, not {window_shards}")
        self.seed = seed
        self.window_shards = window_shards
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        # The last epoch's shard permutation and the last window's samples, to be used again.
        self._epoch: tuple[int, Indices, Indices] | None = None
        self._window: tuple[int, int, Indices] | None = None

    def __len__(self) -> int:
        """Samples of one epoch."""
        return int(self._sizes.sum())

    def sample_at(self, position: int) -> int:
        """Index of the sample at one position ≥ 0."""
        return int(self.samples_at([position])[0])

    def samples_at(self, positions: ArrayLike) -> Indices:
        """Indices of the samples at many positions: int64 `[N]` to int64 `[N]`.

        Costs one pass over each window touched, whatever the epoch.

        Raises:
            ValueError: a negative position.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and wanted.min() < 0:
            raise ValueError(f"positions count from 0; got {wanted.min()}")
        samples = np.empty_like(wanted)
        epochs, within = np.divmod(wanted, len(self))
        for epoch in np.unique(epochs):
            shards, window_starts = self._shards_of(int(epoch))
            windows = np.searchsorted(window_starts, within, side="right") - 1
            for window in np.unique(windows[epochs == epoch]):
                chosen = (epochs == epoch) & (windows == window)
                content = self._samples_of(int(epoch), int(window), shards)
                samples[chosen] = content[within[chosen] - window_starts[window]]
        return samples

    def _shards_of(self, epoch: int) -> tuple[Indices, Indices]:
        """An epoch's shard permutation, and the offset at which each of its windows starts."""
        if self._epoch is None or self._epoch[0] != epoch:
            everything = np.arange(len(self._sizes), dtype=np.int64)
            shards = everything[_shuffle(self.seed, everything, epoch, Stream.SHARD_ORDER)]
            before = np.concatenate([[0], np.cumsum(self._sizes[shards])[:-1]])
            self._epoch = (epoch, shards, before[:: self.window_shards])
        return self._epoch[1:]

    def _samples_of(self, epoch: int, window: int, shards: Indices) -> Indices:
        if self._window is None or self._window[:2] != (epoch, window):
            first = window * self.window_shards
            members = shards[first : first + self.window_shards]
            samples = np.concatenate(
                [np.arange(self._starts[s], self._starts[s] + self._sizes[s]) for s in members]
            )
            samples = samples[_shuffle(self.seed, samples, epoch, Stream.SAMPLE_ORDER)]
            self._window = (epoch, window, samples)
        return self._window[2]


def _shuffle(seed: int, ids: Indices, epoch: int, stream: Stream) -> Indices:
    """Permutation that sorts `ids` by 64 random bits each."""
    words = random_words(seed, torch.from_numpy(ids), 2, epoch, stream).numpy().astype(np.uint64)
    # Stable, so that a tie (one in 2⁶⁴ a pair) is the same permutation everywhere.
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")


def rank_positions(step: int, global_batch: int, rank: int, world: int) -> range:
    """Positions that a rank handles at a step.

    Step k is [k·B, (k+1)·B); rank r takes its r-th contiguous slice. All ranks together cover each
    step exactly once whatever their number, which is why a run may resume on another world size.

    Raises:
        UserError: `global_batch` is not a positive multiple of `world`.
        ValueError: `rank` is not in [0, world) or `step` is negative.
    """
    if world < 1 or global_batch < 1 or global_batch % world:
        raise UserError(
            f"global batch {global_batch} is not divisible by {world} processes; "
            "choose a multiple of the world size"
        )
    if not 0 <= rank < world or step < 0:
        raise ValueError(f"no rank {rank} of {world} at step {step}")
    share = global_batch // world
    first = step * global_batch + rank * share
    return range(first, first + share)
