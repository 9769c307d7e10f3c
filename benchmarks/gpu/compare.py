"""The rule that every result is held to.

An error against float64 may be at most twice that of torch's own result in the same precision, plus
the rounding of the result itself, plus a floor that the check states (four ulp of the noise in it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Comparison:
    """One result beside what it should be, at the element where it is worst."""

    what: str
    error: float
    """Absolute, or in the unit that `what` names."""
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the rule holds; a NaN fails it."""
        return self.error <= self.allowed


def largest(values: Tensor) -> float:
    """The largest magnitude; zero of nothing."""
    return float(values.abs().max()) if values.numel() else 0.0


def compare(
    what: str, got: Tensor, own: Tensor, exact: Tensor, floor: Tensor | float = 0.0
) -> Comparison:
    """Hold a result to the rule.

    Args:
        what: the result's name.
        got: what the operation gave.
        own: what torch gives in the same precision.
        exact: float64.
        floor: allowed besides, per element or for all.
    """
    if got.shape != exact.shape:
        raise AssertionError(f"{what} has shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    precision = torch.finfo(got.dtype)
    # The interpreter truncates to bfloat16, which a GPU rounds.
    truncated = got.dtype == torch.bfloat16 and not got.is_cuda
    ulps = 1.0 if truncated else 0.5
    rounding = ulps * precision.eps * exact.abs().clamp(min=precision.tiny)
    allowed = 2 * largest(own.double() - exact) + rounding + floor
    return worst(what, (got.double() - exact).abs(), allowed)


def worst(what: str, error: Tensor, allowed: Tensor) -> Comparison:
    """The element that exceeds what is allowed by most, or comes nearest to it."""
    at = int((error - allowed).argmax())  # a NaN is the largest
    return Comparison(what, float(error.flatten()[at]), float(allowed.flatten()[at]))


def equal(what: str, got: Tensor, expected: Tensor) -> Comparison:
    """Hold a result to be the same to the bit; the error is that of the worst element."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"{what} is {got.dtype} {tuple(got.shape)}, not {expected.dtype} "
            f"{tuple(expected.shape)}"
        )
    if torch.equal(got, expected):
        return Comparison(what, 0.0, 0.0)
    error = largest(got.double() - expected.double())
    return Comparison(what, error or math.nan, 0.0)  # NaN beside NaN is not equal either


def in_ulps(what: str, got: Tensor, expected: Tensor, allowed: float) -> Comparison:
    """Hold a float32 result to within some units in the last place of what is expected."""
    magnitude = expected.abs()
    unit = torch.nextafter(magnitude, magnitude.new_tensor(math.inf)) - magnitude
    error = (got.double() - expected.double()).abs() / unit.double()
    return worst(f"{what}, in ulp", error, torch.full_like(error, allowed))
