"""Subsets of images that metrics use: pure functions, the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_kernels.philox import Stream, random_words

REAL, GENERATED = 0, 1
"""The two sides of a comparison; each is shuffled independently."""


def shuffled(count: int, side: int) -> NDArray[np.int64]:
    """Return a permutation of 0 … count − 1: int64 `[count]`.

    Images come sorted by class, or with their classes in turn: blocks of either would not be like
    the whole.
    """
    words = random_words(0, torch.arange(count), 2, side, Stream.EVALUATION_ORDER)
    return np.lexsort((words[:, 1].numpy(), words[:, 0].numpy()))


def evenly_spaced(total: int, count: int) -> NDArray[np.int64]:
    """Return `count` of 0 … total − 1, ascending and evenly spaced: int64 `[count]`."""
    return np.arange(count, dtype=np.int64) * total // count
