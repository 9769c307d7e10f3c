"""Improved precision and recall (Kynkäänniemi et al. 2019): fidelity apart from diversity.

The manifold of a set is the union of balls around its features, each of which reaches to the k-th
nearest neighbour of its centre. Precision is the share of samples within the real manifold, recall
the share of real images within the generated one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_engine.errors import UserError

NEIGHBOUR = 3
"""k, the paper's choice."""
FEWEST = NEIGHBOUR + 1
"""Images that are needed on either side."""
BLOCK = 4096
"""Rows and columns of distances in memory at a time: 128 MiB."""


class PrecisionRecall(NamedTuple):
    """Both between 0 and 1."""

    precision: float
    recall: float
    neighbour: int
    """k."""


def precision_recall(
    generated: Tensor,
    real: Tensor,
    neighbour: int = NEIGHBOUR,
    block: int = BLOCK,
    on_block: Callable[[], object] = lambda: None,
) -> PrecisionRecall:
    """Compute both; memory grows with the block, not with the square of the number of images.

    Args:
        generated: `[N, D]`, on the device that computes; distances are float64.
        real: `[M, D]`, on the same. Both measures depend on N and M: the paper has N = M.
        neighbour: k.
        block: rows and columns at a time.
        on_block: called after each block of distances, `blocks(N, M)` times, for progress bars.

    Raises:
        UserError: a set has not more than k members.
    """
    smallest = min(len(generated), len(real))
    if smallest <= neighbour:
        raise UserError(
            f"precision-recall needs more than {neighbour} images on each side, one of which has "
            f"{smallest}"
        )
    generated, real = generated.double(), real.double()
    return PrecisionRecall(
        _share_within(generated, real, neighbour, block, on_block),
        _share_within(real, generated, neighbour, block, on_block),
        neighbour,
    )


def blocks(generated: int, real: int, block: int = BLOCK) -> int:
    """Count the blocks of distances that `precision_recall` computes."""
    rows, columns = -(-generated // block), -(-real // block)
    return rows * rows + columns * columns + 2 * rows * columns


def _share_within(
    points: Tensor, centres: Tensor, neighbour: int, block: int, on_block: Callable[[], object]
) -> float:
    """Return the share of points in a ball around any centre."""
    radii = _squared_radii(centres, neighbour, block, on_block)
    inside = 0
    for some in points.split(block):
        found = torch.zeros(len(some), dtype=torch.bool, device=points.device)
        for others, reach in zip(centres.split(block), radii.split(block), strict=True):
            found |= (_squared_distances(some, others) <= reach).any(1)
            on_block()
        inside += int(found.sum())
    return inside / len(points)


def _squared_radii(
    centres: Tensor, neighbour: int, block: int, on_block: Callable[[], object]
) -> Tensor:
    """Squared distance from each to its k-th nearest other: `[N]`."""
    radii = []
    for some in centres.split(block):
        nearest = centres.new_empty(len(some), 0)
        for others in centres.split(block):
            candidates = torch.cat([nearest, _squared_distances(some, others)], dim=1)
            # One more than k: the nearest of all is the centre itself, at distance zero.
            kept = min(neighbour + 1, candidates.shape[1])
            nearest = candidates.topk(kept, largest=False).values
            on_block()
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖x − y‖² of all pairs, `[N, D]` and `[M, D]` to `[N, M]`, none negative."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)
