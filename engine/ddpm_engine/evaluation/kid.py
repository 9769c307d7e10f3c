"""The kernel distance between two sets of features (Bińkowski et al. 2018).

With Inception's features it is the Kernel Inception Distance, KID. Unlike the Fréchet distance its
expectation does not depend on the number of images, so that few suffice to compare models.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.subsets import GENERATED, REAL, shuffled

_LARGEST_BLOCK = 1000
_FEWEST_BLOCKS = 10
_SMALLEST_BLOCK = 2
FEWEST = _SMALLEST_BLOCK * _FEWEST_BLOCKS
"""Images that are needed on either side."""


class KernelDistance(NamedTuple):
    """Estimate from disjoint blocks of images."""

    mean: float
    """Mean of the blocks' estimates; may be slightly negative where the sets do not differ."""
    deviation: float
    """Standard deviation of one block's estimate."""
    error: float
    """Standard error of the mean: the deviation over the root of the number of blocks."""
    blocks: int
    block_size: int
    """Images of either side in each block."""


def polynomial_kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute k(x, y) = (x·y / D + 1)³ of all pairs: `[N, D]` and `[M, D]` to `[N, M]`."""
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def squared_mmd(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Estimate the squared maximum mean discrepancy without bias (Gretton et al. 2012, eq. 3).

    The mean of k(a_i, a_j) and of k(b_i, b_j) over i ≠ j, less twice that of k(a_i, b_j).

    Args:
        a: `[N, D]`, N ≥ 2.
        b: `[M, D]`, M ≥ 2.
    """

    def within(x: NDArray[np.float64]) -> float:
        kernel = polynomial_kernel(x, x)
        return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(polynomial_kernel(a, b).mean())


def kernel_distance(generated: NDArray[np.floating], real: NDArray[np.floating]) -> KernelDistance:
    """Compute mean and spread of `squared_mmd` over disjoint blocks.

    Blocks have 1000 images, or a tenth of the smaller set if that is less: the size changes the
    spread, never the expectation. They do not overlap, so that the standard error is valid.

    Args:
        generated: `[N, D]`.
        real: `[M, D]`.

    Raises:
        UserError: fewer than 20 images on a side.
    """
    smaller = min(len(generated), len(real))
    size = min(_LARGEST_BLOCK, smaller // _FEWEST_BLOCKS)
    if size < _SMALLEST_BLOCK:
        raise UserError(
            f"kid compares {len(generated)} samples with {len(real)} real images; it needs at "
            f"least {FEWEST} of each"
        )
    blocks = smaller // size
    generated_rows = shuffled(len(generated), GENERATED)[: blocks * size].reshape(blocks, size)
    real_rows = shuffled(len(real), REAL)[: blocks * size].reshape(blocks, size)
    estimates = [
        squared_mmd(generated[some].astype(np.float64), real[others].astype(np.float64))
        for some, others in zip(generated_rows, real_rows, strict=True)
    ]
    deviation = float(np.std(estimates, ddof=1))
    return KernelDistance(
        float(np.mean(estimates)), deviation, deviation / blocks**0.5, blocks, size
    )
