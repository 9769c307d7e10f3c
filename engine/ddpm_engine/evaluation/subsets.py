"""In which order a metric goes through pictures: a pure function, like every other order here."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_kernels.philox import Stream, random_words

REAL, DRAWN = 0, 1
"""Each side of a comparison has an order of its own."""


def shuffled(count: int, side: int) -> NDArray[np.int64]:
    """A permutation of 0 … count − 1, the same at any time and on any machine: int64 `[count]`.

    Pictures come sorted by class, or with their classes in turn: blocks of either would not be
    like the whole.
    """
    words = random_words(0, torch.arange(count), 2, side, Stream.EVALUATION_ORDER)
    return np.lexsort((words[:, 1].numpy(), words[:, 0].numpy()))


def evenly_spaced(total: int, count: int) -> NDArray[np.int64]:
    """`count` of 0 … total − 1, ascending and as even as whole numbers allow: int64 `[count]`."""
    return np.arange(count, dtype=np.int64) * total // count
