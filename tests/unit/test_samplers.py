"""Sampling: the timesteps, the loop, independence of the batch, and exact recovery."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sampling import sample, trajectory
from tests.tiny import FAMILIES
from torch import Tensor

from ddpm_engine.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import UNCONDITIONAL, Conditioning
from ddpm_engine.samplers.timesteps import spaced_timesteps

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
        (300, "leading", 897, 894, 0),
        (50, "trailing", 999, 979, 19),
        (3, "linspace", 999, 500, 0),
        (1, "leading", 0, None, 0),
        (1, "trailing", 999, None, 999),
        (1000, "linspace", 999, 998, 0),
    ],
)
def test_spacing(steps: int, spacing: Any, first: int, second: int | None, last: int) -> None:
    timesteps = spaced_timesteps(1000, steps, spacing).tolist()
    assert len(timesteps) == steps
    assert timesteps[0] == first
    assert timesteps[-1] == last
    assert second is None or timesteps[1] == second


@settings(deadline=None)
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


# --- The loop


def run(
    ids: Tensor, steps: int, model: Any = elementwise, **options: Any
) -> list[tuple[int, float, Tensor, Tensor]]:
    steps_taken = trajectory(
        model, SHORT, sample_ids=ids, steps=steps, seed=5, shape=SHAPE, **options
    )
    return [(step.index, step.timestep, step.x.clone(), step.x0.clone()) for step in steps_taken]


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


def test_no_samples() -> None:
    assert sample(elementwise, SHORT, sample_ids=[], shape=SHAPE).shape == (0, *SHAPE)


def test_seed_and_id_change_the_sample() -> None:
    images = [
        sample(elementwise, SHORT, sample_ids=[0, 1], seed=seed, shape=SHAPE) for seed in (0, 1)
    ]
    assert (images[0] - images[1]).abs().max() > 0.01
    assert (images[0][0] - images[0][1]).abs().max() > 0.01


def test_labels_follow_their_samples() -> None:
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
        ({"steps": -1}, "`steps` is -1"),
        ({"steps": 21}, "`steps` is 21; .* 20 timesteps"),
        ({"spacing": "even"}, "spacing is 'even'"),
    ],
)
def test_user_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(elementwise, SHORT, sample_ids=[0], shape=SHAPE, **options)


# --- A sample does not depend on its batch

IDS = torch.arange(64) + 2**32 - 32
SHUFFLED = torch.randperm(64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_all_noise_is_bit_identical_in_every_batch(batch_size: int) -> None:
    """With a network whose arithmetic does not depend on the batch, so are the samples."""
    options: Any = {"seed": 8, "steps": 30, "shape": SHAPE}
    whole = sample(elementwise, SCHEDULE, sample_ids=IDS, **options)
    chosen = SHUFFLED[:9] if batch_size < 64 else SHUFFLED
    part = sample(elementwise, SCHEDULE, sample_ids=IDS[chosen], batch_size=batch_size, **options)
    assert torch.equal(part, whole[chosen])


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_a_network_do_not_depend_on_the_batch(family: str) -> None:
    torch.manual_seed(0)
    network = build_network(FAMILIES[family]).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    options: Any = {"seed": 8, "steps": 20}
    whole = sample(network, SCHEDULE, sample_ids=IDS, **options)
    assert 0.2 < whole.std() < 2, "the bound is meant for samples of order one"
    permuted = sample(network, SCHEDULE, sample_ids=IDS[SHUFFLED], **options)
    differences = [(permuted - whole[SHUFFLED]).abs().max().item()]
    chosen = SHUFFLED[:3]
    for batch_size in (1, 3):
        part = sample(network, SCHEDULE, sample_ids=IDS[chosen], batch_size=batch_size, **options)
        differences.append((part - whole[chosen]).abs().max().item())
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


@pytest.mark.parametrize("steps", [7, 1])
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_single_point_is_found(steps: int, variance: Any) -> None:
    model = optimal(-0.6, 0.0, SHORT, "eps")
    images = sample(model, SHORT, sample_ids=range(4), shape=SHAPE, steps=steps, variance=variance)
    torch.testing.assert_close(images, torch.full_like(images, -0.6), rtol=0, atol=1e-5)
