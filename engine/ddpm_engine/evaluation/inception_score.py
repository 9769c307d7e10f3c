"""The Inception Score (Salimans et al. 2016): confident about each image, diverse over all.

It never looks at real images: a model that generates one perfect image of each class reaches the
highest score. Report it beside a distance, not instead of one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.subsets import GENERATED, shuffled

SPLITS = 10
FEWEST = 2 * SPLITS
"""Samples that are needed."""


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits, as usually reported."""

    mean: float
    deviation: float
    splits: int


def inception_score(logits: NDArray[np.floating]) -> InceptionScore:
    """Compute exp of the mean KL(p(y | x) ‖ p(y)) in ten splits: 1 to the number of classes.

    Args:
        logits: `[N, K]`: logarithms of p(y | x), up to a constant per image.

    Raises:
        UserError: fewer than 20 images.
    """
    if len(logits) < FEWEST:
        raise UserError(f"is takes {SPLITS} splits of {len(logits)} samples; generate more")
    logs = torch.from_numpy(logits).double().log_softmax(1).numpy()
    scores = []
    for rows in np.array_split(shuffled(len(logs), GENERATED), SPLITS):
        log_shares = logs[rows]
        shares = np.exp(log_shares)
        # p(y) may underflow; then so does every p(y | x), and the product is zero.
        marginal = np.log(shares.mean(0).clip(min=np.finfo(np.float64).tiny))
        scores.append(float(np.exp((shares * (log_shares - marginal)).sum(1).mean())))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), SPLITS)
