"""Classifier-free guidance: what to add to a conditional prediction, how much, and when.

    m = u + w (c − u)        c, u: the predictions for the class and for the null class

Source: Ho & Salimans 2022, equation 6, with the weight written as in most software: w = 1 is the
conditional prediction itself. Rescaling: Lin et al. 2023, section 3.4. Limited interval:
Kynkäänniemi et al. 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ddpm_engine.bounds import Ge, Gt, Le, out_of_bounds
from ddpm_engine.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a conditional network.

    Raises:
        UserError: a scale or rescale out of bounds, or an empty interval.
    """

    scale: Annotated[float, Ge(-1000), Le(1000)]
    """Guidance scale w, 1 being no guidance, which saves the second evaluation; default: 1."""
    rescale: Annotated[float, Ge(0), Le(1)] = 0.0
    """Rescale of the guided prediction to the conditional one's deviation, 0 (not) to 1 (wholly);
    default: 0."""
    interval: tuple[Annotated[float, Ge(0)], Annotated[float, Gt(0), Le(math.inf)]] = (
        0.0,
        float("inf"),
    )
    """Interval of noise levels sigma in which steps are guided, above the first and at most the
    second; default: all."""
    two_passes: bool | None = None
    """Whether c and u are evaluated one after the other, with half the memory. None: together, and
    one after the other once memory has run out."""

    def __post_init__(self) -> None:
        for problem in out_of_bounds(self):
            field = f"guidance.{problem.field}"
            raise UserError(str(problem).replace(f"`{problem.field}`", f"`{field}`"), field)
        low, high = self.interval
        if not low < high:
            raise UserError(
                f"`guidance.interval` is {low} to {high}; give two noise levels, the lower first"
            )

    def guides(self, alpha_bar: Tensor) -> list[bool]:
        """Return which steps are guided, from ᾱ before each, float64 `[S]`.

        Their noise level is σ = sqrt((1 − ᾱ) / ᾱ).
        """
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        low, high = self.interval
        within = (sigma > low) & (sigma <= high)
        return [bool(inside) and self.scale != 1 for inside in within]


def combine(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Return the guided prediction m = u + w (c − u).

    Shaped as the predictions `[B, C, H, W]`; the scale w is a number or 0-dim.
    """
    return unconditional + scale * (conditional - unconditional)


def rescale_factor(
    conditional: Tensor, unconditional: Tensor, scale: Tensor, rescale: float
) -> Tensor:
    """Return the factor on each guided prediction: float32 `[B]`.

    φ · std(c) / std(m) + 1 − φ, with deviations over all values of a sample (equations 15, 16).

    Args:
        conditional: c, `[B, C, H, W]`.
        unconditional: u, likewise.
        scale: w, 0-dim, on the device.
        rescale: φ.
    """
    c, u = conditional.float(), unconditional.float()
    guided = combine(c, u, scale)
    ratio = c.std((1, 2, 3), correction=0) / guided.std((1, 2, 3), correction=0)
    return rescale * ratio + (1 - rescale)


def dynamic_threshold(x0: Tensor, percentile: float) -> Tensor:
    """Return the bound of each estimate of x_0, at least 1: float32 `[B]`.

    The given quantile of the sample's absolute values (Saharia et al. 2022, section 2.3).
    """
    magnitudes = x0.float().abs().flatten(1)
    # Linear interpolation between order statistics, without torch.quantile's limit on its input.
    position = percentile * (magnitudes.shape[1] - 1)
    below = int(position)
    # The largest ones down to that below, in descending order, instead of sorting all.
    largest = magnitudes.topk(magnitudes.shape[1] - below, dim=1).values
    above = largest[:, max(largest.shape[1] - 2, 0)]
    bound = torch.lerp(largest[:, -1], above, position - below)
    return bound.clamp(min=1)
