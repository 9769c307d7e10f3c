"""Diffusion in the plane: the network learns the score, and samples lie on the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_engine.diffusion.flow_schedule import FlowSchedule
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.figures.straight_lines import BestEstimate, ode_states
from ddpm_engine.figures.toy import (
    POINTS,
    PointNetwork,
    Toy,
    score,
    toy_points,
    toy_schedule,
    train_toy,
)
from ddpm_engine.figures.toy_2d import noised, reverse_states


def exact_score(schedule: NoiseSchedule, points: Tensor, x: Tensor, t: int) -> Tensor:
    """∇ log q(x_t) in closed form: q(x_t) is a mixture of a normal around each data point.

    Args:
        schedule: the noise schedule.
        points: `[N, 2]`.
        x: `[B, 2]`.
        t: from 0.
    """
    a, variance = schedule.sqrt_alpha_bar[t], 1 - schedule.alpha_bar[t]
    away = a * points.double() - x.double()[:, None]
    share = (-away.square().sum(2) / (2 * variance)).softmax(1)
    return (share[..., None] * away).sum(1) / variance


@pytest.fixture(scope="module")
def moons() -> tuple[Tensor, NoiseSchedule, PointNetwork]:
    points, _ = toy_points("moons")
    schedule = toy_schedule()
    return points, schedule, train_toy(points, schedule, steps=600)


def test_points_are_of_unit_size_and_know_their_place() -> None:
    names: tuple[Toy, ...] = ("swiss_roll", "moons")
    for toy in names:
        points, place = toy_points(toy)
        assert points.shape == (POINTS, 2, 1, 1)
        assert points.mean((0, 2, 3)).abs().max() < 1e-5
        assert points.std() == pytest.approx(1, abs=1e-3)
        assert (place.min(), place.max()) == (0, 1)
        # Neighbours along the curve are neighbours in the plane.
        in_order = points[place.argsort()].flatten(1)
        assert in_order.diff(dim=0).norm(dim=1).median() < 0.25
    with pytest.raises(UserError, match="toy is 'torus'"):
        toy_points("torus")  # type: ignore[arg-type]


def test_the_learnt_field_is_the_score(
    moons: tuple[Tensor, NoiseSchedule, PointNetwork],
) -> None:
    points, schedule, model = moons
    for t, least in ((20, 0.93), (60, 0.98), (150, 0.98)):
        x = noised(points[:200], schedule, t, seed=1)
        learnt = score(model, schedule, x[:, :, None, None], t).flatten(1).double()
        exact = exact_score(schedule, points.flatten(1), x, t)
        agreement = (learnt * exact).sum() / (learnt.norm() * exact.norm())
        assert agreement > least, t


def test_samples_are_pulled_back_to_the_data(
    moons: tuple[Tensor, NoiseSchedule, PointNetwork],
) -> None:
    points, schedule, model = moons
    states = reverse_states(model, schedule, seed=0, count=300)
    assert states.shape == (schedule.timesteps + 1, 300, 2)

    def distance(x: Tensor) -> Tensor:
        return torch.cdist(x, points.flatten(1)).amin(1).mean()

    start, middle, end = (distance(states[i]) for i in (0, 150, -1))
    assert end < 0.1 < middle < start
    # And to all of them: every part of the data has samples nearby.
    assert torch.cdist(points.flatten(1)[:500], states[-1]).amin(1).quantile(0.95) < 0.4


@pytest.mark.parametrize(
    ("schedule", "prediction"), [(NoiseSchedule.linear(), "v"), (FlowSchedule.build(), "flow")]
)
def test_the_best_estimate_leads_to_the_data(schedule: NoiseSchedule, prediction: str) -> None:
    points, _ = toy_points("moons")
    model = BestEstimate(points[:500], schedule, prediction)
    states = ode_states(model, 40, seed=0, count=50)
    assert states.shape == (41, 50, 2)
    assert torch.cdist(states[-1], points[:500].flatten(1)).amin(1).median() < 0.02
    # At any level the output is that of the mean of the data, weighted by their likelihood.
    t = 300
    x = states[10][:, :, None, None]
    exact = exact_score(schedule, points[:500].flatten(1), x.flatten(1), t)
    a, s = schedule.sqrt_alpha_bar[t], schedule.sqrt_one_minus_alpha_bar[t]
    row = model.row
    z = row.state_scale(a, s) * x.double()
    level = row.noise_level(a, s, torch.tensor(t)).expand(50)
    x0 = row.to_x0(model(z, level).double(), z, a, s).flatten(1)
    torch.testing.assert_close((a * x0 - x.flatten(1)) / s**2, exact, rtol=1e-4, atol=1e-4)


def test_samples_do_not_depend_on_their_number(
    moons: tuple[Tensor, NoiseSchedule, PointNetwork],
) -> None:
    _, schedule, model = moons
    few, many = (reverse_states(model, schedule, seed=3, count=n)[-1] for n in (2, 50))
    assert torch.allclose(few, many[:2], atol=1e-4)
