"""The Fréchet distance between two sets of features (Heusel et al. 2017, equation 6).

With Inception's features it is the Fréchet Inception Distance, FID. Everything here is float64, and
computed on the device of the features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_engine.errors import UserError

FEWEST = 2
"""Images that are needed on either side."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of N features of D numbers."""

    count: int
    """N, the number of features."""
    mean: NDArray[np.float64]
    """`[D]`."""
    covariance: NDArray[np.float64]
    """`[D, D]`, unbiased (divided by N − 1)."""


def float64_device(device: torch.device | str) -> torch.device:
    """Return the device, or the CPU in place of one that has no float64."""
    device = torch.device(device)
    return device if device.type == "cuda" else torch.device("cpu")


def moments(blocks: Iterable[NDArray[np.floating]], device: torch.device | str = "cpu") -> Moments:
    """Compute mean and covariance of features that need not fit in memory.

    Blocks are added by Chan, Golub and LeVeque's rule (1983), which never subtracts two large
    numbers; the result does not depend on how features are cut into blocks beyond rounding.

    Args:
        blocks: `[n, D]` each, of any floating type.
        device: that computes them.

    Raises:
        UserError: fewer than two features in all, or one that is not finite.
    """
    count, device = 0, float64_device(device)
    mean = scatter = torch.zeros((), dtype=torch.float64, device=device)
    for block in blocks:
        if not len(block):
            continue
        refuse_not_finite(block)
        features = torch.from_numpy(np.ascontiguousarray(block)).to(device, torch.float64)
        block_mean = features.mean(0)
        centred = features - block_mean
        block_scatter = centred.T @ centred
        total = count + len(features)
        if count:
            apart = block_mean - mean
            mean = mean + apart * (len(features) / total)
            outer = torch.outer(apart, apart) * (count * len(features) / total)
            scatter = scatter + block_scatter + outer
        else:
            mean, scatter = block_mean, block_scatter
        count = total
    if count < FEWEST:
        raise UserError(f"a covariance needs at least {FEWEST} images, and there are {count}")
    return Moments(count, mean.cpu().numpy(), (scatter / (count - 1)).cpu().numpy())


def refuse_not_finite(features: NDArray[np.floating]) -> None:
    """Refuse features that no distance can be computed of.

    Args:
        features: `[N, D]`.

    Raises:
        UserError: one is not finite.
    """
    if not np.isfinite(features).all():
        raise UserError(
            "a feature is not a finite number; look at the images and at the weights of the "
            "feature network"
        )


def frechet_distance(a: Moments, b: Moments, device: torch.device | str = "cpu") -> float:
    """Compute ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½).

    With roots Σ = R Rᵀ, the trace of (Σ_a Σ_b)^½ is the sum of the singular values of R_aᵀ R_b.
    This avoids squaring and taking the root again, which would cost half of the digits, and is
    exact for singular covariances (fewer images than features), where a general matrix square root
    returns complex numbers or needs an offset on the diagonal.

    Args:
        a: moments of one set.
        b: of the other.
        device: that computes it.

    Raises:
        ValueError: features of different lengths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.size} and of {b.mean.size} numbers")
    apart = a.mean - b.mean
    roots = [_root(torch.from_numpy(m.covariance).to(float64_device(device))) for m in (a, b)]
    trace = float(torch.linalg.svdvals(roots[0].T @ roots[1]).sum())
    distance = apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace
    # For two equal sets, rounding may leave a negative number.
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """Return R with R Rᵀ = covariance, float64 `[D, D]`."""
    values, vectors = torch.linalg.eigh(covariance)
    # Smaller values are rounded zeros, whose roots would not be small.
    noise = values.max() * len(values) * torch.finfo(torch.float64).eps
    return vectors * values.where(values > noise, 0).sqrt()
