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
from ddpm_kernels import Column, Stream, denoising_loss, gaussian_noise, q_sample

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
    """The noise of the peer's next steps."""
    queue: list[Tensor] = []
    monkeypatch.setattr(scheduling, "randn_tensor", lambda *_, **__: queue.pop())
    return queue


def normal(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, *SHAPE, generator=generator)


def noise_of(step: int) -> Tensor:
    return gaussian_noise(6, IDS, SHAPE, step, Stream.SAMPLER_NOISE)


# --- The forward process


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise(name: str) -> None:
    schedule = SCHEDULES[name]
    betas = DDPMScheduler(beta_schedule=name).betas
    torch.testing.assert_close(schedule.betas.float(), betas, rtol=1e-3, atol=0)
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


def test_velocity_is_the_target_of_the_loss() -> None:
    timesteps = torch.tensor([3, 940])
    images = normal(1)[0]
    noise = gaussian_noise(6, IDS, SHAPE, 0, Stream.TRAINING_NOISE)
    theirs = DDPMScheduler().get_velocity(images, noise, timesteps)
    schedule = SCHEDULES["linear"]
    signal, sigma = schedule.sqrt_alpha_bar.float(), schedule.sqrt_one_minus_alpha_bar.float()
    loss = denoising_loss(theirs, images, timesteps, -sigma, signal, 6, IDS)
    assert loss.max() < 1e-9


# --- Steps


@pytest.mark.parametrize(
    ("prediction", "variance", "spacing", "steps", "clip"),
    [
        ("eps", "fixed_small", "leading", 100, True),
        ("v", "fixed_large", "trailing", 100, True),
        ("x0", "fixed_large", "linspace", 100, False),
        ("v", "fixed_small", "leading", 1000, False),
    ],
)
def test_whole_chain(
    fed: list[Tensor], prediction: Any, variance: Any, spacing: Any, steps: int, clip: bool
) -> None:
    def model(x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        return 0.9 * x.tanh()

    ours = sample(
        model, SCHEDULES["linear"], sample_ids=IDS, seed=6, steps=steps, spacing=spacing,
        variance=variance, shape=SHAPE, prediction=prediction, clip=clip,
    )  # fmt: skip
    peer = DDPMScheduler(
        variance_type=variance, timestep_spacing=spacing, clip_sample=clip,
        prediction_type=PREDICTION_TYPES[prediction],
    )  # fmt: skip
    peer.set_timesteps(steps)
    x = gaussian_noise(6, IDS, SHAPE, 0, Stream.INITIAL_NOISE)
    for i, t in enumerate(peer.timesteps.tolist()):
        fed[:] = [noise_of(i) * (i < steps - 1)]
        x = peer.step(model(x, torch.tensor(t)), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-3)


# --- Exactness


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("timesteps", ["full", "irregular"])
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
