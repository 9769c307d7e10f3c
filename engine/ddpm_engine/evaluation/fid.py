"""The Fréchet distance between two sets of features (Heusel et al. 2017, equation 6).

With Inception's features it is the Fréchet Inception Distance, FID. Everything here is float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.errors import UserError


@dataclass(frozen=True, eq=False)
class Moments:
    """Of N features of D numbers."""

    count: int
    """N."""
    mean: NDArray[np.float64]
    """`[D]`."""
    covariance: NDArray[np.float64]
    """`[D, D]`, unbiased (divided by N − 1)."""


def moments(blocks: Iterable[NDArray[np.floating]]) -> Moments:
    """Mean and covariance of features that need not fit in memory.

    Blocks are added by Chan, Golub and LeVeque's rule (1983), which never subtracts two large
    numbers; the result does not depend on how features are cut into blocks beyond rounding.

    Args:
        blocks: `[n, D]` each, of any floating type.

    Raises:
        UserError: fewer than two features in all, or one that is not finite.
    """
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for block in blocks:
        if not len(block):
            continue
        features = np.asarray(block, dtype=np.float64)
        if not np.isfinite(features).all():
            raise UserError(
                "a feature is not a finite number; look at the pictures and at the weights of the "
                "feature network"
            )
        block_mean = features.mean(0)
        centred = features - block_mean
        block_scatter = centred.T @ centred
        total = count + len(features)
        if count:
            apart = block_mean - mean
            mean = mean + apart * (len(features) / total)
            outer = np.outer(apart, apart) * (count * len(features) / total)
            scatter = scatter + block_scatter + outer
        else:
            mean, scatter = block_mean, block_scatter
        count = total
    if count < 2:
        raise UserError(f"a covariance needs at least 2 pictures, and there are {count}")
    return Moments(count, mean, scatter / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), the square of the distance proper.

    With roots Σ = R Rᵀ, the trace of (Σ_a Σ_b)^½ is the sum of the singular values of R_aᵀ R_b. So
    nothing is squared whose root is then taken, which would cost half of the digits, and singular
    covariances, those of fewer pictures than features, are like others; a general matrix square
    root meets them with complex numbers, and by custom with an offset on the diagonal.

    Raises:
        ValueError: features of different lengths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.size} and of {b.mean.size} numbers")
    apart = a.mean - b.mean
    trace = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    distance = apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace
    # Of two equal sets, rounding may leave less than nothing.
    return max(float(distance), 0.0)


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """R with R Rᵀ = covariance, `[D, D]`."""
    values, vectors = np.linalg.eigh(covariance)
    # Less than this is the rounding of zero, and its root would not be small.
    noise = values.max() * len(values) * np.finfo(np.float64).eps
    return np.asarray(vectors * np.sqrt(np.where(values > noise, values, 0)))
