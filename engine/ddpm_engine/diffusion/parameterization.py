"""What the network may predict: ε, x_0 or v, every conversion between them, and EDM's F.

With a = sqrt(ᾱ_t), s = sqrt(1 − ᾱ_t) and x_t = a x_0 + s ε, the velocity is v = a ε − s x_0
(Salimans & Ho 2022, appendix D). Given x_t, each of the three determines the other two, linearly.

EDM's network is not given x_t but c_in y, and estimates x_0 by

    D(y; σ) = c_skip y + c_out F(c_in y; c_noise),        y = x_0 + σ n

(Karras et al. 2022, table 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ddpm_engine.errors import UserError

Prediction = Literal["eps", "x0", "v", "edm"]
PREDICTIONS: tuple[str, ...] = tuple(kind for kind in get_args(Prediction) if kind != "edm")
"""Those that are made from x_t, and convert into each other."""


def x0_coefficients(prediction: Prediction, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (p, q), shaped as `a`, such that x_0 = p · x_t + q · output.

    Ho et al. 2020, equation 15, of ε; Salimans & Ho 2022, appendix D, of v.

    Args:
        prediction: what the output is.
        a: sqrt(ᾱ), any shape, non-zero if `prediction` is `"eps"`.
        s: sqrt(1 − ᾱ), same shape.

    Raises:
        UserError: `"edm"`, which is no answer to x_t.
        ValueError: an unknown prediction.
    """
    if prediction == "eps":
        return 1 / a, -s / a
    if prediction == "x0":
        return a * 0, a * 0 + 1
    if prediction == "v":
        return a, -s
    if prediction == "edm":
        raise UserError(
            "prediction is 'edm', whose network is shown another input than x_t; this needs a "
            f"network that predicts {', '.join(PREDICTIONS)}"
        )
    raise ValueError(f"prediction is {prediction!r}; it must be one of {', '.join(PREDICTIONS)}")


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The clean image implied by a network output; `a`, `s` broadcast against the images."""
    p, q = x0_coefficients(prediction, a, s)
    return p * x_t + q * output


def from_x0(prediction: Prediction, x_0: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The output that a network would have to give for this clean image; needs s > 0 unless x0.

    Shaped as `x_0`, as is `x_t`; `a`, `s` broadcast against them.
    """
    p, q = x0_coefficients(prediction, a, s)
    return (x_0 - p * x_t) / q


def convert(
    output: Tensor, source: Prediction, target: Prediction, x_t: Tensor, a: Tensor, s: Tensor
) -> Tensor:
    """Turn an output of one kind into another, shaped as it.

    Args:
        output: `[B, C, H, W]`, of kind `source`.
        source: what `output` is.
        target: what to return.
        x_t: `[B, C, H, W]`.
        a: sqrt(ᾱ_t), broadcastable to `x_t`; `s` = sqrt(1 − ᾱ_t) likewise.
        s: see `a`.
    """
    if source == target:
        return output
    return from_x0(target, to_x0(source, output, x_t, a, s), x_t, a, s)


@dataclass(frozen=True, eq=False)
class Preconditioning:
    """The factors at some noise levels, each shaped as σ."""

    skip: Tensor
    """c_skip = σ_data² / (σ² + σ_data²)."""
    out: Tensor
    """c_out = σ σ_data / sqrt(σ² + σ_data²)."""
    input: Tensor
    """c_in = 1 / sqrt(σ² + σ_data²)."""
    noise: Tensor
    """c_noise = ln(σ) / 4, what the network is told of the noise level."""


def preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """The factors of D.

    Args:
        sigma: σ > 0, any shape, best float64.
        sigma_data: σ_data > 0, the deviation of the images' values.
    """
    deviation = (sigma.square() + sigma_data**2).sqrt()
    return Preconditioning(
        skip=(sigma_data / deviation).square(),
        out=sigma * sigma_data / deviation,
        input=1 / deviation,
        noise=sigma.log() / 4,
    )
