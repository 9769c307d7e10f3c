"""The tables of the fast samplers: their algebra and order of accuracy."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.ddim import ddim_table
from ddpm_engine.samplers.dpm_solver import dpm_solver_table
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.registry import SAMPLERS, build_table
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_engine.samplers.timesteps import listed_timesteps, spaced_timesteps
from ddpm_engine.samplers.unipc import unipc_table
from ddpm_kernels import Column, reverse_step

SCHEDULE = NoiseSchedule.linear()
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero-snr": NoiseSchedule.linear().rescaled_to_zero_terminal_snr(),
}
SPACINGS: Any = ("leading", "trailing", "linspace")
ALL: tuple[str, ...] = tuple(SAMPLERS)
ODE = ("ddim", "dpm++1", "dpm++2m", "dpm++3m", "unipc", "unipc3")
"""The deterministic samplers of one row a step."""
IDS = torch.arange(2)


def run(table: CoefficientTable, model: Any, x: Tensor, rows: int | None = None) -> list[Tensor]:
    """The states after each row, or after the first `rows`, in float64 and without clipping."""
    history = x.new_zeros(max(table.history, 1), *x.shape)
    coefficients = torch.nn.functional.pad(table.rows, (0, 1))
    states = []
    for i in range(table.evaluations if rows is None else rows):
        output = model(x, table.timesteps[i].expand(len(x)))
        x = reverse_step(
            x, output, coefficients, torch.tensor(i), 3, IDS[: len(x)], history=history, clip=False
        )
        states.append(x)
    return states


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64)


# --- Algebra


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(
    ("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.3), ("ddpm", 0.0), ("dpm++2m_sde", 0.0)]
)
def test_marginals(
    schedule: NoiseSchedule, spacing: Any, steps: int, sampler: str, eta: float
) -> None:
    """From q(x_t | x_0), a step with the true x_0 lands on q of the next timestep in the list."""
    table = build_table(schedule, sampler, steps, spacing, "v", variance="fixed_small", eta=eta)
    a, s = noise_levels(schedule, table.timesteps)
    rows = table.rows
    x_0 = rows[:, Column.X0] + rows[:, Column.HISTORY :].sum(1)
    mean = x_0 + rows[:, Column.X] * a[:-1]
    variance = (rows[:, Column.X] * s[:-1]).square() + rows[:, Column.NOISE].square()
    torch.testing.assert_close(mean, a[1:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variance, s[1:].square(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("sampler", ODE)
@pytest.mark.parametrize("steps", [1, 3, 15])
def test_constant_estimates_are_followed_exactly(
    schedule: NoiseSchedule, sampler: str, steps: int
) -> None:
    """x = a x_0 + s ε with the same x_0 and ε throughout."""
    table = build_table(schedule, sampler, steps, prediction="x0")
    a, s = noise_levels(schedule, table.timesteps)
    x_0, noise = normal(2, 2, 3, 3)
    states = run(table, lambda x, t, c=None: x_0, a[0] * x_0 + s[0] * noise)
    for i, x in enumerate(states):
        torch.testing.assert_close(x, a[i + 1] * x_0 + s[i + 1] * noise, rtol=0, atol=1e-10)
    torch.testing.assert_close(states[-1], x_0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize("steps", [1, 5])
def test_last_row_returns_its_estimate(sampler: str, steps: int) -> None:
    last = build_table(SCHEDULE, sampler, steps).rows[-1]
    assert last[Column.X0].item() == pytest.approx(1, abs=1e-12)
    others = [c for c in range(len(last)) if c >= Column.HISTORY or c in (Column.X, Column.NOISE)]
    if "unipc" not in sampler:  # whose last row corrects the state first, but forgets it
        assert last[others].abs().max() <= 1e-12
    assert last[Column.X].abs() <= 1e-12
    assert last[Column.NOISE] == 0


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("steps", [1, 50])
def test_samplers_that_are_the_same(schedule: NoiseSchedule, steps: int) -> None:
    timesteps = spaced_timesteps(1000, steps)
    ancestral = build_table(schedule, "ddpm", steps, prediction="v", variance="fixed_small").rows
    deterministic = ddim_table(schedule, timesteps, "v").rows
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
    close(ddim_table(schedule, timesteps, "v", eta=1.0).rows, ancestral)
    close(dpm_solver_table(schedule, timesteps, "v", 1, stochastic=True).rows, ancestral)
    close(dpm_solver_table(schedule, timesteps, "v", 1).rows, deterministic)
    listed = build_table(schedule, "euler", prediction="v", timesteps=timesteps.tolist())
    close(listed.rows, deterministic)


def orders(sampler: str, steps: int, schedule: NoiseSchedule = SCHEDULE) -> list[int]:
    """How many estimates each row looks at."""
    rows = build_table(schedule, sampler, steps, prediction="v").rows
    return (1 + (rows[:, Column.HISTORY :] != 0).sum(1)).tolist()


def test_orders_at_the_ends() -> None:
    assert orders("dpm++2m", 5) == [1, 2, 2, 2, 1]
    assert orders("dpm++2m", 20) == [1, *[2] * 18, 1]
    assert orders("dpm++2m_sde", 5) == [1, 2, 2, 2, 1]
    assert orders("dpm++3m", 6) == [1, 2, 3, 3, 2, 1]
    assert orders("dpm++3m", 14) == [1, 2, *[3] * 10, 2, 1]
    assert orders("dpm++3m", 15) == [1, 2, *[3] * 12, 1]
    # With its corrector, one estimate more; the last step forgets the state.
    assert orders("unipc", 6) == [1, 2, 3, 3, 3, 1]
    assert orders("unipc3", 6) == [1, 2, 3, 4, 4, 1]


def test_orders_from_pure_noise() -> None:
    schedule = SCHEDULES["zero-snr"]
    assert orders("dpm++2m", 6, schedule) == [1, 1, 2, 2, 2, 1]
    assert orders("dpm++3m", 6, schedule) == [1, 1, 2, 3, 2, 1]
    assert orders("unipc", 6, schedule) == [1, 2, 2, 3, 3, 1]


@given(
    kind=st.sampled_from(["linear", "cosine", "sigmoid"]),
    timesteps=st.integers(2, 1200),
    sampler=st.sampled_from(ALL),
    spacing=st.sampled_from(SPACINGS),
    zero_snr=st.booleans(),
    data=st.data(),
)
@settings(deadline=None)
def test_rows_are_finite(
    kind: str, timesteps: int, sampler: str, spacing: Any, zero_snr: bool, data: st.DataObject
) -> None:
    schedule = getattr(NoiseSchedule, kind)(timesteps)
    if zero_snr:
        schedule = schedule.rescaled_to_zero_terminal_snr()
    steps = data.draw(st.integers(1, min(timesteps, 60)))
    predictions: list[Any] = ["x0", "v"] if zero_snr else ["eps", "x0", "v"]
    prediction = data.draw(st.sampled_from(predictions))
    options: dict[str, Any] = {
        "variance": data.draw(st.sampled_from(["fixed_small", "fixed_large", "learned_range"])),
        "eta": data.draw(st.floats(0, 1)),
    }
    listed = None
    if data.draw(st.booleans()) or (zero_snr and sampler in ("euler", "heun")):
        listed = spaced_timesteps(timesteps, steps, spacing).tolist()
    table = build_table(
        schedule, sampler, None if listed else steps, spacing, prediction, timesteps=listed,
        **options,
    )  # fmt: skip
    assert table.rows.dtype == torch.float64
    assert bool(table.rows.isfinite().all())
    assert bool((table.rows[:, Column.NOISE] >= 0).all())
    assert bool((table.timesteps.diff() <= 0).all())
    assert len(table.timesteps) == table.evaluations
    if sampler != "heun":
        assert table.evaluations == steps
    elif not zero_snr:
        assert table.evaluations == 2 * steps - 1


def test_interpolated_levels_match_the_schedule_at_whole_timesteps() -> None:
    timesteps = torch.tensor([999, 640, 3, 0])
    for fractional, whole in zip(
        noise_levels(SCHEDULE, timesteps.double()), noise_levels(SCHEDULE, timesteps), strict=True
    ):
        torch.testing.assert_close(fractional, whole, rtol=1e-11, atol=0)


# --- Order of accuracy


class Mixture:
    """The exact network for data from three Gaussians, of one standard deviation, in each pixel."""

    means = np.array([-1.0, -0.2, 0.8])
    weights = np.array([0.3, 0.3, 0.4])
    deviation = 0.4

    def denoise(self, x: np.ndarray, sigma: float) -> np.ndarray:
        """E[x_0 | x_0 + σ ε = x]."""
        variance = self.deviation**2 + sigma**2
        away = x[..., None] - self.means
        logits = np.log(self.weights) - away**2 / (2 * variance)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        means = self.means + self.deviation**2 / variance * away
        return np.asarray((share * means).sum(-1))

    def __call__(self, x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        a, s = (level[:-1].item() for level in noise_levels(SCHEDULE, timesteps[:1].double()))
        return torch.from_numpy(self.denoise(x.numpy() / a, s / a))


# UniPC's corrector adds one to the order of its predictor; see `dpm_solver_table` for dpm++3m.
SLOPES = {
    "ddim": (0.9, 1.1),
    "dpm++2m": (1.85, 2.2),
    "dpm++3m": (1.85, 2.6),
    "unipc": (2.8, 3.4),
    "unipc3": (2.9, 4.0),
    "euler": (0.9, 1.1),
    "heun": (1.85, 2.25),
}


START = np.linspace(-2.5, 2.5, 32)


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    """The state at the smallest σ, by a Runge-Kutta method of order 8."""
    first, last = SCHEDULE.log_sigma.exp()[[-1, 0]].tolist()
    solution = solve_ivp(
        lambda sigma, x: (x - Mixture().denoise(x, sigma)) / sigma, (first, last),
        START * math.sqrt(1 + first**2), "DOP853", rtol=1e-11, atol=1e-11,
    )  # fmt: skip
    return np.asarray(solution.y[:, -1] / math.sqrt(1 + last**2))


@pytest.mark.parametrize("sampler", SLOPES)
def test_order_of_accuracy(sampler: str, exact: np.ndarray) -> None:
    """Steps are even in log σ."""
    mixture, known = Mixture(), SCHEDULE.log_sigma.numpy()
    counts, errors = [32, 64, 128], []
    for count in counts:
        levels = np.linspace(known[-1], known[0], count + 1)
        timesteps = torch.from_numpy(np.interp(levels, known, np.arange(1000)))
        table = SAMPLERS[sampler](SCHEDULE, timesteps, "x0")
        state = run(
            table, mixture, torch.from_numpy(START).reshape(1, 1, 4, 8), len(table.rows) - 1
        )
        errors.append(np.abs(state[-1].numpy().ravel() - exact).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert SLOPES[sampler][0] <= slope <= SLOPES[sampler][1]


# --- Invalid requests


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "the list of timesteps is empty"),
        ([999, 500, 500, 3], r"timestep 500 \(entry 2 of the list\) is not below the 500 before"),
        ([10, 20], r"timestep 20 \(entry 1 of the list\) is not below the 10 before it"),
        ([1000, 3], r"timestep 1000 \(entry 0 of the list\) is outside the schedule's 0 to 999"),
        ([3, -1], r"timestep -1 \(entry 1 of the list\) is outside"),
        ([3.5, 1], r"timestep 3.5 \(entry 0 of the list\) is not a whole number"),
    ],
)
def test_bad_lists(listed: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_table(SCHEDULE, "ddim", timesteps=listed)


def test_a_list_is_visited_as_it_is() -> None:
    assert listed_timesteps(1000, [999, 30, 0]).tolist() == [999, 30, 0]
    table = build_table(SCHEDULE, "heun", timesteps=[999, 30, 0])
    assert table.timesteps.tolist() == [999, 30, 30, 0, 0]


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("ddim", {"steps": 10, "eta": 1.1}, r"`eta` is 1.1; it must lie in \[0, 1\]"),
        ("ddim", {"steps": 10, "eta": math.nan}, r"`eta` is nan; it must lie in \[0, 1\]"),
        ("plms", {}, r"sampler is 'plms'; it must be one of ddpm, ddim, dpm\+\+"),
        ("heun", {"steps": 0}, "`steps` is 0; a schedule of 1000 timesteps takes"),
        ("euler", {"steps": 1001}, "`steps` is 1001; a schedule of 1000 timesteps takes"),
        ("ddim", {"steps": 10, "timesteps": [3, 2]}, "give only one of them"),
    ],
)
def test_invalid_requests(sampler: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_table(SCHEDULE, sampler, **options)


@pytest.mark.parametrize("sampler", ALL)
def test_pure_noise_needs_another_prediction_or_spacing(sampler: str) -> None:
    prediction: Any = "eps"
    message = r"zero terminal SNR.*predicts x0 or v"
    if sampler in ("euler", "heun"):
        prediction, message = "v", r"sigma is infinite.*list the timesteps"
    with pytest.raises(UserError, match=message):
        build_table(SCHEDULES["zero-snr"], sampler, 10, prediction=prediction)


@pytest.mark.parametrize(("order", "stochastic"), [(0, False), (4, False), (3, True)])
def test_orders_that_do_not_exist(order: int, stochastic: bool) -> None:
    with pytest.raises(ValueError, match=f"order is {order}"):
        dpm_solver_table(SCHEDULE, torch.tensor([3, 2]), "eps", order, stochastic)
    with pytest.raises(ValueError, match="order is 4"):
        unipc_table(SCHEDULE, torch.tensor([3, 2]), "eps", 4)
