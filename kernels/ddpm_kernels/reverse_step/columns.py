"""What a row of a sampler's coefficients holds; `op` says what each multiplies."""

from __future__ import annotations

from enum import IntEnum


class Column(IntEnum):
    """Columns of a coefficient table; those of the history ring follow from `HISTORY` on."""

    X0_FROM_X = 0
    X0_FROM_OUTPUT = 1
    X = 2
    X0 = 3
    NOISE = 4
    GUIDANCE = 5
    LOG_VARIANCE_MIN = 6
    LOG_VARIANCE_MAX = 7
    HISTORY = 8
