"""The training objective: what a sample meets is decided by its position alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from ddpm_engine.data import Batch
from ddpm_engine.objectives import DenoisingObjective
from ddpm_engine.objectives.conditions import Conditions
from ddpm_engine.prediction import Prediction
from ddpm_engine.schedule import NoiseSchedule
from ddpm_kernels import Stream, gaussian_noise

SCHEDULE = NoiseSchedule.linear(100, 1e-3, 0.1)
SHAPE = (2, 5, 6)
MANY = torch.arange(100_000)


def objective(
    prediction: Prediction = "eps", seed: int = 3, **conditions: Any
) -> DenoisingObjective:
    return DenoisingObjective(SCHEDULE, prediction, Conditions(seed, **conditions))


def batch(positions: Tensor, labelled: bool = False) -> Batch:
    """The images of these positions: each determined by its position."""
    images = torch.stack(
        [
            torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(position))
            for position in positions.tolist()
        ]
    )
    images = images.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return Batch(images, positions % 10 if labelled else None, positions)


def model(x: Tensor, timesteps: Tensor, *labels: Tensor) -> Tensor:
    """Something that answers differently for every input."""
    conditioning = timesteps / 100 + (labels[0] if labels else 0)
    return (x * 0.7).sin() + 0.1 * conditioning[:, None, None, None]


# --- The loss


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("conditional", [True, False])
def test_loss_depends_on_the_position_and_not_on_its_batch(
    prediction: Prediction, conditional: bool
) -> None:
    options: dict[str, Any] = {"null_class": 10, "label_dropout": 0.3} if conditional else {}
    loss_of = objective(prediction=prediction, horizontal_flip=True, **options)
    positions = torch.arange(64) + 2**33
    whole = loss_of(model, batch(positions, conditional))
    assert whole.shape == (64,)
    assert whole.dtype == torch.float32
    assert len(set(whole.tolist())) == 64
    for size in (1, 3):
        for chunk in positions[:12].split(size):
            part = loss_of(model, batch(chunk, conditional))
            torch.testing.assert_close(part, whole[chunk - 2**33], rtol=1e-6, atol=0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    permuted = loss_of(model, batch(positions[order], conditional))
    torch.testing.assert_close(permuted, whole[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_network_sees_the_forward_process_and_its_truth_has_no_loss(
    prediction: Prediction, flip: bool
) -> None:
    loss_of = objective(prediction=prediction, horizontal_flip=flip)
    positions = torch.arange(8)
    given = batch(positions)
    draws = loss_of.draw(positions, None)
    x_0 = given.images / 127.5 - 1
    if flip:
        assert draws.flip is not None
        assert 0 < int(draws.flip.sum()) < 8
        x_0 = torch.stack([x.flip(-1) if f else x for x, f in zip(x_0, draws.flip, strict=True)])
    else:
        assert draws.flip is None
    eps = gaussian_noise(3, positions, SHAPE, 0, Stream.TRAINING_NOISE)
    a = SCHEDULE.sqrt_alpha_bar[draws.timesteps].float()[:, None, None, None]
    s = SCHEDULE.sqrt_one_minus_alpha_bar[draws.timesteps].float()[:, None, None, None]
    truth = {"eps": eps, "x0": x_0, "v": a * eps - s * x_0}[prediction]

    def oracle(x_t: Tensor, timesteps: Tensor) -> Tensor:
        assert torch.equal(timesteps, draws.timesteps)
        torch.testing.assert_close(x_t, a * x_0 + s * eps)
        return truth

    assert loss_of(oracle, given).max() < 1e-10
    off_by_half = loss_of(lambda x, t: oracle(x, t) + 0.5, given)
    torch.testing.assert_close(off_by_half, torch.full((8,), 0.25), rtol=1e-5, atol=0)


def test_loss_trains_the_network() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    loss = objective()(lambda x, t: weight * x, batch(torch.arange(4)))
    loss.mean().backward()
    assert weight.grad is not None
    nudged = [
        objective()(lambda x, t, w=w: w * x, batch(torch.arange(4))).mean().item()
        for w in (0.499, 0.501)
    ]
    assert weight.grad.item() == pytest.approx((nudged[1] - nudged[0]) / 0.002, rel=1e-3)


# --- The draws


@pytest.mark.parametrize("seed", [3, -1, 2**62])
def test_draws_depend_on_the_position_alone(seed: int) -> None:
    given = objective(seed=seed, horizontal_flip=True, null_class=10, label_dropout=0.4)
    positions, labels = torch.arange(200) + 2**40, torch.arange(200) % 10
    whole = given.draw(positions, labels)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:57]
    part = given.draw(positions[order], labels[order])
    for name in ("timesteps", "flip", "labels"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[order]), name


def test_another_seed_draws_otherwise() -> None:
    draws = [
        objective(seed=seed, horizontal_flip=True).draw(torch.arange(100), None) for seed in (0, 1)
    ]
    assert not torch.equal(draws[0].timesteps, draws[1].timesteps)
    assert draws[0].flip is not None
    assert draws[1].flip is not None
    assert not torch.equal(draws[0].flip, draws[1].flip)


def test_timesteps_are_uniform() -> None:
    timesteps = objective().draw(MANY, None).timesteps
    counts = timesteps.bincount(minlength=100)
    assert len(counts) == 100
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_half_of_the_images_are_mirrored_at_every_timestep() -> None:
    draws = objective(horizontal_flip=True).draw(MANY, None)
    assert draws.flip is not None
    n = len(MANY)
    assert abs(int(draws.flip.sum()) - n / 2) < 4 * math.sqrt(n) / 2
    mirrored = draws.timesteps[draws.flip].bincount(minlength=100)
    plain = draws.timesteps[~draws.flip].bincount(minlength=100)
    table = torch.stack([mirrored, plain]).numpy()
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_rate(rate: float) -> None:
    given = objective(null_class=10, label_dropout=rate)
    labels = MANY % 10
    drawn = given.draw(MANY, labels).labels
    assert drawn is not None
    dropped = drawn == 10
    assert torch.equal(drawn[~dropped], labels[~dropped])
    n = len(MANY)
    assert abs(int(dropped.sum()) - n * rate) <= 4 * math.sqrt(n * rate * (1 - rate))
    assert torch.equal(labels, MANY % 10)  # the batch keeps its own


def test_conditional_network_without_labels() -> None:
    given = objective(null_class=10)
    with pytest.raises(ValueError, match="labels"):
        given.draw(torch.arange(3), None)
    with pytest.raises(ValueError, match="labels"):
        given(model, batch(torch.arange(3)))


def test_unconditional_network_ignores_labels() -> None:
    given = objective()
    assert given.draw(torch.arange(3), torch.arange(3)).labels is None
    labelled, plain = batch(torch.arange(3), labelled=True), batch(torch.arange(3))
    assert torch.equal(given(model, labelled), given(model, plain))


def test_conditional_network_is_given_the_drawn_labels() -> None:
    given = objective(null_class=10, label_dropout=0.5)
    positions = torch.arange(32)
    expected = given.draw(positions, positions % 10).labels
    seen: list[Tensor] = []

    def watch(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return x

    given(watch, batch(positions, labelled=True))
    assert expected is not None
    assert torch.equal(seen[0], expected)
    assert 0 < int((expected == 10).sum()) < 32
