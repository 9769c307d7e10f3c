"""Power-function averages of the weights, and how others are made of them afterwards.

The average with exponent γ after t updates weighs the weights θ(τ) of earlier ones by τ^γ,

    θ̂_γ(t) = ∫_0^t p(τ) θ(τ) dτ,     p(τ) = (γ + 1) τ^γ / t^(γ+1)                    (equation 1)
    θ̂_γ(t) = β θ̂_γ(t − 1) + (1 − β) θ(t),     β = (1 − 1/t)^(γ+1)                    (equation 2)

so its memory is a fixed share of the training so far. That share, the deviation of the profile p in
units of t, is its *length* σ_rel. Any profile is nearly a linear combination of some that were
kept, and the same combination of their averages is nearly its average.

Source: Karras, Aittala, Lehtinen, Hellsten, Aila & Laine, "Analyzing and Improving the Training
Dynamics of Diffusion Models" (EDM2), 2024, section 3 and appendix C; all in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_engine.config import LONGEST
from ddpm_engine.errors import UserError


def length_of(gamma: float) -> float:
    """σ_rel of an exponent γ ≥ 0 (equation 3)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(length: float) -> float:
    """The exponent γ of a length, the inverse of `length_of` (algorithm 2).

    Raises:
        UserError: a length outside (0, 12^-½], that of γ = 0.
    """
    if not 0 < length <= LONGEST:
        raise UserError(
            f"the length of an average is {length}; it is a share of the training, above 0 and at "
            f"most {LONGEST:.4f}"
        )
    square = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - square, 12.0 - square])
    return max(float(roots.real.max()), 0.0)


def part_of(length: float) -> str:
    """The part of a checkpoint that holds the power-function average of a length."""
    return f"ema-{length:g}"


def power_decay(gamma: float) -> Callable[[int], float]:
    """β of equation 2, from the number t − 1 of updates done before; the first keeps nothing."""
    return lambda updates: (updates / (updates + 1)) ** (gamma + 1)


@dataclass(frozen=True)
class Profile:
    """Which average, and when: p_{γ, t}."""

    gamma: float
    """γ."""
    time: int
    """t > 0, how many updates it is of."""


@dataclass(frozen=True)
class Combination:
    """A profile as a combination of others."""

    weights: list[float]
    """Of each of those that are known; their sum is nearly one."""
    misfit: float
    """L2 norm of the difference from the profile wanted, as a share of that profile's norm."""


def combine(known: Sequence[Profile], wanted: Profile) -> Combination:
    """The combination of known profiles that is nearest to another, by least squares (algorithm 3).

    Args:
        known: at least one, each another.
        wanted: best with a time that one of them has.
    """
    among = _products(known, known)
    towards = _products(known, [wanted])[:, 0]
    weights = np.linalg.lstsq(among, towards, rcond=None)[0]
    norm = float(_products([wanted], [wanted])[0, 0])
    square = norm - 2 * weights @ towards + weights @ among @ weights
    return Combination(weights.tolist(), math.sqrt(max(float(square), 0.0) / norm))


def _products(rows: Sequence[Profile], columns: Sequence[Profile]) -> np.ndarray:
    """∫ p_a(τ) p_b(τ) dτ of each pair (equation 17), over what both times have in common."""
    time_a = np.array([[profile.time] for profile in rows], dtype=np.float64)
    time_b = np.array([profile.time for profile in columns], dtype=np.float64)
    gamma_a = np.array([[profile.gamma] for profile in rows], dtype=np.float64)
    gamma_b = np.array([profile.gamma for profile in columns], dtype=np.float64)
    exponent = np.where(time_a < time_b, gamma_b, -gamma_a)
    products: np.ndarray = (
        (gamma_a + 1) * (gamma_b + 1) * (time_a / time_b) ** exponent
        / ((gamma_a + gamma_b + 1) * np.maximum(time_a, time_b))
    )  # fmt: skip
    return products
