"""Parameterizations: all rows agree about the same image and noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_engine.diffusion.parameterization import (
    PARAMETERIZATIONS,
    Edm,
    Epsilon,
    Parameterization,
    convert,
    parameterization,
    see_the_same,
)
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError

SCHEDULE = NoiseSchedule.linear(20)
ROWS: list[Any] = [row() for row in PARAMETERIZATIONS.values()]
rows = st.sampled_from(ROWS)
chain_rows: Any = st.sampled_from([row for row in ROWS if row.takes_timestep])
values = st.floats(-10, 10)
angles = st.floats(0.01, math.pi / 2 - 0.01)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def levels(angle: float) -> tuple[Tensor, Tensor]:
    return number(math.cos(angle)), number(math.sin(angle))


@settings(deadline=None)
@given(x_0=values, eps=values, angle=angles, row=rows)
def test_the_target_is_the_output_that_gives_the_image(
    x_0: float, eps: float, angle: float, row: Parameterization
) -> None:
    a, s = levels(angle)
    z = row.state_scale(a, s) * (a * x_0 + s * eps)
    u, w = row.target(a, s)
    output = u * x_0 + w * eps
    assert row.to_x0(output, z, a, s).item() == pytest.approx(x_0, abs=1e-9)
    assert row.from_x0(number(x_0), z, a, s).item() == pytest.approx(output.item(), abs=1e-7)


@settings(deadline=None)
@given(x_0=values, eps=values, sigma=st.floats(0.01, 100), row=st.sampled_from([Edm(), Edm(0.8)]))
def test_rows_of_a_continuum_hold_in_any_scaling(
    x_0: float, eps: float, sigma: float, row: Parameterization
) -> None:
    """EDM trains with a = 1 and s = σ, samples with a² + s² = 1, with equal inputs."""
    variance_exploding = number(1.0), number(sigma)
    a = (1 + number(sigma) ** 2).rsqrt()
    variance_preserving = a, sigma * a
    seen = [
        (row.state_scale(a, s) * (a * x_0 + s * eps), row.noise_level(a, s, number(0)))
        for a, s in (variance_exploding, variance_preserving)
    ]
    targets = row.target(*variance_exploding), row.target(*variance_preserving)
    for ours, theirs in [*zip(*seen, strict=True), *zip(*targets, strict=True)]:
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(output=values, x_t=values, angle=angles, source=chain_rows, target=chain_rows)
def test_conversions_are_inverted_by_the_way_back(
    output: float, x_t: float, angle: float, source: Any, target: Any
) -> None:
    """Any output at all, whether or not some image and noise would explain it."""
    a, s = levels(angle)
    there = convert(number(output), source, target, number(x_t), a, s)
    assert convert(there, target, source, number(x_t), a, s).item() == pytest.approx(
        output, abs=1e-7
    )


def test_clean_images_and_pure_noise() -> None:
    """At s = 0 the image is x_t, whatever the network predicts; at a = 0, x0 and v define it."""
    one, zero, x_t = number(1.0), number(0.0), number(0.4)
    for name in ("eps", "v"):
        assert PARAMETERIZATIONS[name]().to_x0(number(9.0), x_t, one, zero) == x_t
    assert PARAMETERIZATIONS["x0"]().from_x0(number(0.4), x_t, one, zero) == x_t
    for name, expected in [("x0", 0.3), ("v", -0.3)]:
        row = PARAMETERIZATIONS[name]()
        row.check(zero)
        assert row.to_x0(number(0.3), x_t, zero, one).item() == expected


@pytest.mark.parametrize("name", ["eps", "edm"])
def test_pure_noise_is_refused_where_nothing_can_be_estimated(name: str) -> None:
    with pytest.raises(UserError, match=rf"`prediction` is {name}.*zero terminal SNR.*x0 or v"):
        PARAMETERIZATIONS[name]().check(torch.tensor([0.5, 0.0]))


def test_by_name() -> None:
    assert parameterization("eps", SCHEDULE) == Epsilon()
    assert parameterization("edm", NoiseSchedule.edm(sigma_data=0.8)) == Edm(0.8)
    with pytest.raises(UserError, match=r"`prediction` is score; .* eps, x0, v, edm"):
        parameterization("score", SCHEDULE)


def test_which_networks_have_the_same_inputs() -> None:
    eps, x0, v, edm = (parameterization(name, SCHEDULE) for name in ("eps", "x0", "v", "edm"))
    assert see_the_same(eps, v, SCHEDULE)
    assert see_the_same(x0, eps, SCHEDULE)
    assert see_the_same(edm, edm, SCHEDULE)
    assert not see_the_same(edm, v, SCHEDULE)
