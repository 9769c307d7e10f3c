"""Sampling: which timesteps, the ancestral table, the loop, and what it recovers exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sampling import sample, trajectory
from tests.tiny import TINY
from torch import Tensor

from ddpm_engine.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_engine.diffusion.process import posterior
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import UNCONDITIONAL, Conditioning
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.ddpm import ddpm_table
from ddpm_engine.samplers.timesteps import spaced_timesteps
from ddpm_kernels import Column, Stream, gaussian_noise

SCHEDULE = NoiseSchedule.linear()
SHORT = NoiseSchedule.linear(20, 1e-3, 0.4)
SHAPE = (2, 3, 5)
SPACINGS: Any = ("leading", "trailing", "linspace")
PREDICTIONS: Any = ("eps", "x0", "v")
VARIANCES: Any = ("fixed_small", "fixed_large")


def elementwise(x: Tensor, timesteps: Tensor, conditioning: Conditioning = UNCONDITIONAL) -> Tensor:
    """A network whose arithmetic is the same in every batch."""
    labels = 0 if conditioning.labels is None else conditioning.labels
    shift = timesteps / 1000 + labels
    return 0.3 * x + 0.1 * shift[:, None, None, None]


# --- Spacings


@pytest.mark.parametrize(
    ("steps", "spacing", "first", "second", "last"),
    [
        (50, "leading", 980, 960, 0),
        (300, "leading", 897, 894, 0),
        (50, "trailing", 999, 979, 19),
        (3, "trailing", 999, 666, 332),
        (50, "linspace", 999, 979, 0),
        (3, "linspace", 999, 500, 0),
        (1, "leading", 0, None, 0),
        (1, "trailing", 999, None, 999),
        (1000, "leading", 999, 998, 0),
        (1000, "trailing", 999, 998, 0),
        (1000, "linspace", 999, 998, 0),
    ],
)
def test_spacing(steps: int, spacing: Any, first: int, second: int | None, last: int) -> None:
    timesteps = spaced_timesteps(1000, steps, spacing).tolist()
    assert len(timesteps) == steps
    assert timesteps[0] == first
    assert timesteps[-1] == last
    assert second is None or timesteps[1] == second


@given(data=st.data(), timesteps=st.integers(1, 1200), spacing=st.sampled_from(SPACINGS))
def test_any_number_of_steps_visits_distinct_timesteps_downwards(
    data: st.DataObject, timesteps: int, spacing: Any
) -> None:
    steps = data.draw(st.integers(1, timesteps))
    visited = spaced_timesteps(timesteps, steps, spacing)
    assert visited.dtype == torch.int64
    assert len(visited) == steps
    assert bool((visited.diff() < 0).all())
    assert 0 <= int(visited[-1]) <= int(visited[0]) < timesteps
    if steps == timesteps:
        assert visited.tolist() == list(range(timesteps))[::-1]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(UserError, match=rf"`steps` is {steps}; .*1000 timesteps takes 1 to 1000"):
        spaced_timesteps(1000, steps)


def test_unknown_spacing() -> None:
    unknown: Any = "karras"
    with pytest.raises(UserError, match="spacing is 'karras'"):
        spaced_timesteps(1000, 10, unknown)


# --- The table of ancestral sampling


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule.cosine(200)])
def test_full_table_is_the_posterior(
    schedule: NoiseSchedule, prediction: Any, variance: Any
) -> None:
    timesteps = spaced_timesteps(schedule.timesteps, schedule.timesteps)
    table = ddpm_table(schedule, timesteps, prediction, variance)
    generator = torch.Generator().manual_seed(0)
    x_0, x_t = torch.randn(2, schedule.timesteps, generator=generator, dtype=torch.float64)
    rows = table.rows
    assert rows.dtype == torch.float64
    assert torch.equal(table.timesteps, timesteps)
    mean, posterior_variance = posterior(schedule, x_0, x_t, timesteps)
    torch.testing.assert_close(
        rows[:, Column.X0] * x_0 + rows[:, Column.X] * x_t, mean, rtol=1e-10, atol=1e-10
    )
    added = posterior_variance if variance == "fixed_small" else schedule.betas[timesteps]
    torch.testing.assert_close(rows[:-1, Column.NOISE] ** 2, added[:-1], rtol=1e-10, atol=0)
    assert rows[-1, Column.NOISE] == 0
    # The first two columns recover the image from what the network would have to say of it.
    a, s = schedule.sqrt_alpha_bar[timesteps], schedule.sqrt_one_minus_alpha_bar[timesteps]
    output = PARAMETERIZATIONS[prediction]().from_x0(x_0, x_t, a, s)
    recovered = rows[:, Column.X0_FROM_X] * x_t + rows[:, Column.X0_FROM_OUTPUT] * output
    torch.testing.assert_close(recovered, x_0, rtol=0, atol=1e-9)
    assert bool((rows[:, Column.GUIDANCE] == 1).all())
    assert table.history == 0


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 300])
def test_strided_table_keeps_the_schedule_s_marginals(spacing: Any, steps: int) -> None:
    """From q(x_t | x_0), a step with the true x_0 lands on q of the next timestep in the list."""
    timesteps = spaced_timesteps(1000, steps, spacing)
    table = ddpm_table(SCHEDULE, timesteps, variance="fixed_small")
    alpha_bar = SCHEDULE.alpha_bar[timesteps].tolist()
    rows = table.rows.tolist()
    for i, row in enumerate(rows):
        after = alpha_bar[i + 1] if i + 1 < steps else 1.0
        mean = row[Column.X0] + row[Column.X] * math.sqrt(alpha_bar[i])
        variance = row[Column.X] ** 2 * (1 - alpha_bar[i]) + row[Column.NOISE] ** 2
        assert mean == pytest.approx(math.sqrt(after), rel=1e-10)
        assert variance == pytest.approx(1 - after, rel=1e-9, abs=1e-13)
    assert rows[-1][Column.X0] == pytest.approx(1, rel=1e-12)
    assert rows[-1][Column.X] == pytest.approx(0, abs=1e-12)


def test_strided_fixed_large_adds_the_variance_of_the_whole_stride() -> None:
    timesteps = torch.tensor([999, 500, 30])
    noise = ddpm_table(SCHEDULE, timesteps, variance="fixed_large").rows[:, Column.NOISE]
    kept = [math.prod(SCHEDULE.alphas[a + 1 : b + 1].tolist()) for a, b in ((500, 999), (30, 500))]
    assert noise.tolist() == pytest.approx([*(math.sqrt(1 - k) for k in kept), 0.0], rel=1e-12)


# --- The loop


def run(
    ids: Tensor, steps: int, model: Any = elementwise, **options: Any
) -> list[tuple[int, float, Tensor, Tensor]]:
    steps_taken = trajectory(
        model, SHORT, sample_ids=ids, steps=steps, seed=5, shape=SHAPE, **options
    )
    return [(step.index, step.timestep, step.x.clone(), step.x0.clone()) for step in steps_taken]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False])
def test_loop_is_the_algorithm(prediction: Any, clip: bool) -> None:
    """Algorithm 2 of the paper, written out in float64 with the noise of the counter map."""
    ids = torch.tensor([3, 2**32])
    x = gaussian_noise(5, ids, SHAPE, 0, Stream.INITIAL_NOISE).double()
    steps = run(ids, 20, clip=clip, prediction=prediction, variance="fixed_small")
    assert [step[0] for step in steps] == list(range(20))
    assert [step[1] for step in steps] == list(range(20))[::-1]
    for i, t, state, estimate in steps:
        output = elementwise(x, torch.full((2,), t))
        a, s = SHORT.sqrt_alpha_bar[int(t)], SHORT.sqrt_one_minus_alpha_bar[int(t)]
        x_0 = {"eps": (x - s * output) / a, "x0": output, "v": a * x - s * output}[prediction]
        if clip:
            x_0 = x_0.clamp(-1, 1)
        torch.testing.assert_close(estimate.double(), x_0, rtol=1e-5, atol=1e-5)
        mean, variance = posterior(SHORT, x_0, x, torch.tensor([t, t]))
        noise = gaussian_noise(5, ids, SHAPE, i, Stream.SAMPLER_NOISE)
        x = mean + variance.sqrt() * noise
        torch.testing.assert_close(state.double(), x, rtol=1e-5, atol=1e-5)


def test_last_step_returns_its_estimate() -> None:
    steps = run(torch.arange(4), 5)
    _, _, x, x0 = steps[-1]
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)
    assert x.dtype == torch.float32
    assert x.shape == (4, *SHAPE)


def test_clip_bounds_every_estimate() -> None:
    clipped, free = (run(torch.arange(8), 20, clip=clip) for clip in (True, False))
    assert all(x0.abs().max() <= 1 for _, _, _, x0 in clipped)
    assert max(x0.abs().max().item() for _, _, _, x0 in free) > 1


def test_sample_is_the_end_of_the_loop() -> None:
    ids = torch.tensor([9, 4, 2**40])
    options: Any = {"spacing": "leading", "variance": "fixed_small", "prediction": "v"}
    expected = run(ids, 6, clip=False, **options)[-1][2]
    advanced: list[int] = []
    for sample_ids in (ids, ids.tolist()):
        actual = sample(
            elementwise, SHORT, sample_ids=sample_ids, seed=5, steps=6, shape=SHAPE, clip=False,
            batch_size=2, on_step=advanced.append, **options,
        )  # fmt: skip
        assert torch.equal(actual, expected)
    assert sum(advanced) == 2 * 3 * 6


def test_no_pictures() -> None:
    assert sample(elementwise, SHORT, sample_ids=[], shape=SHAPE).shape == (0, *SHAPE)


def test_another_seed_is_another_picture() -> None:
    pictures = [
        sample(elementwise, SHORT, sample_ids=[0, 1], seed=seed, shape=SHAPE) for seed in (0, 1)
    ]
    assert (pictures[0] - pictures[1]).abs().max() > 0.01
    assert (pictures[0][0] - pictures[0][1]).abs().max() > 0.01


def test_labels_go_with_their_pictures() -> None:
    ids, labels = torch.arange(7), torch.tensor([4, 0, 1, 9, 2, 2, 7])
    seen: list[Tensor] = []

    def model(x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        labels = conditioning.labels
        assert labels is not None
        seen.append(labels)
        return elementwise(x, timesteps, Conditioning(0.1 * labels))

    whole = sample(model, SHORT, sample_ids=ids, labels=labels, shape=SHAPE, steps=4)
    split = sample(model, SHORT, sample_ids=ids, labels=labels, shape=SHAPE, steps=4, batch_size=3)
    assert torch.equal(split, whole)
    assert [len(given) for given in seen] == [7] * 4 + [3] * 8 + [1] * 4
    other = sample(model, SHORT, sample_ids=ids, labels=labels * 0, shape=SHAPE, steps=4)
    changed = (other != whole).flatten(1).any(1)
    assert torch.equal(changed, labels != 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "magic"}, r"sampler is 'magic'; it must be one of ddpm"),
        ({"steps": 0}, "`steps` is 0"),
        ({"steps": 21}, "`steps` is 21; .* 20 timesteps"),
        ({"spacing": "even"}, "spacing is 'even'"),
    ],
)
def test_user_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(elementwise, SHORT, sample_ids=[0], shape=SHAPE, **options)


# --- Picture k of a seed is the same picture in every batch

IDS = torch.arange(64) + 2**32 - 32
SHUFFLED = torch.randperm(64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_all_noise_is_bit_identical_in_every_batch(batch_size: int) -> None:
    """With a network whose arithmetic does not depend on the batch, so are the pictures."""
    options: Any = {"seed": 8, "steps": 100, "shape": SHAPE}
    whole = sample(elementwise, SCHEDULE, sample_ids=IDS, **options)
    chosen = SHUFFLED[:9] if batch_size < 64 else SHUFFLED
    part = sample(elementwise, SCHEDULE, sample_ids=IDS[chosen], batch_size=batch_size, **options)
    assert torch.equal(part, whole[chosen])


def test_pictures_of_a_network_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    unet = UNet(TINY).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    options: Any = {"seed": 8, "steps": 100}
    whole = sample(unet, SCHEDULE, sample_ids=IDS, **options)
    assert 0.2 < whole.std() < 2, "the bound is meant for pictures of order one"
    permuted = sample(unet, SCHEDULE, sample_ids=IDS[SHUFFLED], **options)
    differences = [(permuted - whole[SHUFFLED]).abs().max().item()]
    chosen = SHUFFLED[:3]
    for batch_size in (1, 3):
        part = sample(unet, SCHEDULE, sample_ids=IDS[chosen], batch_size=batch_size, **options)
        differences.append((part - whole[chosen]).abs().max().item())
    print("max |difference| permuted, batch 1, batch 3:", *(f"{d:.1e}" for d in differences))
    assert max(differences) <= 1e-4
    assert (whole[0] - whole[1]).abs().max() > 0.01


# --- Exact sampling


def optimal(mean: float, deviation: float, schedule: NoiseSchedule, prediction: Any) -> Any:
    """The best possible network for independent N(mean, deviation²) pixels."""

    def model(x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        a = schedule.sqrt_alpha_bar[timesteps].reshape(-1, 1, 1, 1)
        s = schedule.sqrt_one_minus_alpha_bar[timesteps].reshape(-1, 1, 1, 1)
        gain = a * deviation**2 / (a**2 * deviation**2 + s**2)
        x_0 = mean + gain * (x.double() - a * mean)
        return PARAMETERIZATIONS[prediction]().from_x0(x_0, x.double(), a, s)

    return model


def assert_moments(pictures: Tensor, mean: float, deviation: float, slack: float) -> None:
    """Sample mean and deviation within four standard errors, and a relative slack."""
    n, pixels = pictures.numel(), pictures.double()
    assert abs(pixels.mean().item() - mean) <= 4 * deviation / math.sqrt(n) + 1e-3 * slack
    relative = pixels.std().item() / deviation - 1
    assert abs(relative) <= 4 / math.sqrt(2 * n) + slack, relative


@pytest.mark.parametrize(
    ("prediction", "variance"),
    [("eps", "fixed_small"), ("x0", "fixed_large"), ("v", "fixed_small")],
)
def test_gaussian_data_are_recovered(prediction: Any, variance: Any) -> None:
    model = optimal(0.3, 0.5, SCHEDULE, prediction)
    pictures = sample(
        model, SCHEDULE, sample_ids=range(16), shape=(3, 16, 16), variance=variance,
        prediction=prediction, clip=False, batch_size=16,
    )  # fmt: skip
    assert_moments(pictures, 0.3, 0.5, slack=0.02)


@pytest.mark.parametrize("steps", [20, 7, 2])
def test_standard_normal_data_are_exact_with_the_large_variance(steps: int) -> None:
    """Section 3.2 of the paper: β is the right variance then, for any stride but the last step."""
    options: Any = {"sample_ids": range(64), "shape": (1, 16, 16), "clip": False}
    model = optimal(0.0, 1.0, SHORT, "eps")
    last = 1.0
    for step in trajectory(model, SHORT, **options, steps=steps):
        if step.index < steps - 1:
            assert_moments(step.x, 0.0, 1.0, slack=0)
        last = SHORT.sqrt_alpha_bar[int(step.timestep)].item()
    # The last step returns the mean of what it could have sampled.
    assert_moments(sample(model, SHORT, steps=steps, **options), 0.0, last, slack=0)


@pytest.mark.parametrize("steps", [20, 7, 1])
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_single_point_is_found(steps: int, variance: Any) -> None:
    model = optimal(-0.6, 0.0, SHORT, "eps")
    pictures = sample(
        model, SHORT, sample_ids=range(4), shape=SHAPE, steps=steps, variance=variance
    )
    torch.testing.assert_close(pictures, torch.full_like(pictures, -0.6), rtol=0, atol=1e-5)
