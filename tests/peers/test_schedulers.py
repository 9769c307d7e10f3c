"""The diffusion process and ancestral sampling against diffusers' `DDPMScheduler`.

Its tables are float32, ours float64: what must be exact is compared with formulas in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.sampling import sample
from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.ddpm import ddpm_table
from ddpm_engine.samplers.timesteps import spaced_timesteps
from ddpm_kernels import Column, Stream, denoising_loss, gaussian_noise, q_sample, reverse_step

pytest.importorskip("diffusers")
scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
DDPMScheduler = scheduling.DDPMScheduler

SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": NoiseSchedule.linear(),
    "squaredcos_cap_v2": NoiseSchedule.cosine(),
}
PREDICTION_TYPES: dict[Any, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCES: Any = ("fixed_small", "fixed_large")
SHAPE = (3, 6, 5)
IDS = torch.tensor([4, 2**33])

LISTS: dict[str, list[int]] = {
    "full": list(range(1000))[::-1],
    "leading": spaced_timesteps(1000, 50, "leading").tolist(),
    "trailing": spaced_timesteps(1000, 50, "trailing").tolist(),
    "linspace": spaced_timesteps(1000, 50, "linspace").tolist(),
    "irregular": [998, 731, 730, 400, 77, 12, 3],
}


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is put here is what the peer's next step takes for noise."""
    queue: list[Tensor] = []
    monkeypatch.setattr(scheduling, "randn_tensor", lambda *_, **__: queue.pop())
    return queue


def draw(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, *SHAPE, generator=generator)


def noise_of(step: int) -> Tensor:
    return gaussian_noise(6, IDS, SHAPE, step, Stream.SAMPLER_NOISE)


# --- The forward process


def test_linear_betas() -> None:
    theirs = DDPMScheduler(beta_schedule="linear").betas
    torch.testing.assert_close(NoiseSchedule.linear().betas.float(), theirs, rtol=1e-3, atol=0)


def test_cosine_betas() -> None:
    """Which they compute in float64 and round once."""
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas
    torch.testing.assert_close(NoiseSchedule.cosine().betas.float(), theirs, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise(name: str) -> None:
    schedule = SCHEDULES[name]
    images = torch.randint(0, 256, (8, *SHAPE), generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([0, 1, 10, 250, 500, 900, 998, 999])
    ids = torch.arange(8)
    x_t = q_sample(
        images.to(torch.uint8), timesteps, schedule.sqrt_alpha_bar.float(),
        schedule.sqrt_one_minus_alpha_bar.float(), 6, ids,
    )  # fmt: skip
    noise = gaussian_noise(6, ids, SHAPE, 0, Stream.TRAINING_NOISE)
    expected = DDPMScheduler(beta_schedule=name).add_noise(images / 127.5 - 1, noise, timesteps)
    torch.testing.assert_close(x_t, expected, rtol=0, atol=5e-5)


def test_velocity_is_what_the_loss_asks_for() -> None:
    timesteps = torch.tensor([3, 940])
    images = draw(1)[0]
    noise = gaussian_noise(6, IDS, SHAPE, 0, Stream.TRAINING_NOISE)
    theirs = DDPMScheduler().get_velocity(images, noise, timesteps)
    signal, sigma = (
        table.float()
        for table in (
            SCHEDULES["linear"].sqrt_alpha_bar,
            SCHEDULES["linear"].sqrt_one_minus_alpha_bar,
        )
    )
    loss = denoising_loss(theirs, images, timesteps, -sigma, signal, 6, IDS)
    assert loss.max() < 1e-9


# --- Steps


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("timesteps", LISTS)
def test_step(fed: list[Tensor], name: str, prediction: Any, variance: Any, timesteps: str) -> None:
    """Every step of the list, or forty of them, each from a state of its own."""
    peer = DDPMScheduler(
        beta_schedule=name, prediction_type=PREDICTION_TYPES[prediction], variance_type=variance
    )
    visited = LISTS[timesteps]
    if timesteps == "irregular":
        peer.set_timesteps(timesteps=visited)
    elif timesteps != "full":
        peer = DDPMScheduler.from_config(peer.config, timestep_spacing=timesteps)
        peer.set_timesteps(len(visited))
    assert peer.timesteps.tolist() == visited
    table = ddpm_table(SCHEDULES[name], torch.tensor(visited), prediction, variance)
    rows = torch.cat([table.rows.float(), torch.zeros(len(visited), 1)], dim=1)  # for the ring
    chosen = range(len(visited)) if len(visited) <= 50 else [*range(0, 1000, 26), 998, 999]
    states, outputs = draw(2)
    ring = torch.zeros(1, 2, *SHAPE)
    for i in chosen:
        # A list that stops short of zero: the peer would add noise to the finished picture.
        fed[:] = [noise_of(i) * (i < len(visited) - 1)]
        expected = peer.step(outputs, visited[i], states)
        new = reverse_step(states, outputs, rows, torch.tensor(i), 6, IDS, history=ring)
        torch.testing.assert_close(ring[0], expected.pred_original_sample, rtol=0, atol=1e-3)
        torch.testing.assert_close(new, expected.prev_sample, rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_step_without_clipping(fed: list[Tensor], prediction: Any) -> None:
    peer = DDPMScheduler(prediction_type=PREDICTION_TYPES[prediction], clip_sample=False)
    table = ddpm_table(SCHEDULES["linear"], torch.arange(999, -1, -1), prediction, "fixed_small")
    states, outputs = draw(2)
    for i in range(0, 1000, 37):
        fed[:] = [noise_of(i)]
        expected = peer.step(outputs, 999 - i, states).prev_sample
        new = reverse_step(states, outputs, table.rows.float(), torch.tensor(i), 6, IDS, clip=False)
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_whole_chain(fed: list[Tensor], variance: Any, spacing: Any) -> None:
    def model(x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        return 0.9 * x.tanh()

    ours = sample(
        model, SCHEDULES["linear"], sample_ids=IDS, seed=6, steps=100, spacing=spacing,
        variance=variance, shape=SHAPE,
    )  # fmt: skip
    peer = DDPMScheduler(variance_type=variance, timestep_spacing=spacing)
    peer.set_timesteps(100)
    x = gaussian_noise(6, IDS, SHAPE, 0, Stream.INITIAL_NOISE)
    for i, t in enumerate(peer.timesteps.tolist()):
        fed[:] = [noise_of(i) * (i < 99)]
        x = peer.step(model(x, torch.tensor(t)), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-3)


def test_learned_range_variance() -> None:
    """The interpolation of the log-variance, alone and inside a step."""
    schedule = SCHEDULES["linear"]
    peer = DDPMScheduler(variance_type="learned_range")
    _, v = draw(2).clamp(-1, 1)
    x = torch.zeros(2, *SHAPE)
    for t in (1, 2, 50, 500, 999):
        table = torch.zeros(t + 1, Column.HISTORY)
        table[t, Column.NOISE] = 1
        table[t, Column.LOG_VARIANCE_MIN] = schedule.posterior_log_variance_clipped[t]
        table[t, Column.LOG_VARIANCE_MAX] = schedule.betas[t].log()
        output = torch.cat([x, v], dim=1)
        drawn = reverse_step(x, output, table, torch.tensor(t), 6, IDS)
        expected = (0.5 * peer._get_variance(t, v)).exp() * noise_of(t)
        torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=0)


# --- Exactness


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("timesteps", LISTS)
def test_rows_in_float64(name: str, prediction: Any, timesteps: str) -> None:
    """The peer's formulas, with its betas in float64."""
    betas = SCHEDULES[name].betas.numpy()
    alpha_bar = np.cumprod(1 - betas)
    visited = np.array(LISTS[timesteps])
    small, large = (
        ddpm_table(SCHEDULES[name], torch.tensor(visited), prediction, variance).rows.numpy()
        for variance in VARIANCES
    )
    alpha_bar_t = alpha_bar[visited]
    before = np.append(alpha_bar[visited[1:]], 1.0)
    alpha = alpha_bar_t / before
    beta = 1 - alpha
    np.testing.assert_allclose(
        small[:, Column.X0], np.sqrt(before) * beta / (1 - alpha_bar_t), rtol=1e-12
    )
    np.testing.assert_allclose(
        small[:, Column.X], np.sqrt(alpha) * (1 - before) / (1 - alpha_bar_t), rtol=1e-12
    )
    variance = (1 - before) / (1 - alpha_bar_t) * beta
    np.testing.assert_allclose(small[:-1, Column.NOISE], np.sqrt(variance[:-1]), rtol=1e-12)
    np.testing.assert_allclose(large[:-1, Column.NOISE], np.sqrt(beta[:-1]), rtol=1e-12)
    a, s = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
    from_x, from_output = {"eps": (1 / a, -s / a), "x0": (0 * a, 0 * a + 1), "v": (a, -s)}[
        prediction
    ]
    np.testing.assert_allclose(small[:, Column.X0_FROM_X], from_x, rtol=1e-12)
    np.testing.assert_allclose(small[:, Column.X0_FROM_OUTPUT], from_output, rtol=1e-12)
    others = [c for c in Column if c in (Column.X0, Column.X)]
    np.testing.assert_array_equal(small[:, others], large[:, others])
