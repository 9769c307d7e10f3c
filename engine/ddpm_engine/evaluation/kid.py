"""The kernel distance between two sets of features (Bińkowski et al. 2018).

With Inception's features it is the Kernel Inception Distance, KID. Unlike the Fréchet distance its
expectation does not depend on how many pictures there are, so that few suffice to compare models.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.subsets import DRAWN, REAL, shuffled

_LARGEST_BLOCK = 1000
_FEWEST_BLOCKS = 10
_SMALLEST_BLOCK = 2


class KernelDistance(NamedTuple):
    """An estimate from disjoint blocks of pictures."""

    mean: float
    """Of the blocks' estimates; may be slightly negative where there is no difference."""
    deviation: float
    """Standard deviation of one block's estimate."""
    error: float
    """Standard error of the mean: the deviation over the root of the number of blocks."""
    blocks: int
    block_size: int
    """Pictures of either side in each."""


def polynomial_kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """k(x, y) = (x·y / D + 1)³ of all pairs: `[N, D]` and `[M, D]` to `[N, M]`."""
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def squared_mmd(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, equation 3).

    The mean of k(a_i, a_j) and of k(b_i, b_j) over i ≠ j, less twice that of k(a_i, b_j).

    Args:
        a: `[N, D]`, N ≥ 2.
        b: `[M, D]`, M ≥ 2.
    """

    def within(x: NDArray[np.float64]) -> float:
        kernel = polynomial_kernel(x, x)
        return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(polynomial_kernel(a, b).mean())


def kernel_distance(drawn: NDArray[np.floating], real: NDArray[np.floating]) -> KernelDistance:
    """Mean and spread of `squared_mmd` over disjoint blocks.

    Blocks have 1000 pictures, or a tenth of the smaller set where that is less: the size changes
    the spread, never the expectation. They do not overlap, so that the error given is one.

    Args:
        drawn: `[N, D]`.
        real: `[M, D]`.

    Raises:
        UserError: fewer than 20 pictures on a side.
    """
    smaller = min(len(drawn), len(real))
    size = min(_LARGEST_BLOCK, smaller // _FEWEST_BLOCKS)
    if size < _SMALLEST_BLOCK:
        raise UserError(
            f"kid compares {len(drawn)} pictures with {len(real)}; give it at least "
            f"{_SMALLEST_BLOCK * _FEWEST_BLOCKS} of each"
        )
    blocks = smaller // size
    drawn_rows = shuffled(len(drawn), DRAWN)[: blocks * size].reshape(blocks, size)
    real_rows = shuffled(len(real), REAL)[: blocks * size].reshape(blocks, size)
    estimates = [
        squared_mmd(drawn[some].astype(np.float64), real[others].astype(np.float64))
        for some, others in zip(drawn_rows, real_rows, strict=True)
    ]
    deviation = float(np.std(estimates, ddof=1))
    return KernelDistance(
        float(np.mean(estimates)), deviation, deviation / blocks**0.5, blocks, size
    )
