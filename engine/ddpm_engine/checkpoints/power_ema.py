"""Power-function averages of the weights, and how to make others of them after training.

The average with exponent γ after t updates weighs the weights θ(τ) of earlier ones by τ^γ,

    θ̂_γ(t) = ∫_0^t p(τ) θ(τ) dτ,     p(τ) = (γ + 1) τ^γ / t^(γ+1)                    (equation 1)
    θ̂_γ(t) = β θ̂_γ(t − 1) + (1 − β) θ(t),     β = (1 − 1/t)^(γ+1)                    (equation 2)

so its memory is a fixed share of the training so far. That share, the standard deviation of the
profile p in units of t, is its relative width σ_rel. Any profile is nearly a linear combination of
some that were kept, and the same combination of their averages is nearly its average.

Source: Karras, Aittala, Lehtinen, Hellsten, Aila & Laine, "Analyzing and Improving the Training
Dynamics of Diffusion Models" (EDM2), 2024, section 3 and appendix C; all in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_engine.config import MAX_SIGMA_REL
from ddpm_engine.errors import UserError


def sigma_rel_from_gamma(gamma: float) -> float:
    """Convert an exponent γ ≥ 0 to the relative width σ_rel (equation 3)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Convert a relative width σ_rel to the exponent γ (algorithm 2).

    Raises:
        UserError: a width outside (0, 12^-½].
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise UserError(
            f"the length of an average is {sigma_rel}; it is a share of the training, above 0 and "
            f"at most {MAX_SIGMA_REL:.4f}"
        )
    square = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - square, 12.0 - square])
    return max(float(roots.real.max()), 0.0)


def part_of(sigma_rel: float) -> str:
    """The part of a checkpoint that holds the power-function average of a relative width."""
    return f"ema-{sigma_rel:g}"


def power_decay(gamma: float) -> Callable[[int], float]:
    """Decay β of equation 2, a function of the number t − 1 of updates done before."""
    return lambda updates: (updates / (updates + 1)) ** (gamma + 1)


@dataclass(frozen=True)
class Profile:
    """Profile p_{γ, t} of an average."""

    gamma: float
    """Exponent γ."""
    time: int
    """Number t > 0 of updates that it averages."""


@dataclass(frozen=True)
class Combination:
    """A profile as a combination of others."""

    weights: list[float]
    """Weight of each known profile; the sum is nearly one."""
    relative_error: float
    """L2 norm of the difference from the wanted profile, relative to that profile's norm."""


def combine(known: Sequence[Profile], wanted: Profile) -> Combination:
    """Approximate a profile by a combination of known ones, by least squares (algorithm 3).

    Args:
        known: at least one profile, all different.
        wanted: profile to approximate; best at a time that one of the known ones has.
    """
    among = _products(known, known)
    towards = _products(known, [wanted])[:, 0]
    weights = np.linalg.lstsq(among, towards, rcond=None)[0]
    norm = float(_products([wanted], [wanted])[0, 0])
    square = norm - 2 * weights @ towards + weights @ among @ weights
    return Combination(weights.tolist(), math.sqrt(max(float(square), 0.0) / norm))


def _products(rows: Sequence[Profile], columns: Sequence[Profile]) -> np.ndarray:
    """Inner products ∫ p_a(τ) p_b(τ) dτ (equation 17): float64 `[rows, columns]`."""
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
