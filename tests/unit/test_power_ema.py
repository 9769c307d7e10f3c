"""Power-function averages: their profiles, and how to combine them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from ddpm_engine.checkpoints.power_ema import (
    MAX_SIGMA_REL,
    Profile,
    combine,
    gamma_from_sigma_rel,
    power_decay,
    sigma_rel_from_gamma,
)
from ddpm_engine.errors import UserError
from ddpm_engine.training.ema import move_towards


def density(profile: Profile) -> Any:
    """p of equation 1, zero after its time."""
    g, t = profile.gamma, profile.time
    return lambda tau: (g + 1) * tau**g / t ** (g + 1) if tau <= t else 0.0


def tracked(trajectory: np.ndarray, gamma: float) -> np.ndarray:
    """The averages after each step, by the update rule: `[T, …]`."""
    decay = power_decay(gamma)
    average, found = np.zeros_like(trajectory[0]), []
    for updates, value in enumerate(trajectory):
        average = decay(updates) * average + (1 - decay(updates)) * value
        found.append(average)
    return np.stack(found)


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94), (MAX_SIGMA_REL, 0.0)])
def test_lengths_of_the_paper(length: float, gamma: float) -> None:
    assert gamma_from_sigma_rel(length) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("length", [0.001, 0.1, 0.28])
def test_a_length_is_the_deviation_of_its_profile(length: float) -> None:
    gamma = gamma_from_sigma_rel(length)
    assert sigma_rel_from_gamma(gamma) == pytest.approx(length, rel=1e-9)
    if length < 0.02:  # too narrow for the quadrature
        return
    p = density(Profile(gamma, 1))
    mean, square = (quad(lambda tau, k=k: tau**k * p(tau), 0, 1)[0] for k in (1, 2))
    assert (square - mean**2) ** 0.5 == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 6.94])
def test_the_update_rule_gives_the_profile(gamma: float) -> None:
    """Weights that stay as they are for a step each are averaged with the profile's integrals."""
    trajectory = np.random.default_rng(0).normal(size=(50, 3))
    edges = (np.arange(51) / 50) ** (gamma + 1)
    expected = (np.diff(edges)[:, None] * trajectory).sum(0)
    np.testing.assert_allclose(tracked(trajectory, gamma)[-1], expected, rtol=1e-10)
    if gamma == 0:
        np.testing.assert_allclose(expected, trajectory.mean(0), rtol=1e-12)


def test_an_ema_with_that_decay_forgets_how_it_began() -> None:
    average, decay = torch.tensor([1e3]), power_decay(2.0)
    values = np.random.default_rng(1).normal(size=(30, 1))
    for updates, value in enumerate(values):
        move_towards([average], [torch.tensor(value).float()], torch.tensor(1 - decay(updates)))
    assert average.item() == pytest.approx(tracked(values, 2.0)[-1, 0], rel=1e-5, abs=1e-4)


def test_a_known_profile_is_itself() -> None:
    known = [
        Profile(gamma_from_sigma_rel(n), t) for n, t in itertools.product((0.05, 0.1), (10, 20, 30))
    ]
    combination = combine(known, known[2])
    np.testing.assert_allclose(combination.weights, [0, 0, 1, 0, 0, 0], atol=1e-6)
    assert combination.relative_error < 1e-6


@pytest.mark.parametrize(
    ("snapshots", "length", "misfit"),
    [(32, 0.15, 0.0023), (8, 0.08, 0.011)],
)
def test_relative_error_of_a_combination(snapshots: int, length: float, misfit: float) -> None:
    """As docs/edm.md says, for snapshots of the lengths 0.05 and 0.1 at even distances."""
    times = range(1000, 1000 * snapshots + 1, 1000)
    known = [Profile(gamma_from_sigma_rel(n), t) for n, t in itertools.product((0.05, 0.1), times)]
    wanted = Profile(gamma_from_sigma_rel(length), 1000 * snapshots)
    assert combine(known, wanted).relative_error == pytest.approx(misfit, rel=0.06)


def test_combined_averages_equal_those_tracked_directly() -> None:
    """Along a noisy path to a goal, with 32 snapshots; half precision would lose accuracy."""
    steps, every = 2048, 64
    rng = np.random.default_rng(0)
    t = np.arange(1, steps + 1)[:, None] / steps
    goal, start, wobble = rng.normal(size=(3, 40))
    noise = 0.3 * rng.normal(size=(steps, 40)).cumsum(0) / steps**0.5
    trajectory = goal + (start - goal) * np.exp(-6 * t) + 0.2 * wobble * np.sin(9 * t) + noise
    kept = [0.05, 0.10]
    of_length = {length: tracked(trajectory, gamma_from_sigma_rel(length)) for length in kept}
    known, snapshots = [], []
    for length, time in itertools.product(kept, range(every, steps + 1, every)):
        known.append(Profile(gamma_from_sigma_rel(length), time))
        snapshots.append(of_length[length][time - 1])
    stored = np.stack(snapshots)
    for length, at_most in [(0.03, 1e-2), (0.07, 2e-3), (0.15, 2e-3), (0.2, 1e-2)]:
        direct = tracked(trajectory, gamma_from_sigma_rel(length))[-1]
        weights = np.array(combine(known, Profile(gamma_from_sigma_rel(length), steps)).weights)
        # Relative to the difference that the length makes.
        scale = min(np.linalg.norm(of_length[other][-1] - direct) for other in kept)
        single, half = (
            np.linalg.norm(weights @ stored.astype(dtype).astype(np.float64) - direct) / scale
            for dtype in (np.float32, np.float16)
        )
        assert single <= at_most
        assert half > 5 * single or length == 0.2


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, float("nan")])
def test_lengths_out_of_range(length: float) -> None:
    with pytest.raises(UserError, match="the length of an average is"):
        gamma_from_sigma_rel(length)
