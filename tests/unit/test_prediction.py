"""Conversions between ε, x_0 and v."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_engine.diffusion.parameterization import (
    PREDICTIONS,
    convert,
    from_x0,
    to_x0,
    x0_coefficients,
)

kinds: Any = st.sampled_from(PREDICTIONS)
values = st.floats(-10, 10)
angles = st.floats(0.01, math.pi / 2 - 0.01)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def truth(x_0: float, eps: float, angle: float) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """x_t, a, s, and what each kind of network would have to say of it."""
    a, s = math.cos(angle), math.sin(angle)
    outputs = {"eps": number(eps), "x0": number(x_0), "v": number(a * eps - s * x_0)}
    return number(a * x_0 + s * eps), number(a), number(s), outputs


@given(x_0=values, eps=values, angle=angles, kind=kinds)
def test_to_and_from_x0(x_0: float, eps: float, angle: float, kind: Any) -> None:
    x_t, a, s, outputs = truth(x_0, eps, angle)
    assert to_x0(kind, outputs[kind], x_t, a, s).item() == pytest.approx(x_0, abs=1e-10)
    back = from_x0(kind, outputs["x0"], x_t, a, s)
    assert back.item() == pytest.approx(outputs[kind].item(), abs=1e-10)


@given(x_0=values, eps=values, angle=angles, source=kinds, target=kinds)
def test_convert(x_0: float, eps: float, angle: float, source: Any, target: Any) -> None:
    x_t, a, s, outputs = truth(x_0, eps, angle)
    actual = convert(outputs[source], source, target, x_t, a, s)
    assert actual.item() == pytest.approx(outputs[target].item(), abs=1e-10)


@given(output=values, x_t=values, angle=angles, source=kinds, target=kinds)
def test_round_trip(output: float, x_t: float, angle: float, source: Any, target: Any) -> None:
    """Any output at all, whether or not some image and noise would explain it."""
    a, s, x = number(math.cos(angle)), number(math.sin(angle)), number(x_t)
    there = convert(number(output), source, target, x, a, s)
    assert convert(there, target, source, x, a, s).item() == pytest.approx(output, abs=1e-7)


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_batches_with_a_timestep_for_each_image(source: Any, target: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x_t, output = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    angle = torch.tensor([0.1, 0.7, 1.5], dtype=torch.float64)
    a, s = angle.cos().reshape(3, 1, 1, 1), angle.sin().reshape(3, 1, 1, 1)
    whole = convert(output, source, target, x_t, a, s)
    assert whole.shape == x_t.shape
    for b in range(3):
        alone = convert(output[b], source, target, x_t[b], angle[b].cos(), angle[b].sin())
        torch.testing.assert_close(whole[b], alone)


def test_clean_images_need_no_division_by_the_noise_level() -> None:
    """At s = 0 the image is x_t itself, whatever the network says of the noise."""
    one, zero, x_t = number(1.0), number(0.0), number(0.4)
    assert to_x0("eps", number(9.0), x_t, one, zero) == x_t
    assert to_x0("v", number(9.0), x_t, one, zero) == x_t
    assert from_x0("x0", number(0.4), x_t, one, zero) == x_t


def test_pure_noise_leaves_x0_and_v_defined() -> None:
    one, zero, x_t = number(1.0), number(0.0), number(0.4)
    assert to_x0("x0", number(0.3), x_t, zero, one).item() == 0.3
    assert to_x0("v", number(0.3), x_t, zero, one).item() == -0.3


def test_unknown_prediction() -> None:
    unknown: Any = "score"
    with pytest.raises(ValueError, match=r"prediction is 'score'; .* eps, x0, v"):
        x0_coefficients(unknown, number(0.6), number(0.8))
