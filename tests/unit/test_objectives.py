"""The training objective: everything random about a sample follows from its position alone."""

from __future__ import annotations

import math
import re
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.parameterization import PARAMETERIZATIONS, parameterization
from ddpm_engine.diffusion.process import add_noise, posterior
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.diffusion.variational_bound import decoder_term, denoising_term
from ddpm_engine.distributed import Ranks
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.objectives.level_sampling import (
    ImportanceTimesteps,
    LogNormalSigma,
    UniformTimesteps,
    WeightedTimesteps,
    logit_normal_probabilities,
)
from ddpm_engine.rules import validate
from ddpm_kernels import Stream, gaussian_noise
from ddpm_kernels.philox import random_words

SCHEDULE = NoiseSchedule.linear(100, 1e-3, 0.1)
SHAPE = (2, 5, 6)
MANY = torch.arange(100_000)
TEN_CLASSES = ConditioningSpec(classes=10)
PLAIN = TrainingInputs(3)


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


def many(labelled: bool = False) -> Batch:
    """Many positions, with next to no images."""
    return Batch(torch.zeros(len(MANY), 1, 1, 1), MANY % 10 if labelled else None, MANY)


def network(x: Tensor, noise_level: Tensor, conditioning: Conditioning | None = None) -> Tensor:
    """Give a different output for every input."""
    labels = None if conditioning is None else conditioning.labels
    shift = noise_level / 100 + (0 if labels is None else labels)
    return (x * 0.7).sin() + 0.1 * shift[:, None, None, None]


def timesteps_of(positions: Tensor) -> Tensor:
    return UniformTimesteps(100).sample(3, positions)


def truth_of(
    positions: Tensor, timesteps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0, ε, a and s of these positions without flips, float64."""
    t = timesteps_of(positions) if timesteps is None else timesteps
    x_0 = (2 * batch(positions).images.double() - 255) / 255
    eps = gaussian_noise(3, positions, SHAPE, 0, Stream.TRAINING_NOISE).double()
    a = SCHEDULE.sqrt_alpha_bar[t][:, None, None, None]
    return x_0, eps, a, SCHEDULE.sqrt_one_minus_alpha_bar[t][:, None, None, None]


# --- The loss


@pytest.mark.parametrize("prediction", PARAMETERIZATIONS)
def test_loss_depends_on_the_position_and_not_on_its_batch(prediction: str) -> None:
    inputs = TrainingInputs(3, TEN_CLASSES, horizontal_flip=True, condition_dropout=0.3)
    loss_of = DenoisingObjective(SCHEDULE, prediction, inputs)
    positions = torch.arange(64) + 2**33
    whole = loss_of(network, batch(positions, True))
    assert whole.shape == (64,)
    assert whole.dtype == torch.float32
    assert len(set(whole.tolist())) == 64
    for chunk in positions[:12].split(3):
        part = loss_of(network, batch(chunk, True))
        torch.testing.assert_close(part, whole[chunk - 2**33], rtol=1e-6, atol=0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    permuted = loss_of(network, batch(positions[order], True))
    torch.testing.assert_close(permuted, whole[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("prediction", "flip"), [(name, name != "v") for name in PARAMETERIZATIONS]
)
def test_network_gets_the_noised_image_and_the_target_has_no_loss(
    prediction: str, flip: bool
) -> None:
    inputs = TrainingInputs(3, horizontal_flip=flip)
    loss_of = DenoisingObjective(SCHEDULE, prediction, inputs)
    positions = torch.arange(8)
    given = batch(positions)
    x_0, eps, a, s = truth_of(positions)
    mirrored = inputs.prepare(given).flip
    assert (mirrored is not None) == flip
    if mirrored is not None:
        assert 0 < int(mirrored.sum()) < 8
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
    row = parameterization(prediction, SCHEDULE)
    u, w = row.target(a, s)
    t = timesteps_of(positions)
    level = row.noise_level(a.flatten(), s.flatten(), t)

    def oracle(z: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        torch.testing.assert_close(noise_level, level.to(noise_level.dtype))
        expected = row.state_scale(a, s) * (a * x_0 + s * eps)
        torch.testing.assert_close(z.double(), expected, rtol=0, atol=1e-5)
        return (u * x_0 + w * eps).float()

    assert loss_of(oracle, given).max() < 1e-10
    off_by_half = loss_of(lambda *inputs: oracle(*inputs) + 0.5, given)
    torch.testing.assert_close(off_by_half, torch.full((8,), 0.25), rtol=1e-4, atol=0)


def test_a_continuum_is_for_networks_that_take_no_timestep() -> None:
    with pytest.raises(UserError, match="`prediction` is v, whose network is given the timestep"):
        DenoisingObjective(SCHEDULE, "v", PLAIN, levels=LogNormalSigma())
    with pytest.raises(ValueError, match="belong to timesteps"):
        DenoisingObjective(SCHEDULE, "edm", PLAIN, levels=LogNormalSigma(), weights=torch.ones(100))


# --- Inputs


@pytest.mark.parametrize("seed", [-1, 2**62])
def test_choices_depend_on_the_position_alone(seed: int) -> None:
    inputs = TrainingInputs(seed, TEN_CLASSES, horizontal_flip=True, condition_dropout=0.4)
    positions = torch.arange(200) + 2**40
    images = torch.zeros(200, 1, 1, 1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:57]
    choices = []
    for chosen in (positions, positions[order]):
        prepared = inputs.prepare(Batch(images[: len(chosen)], chosen % 10, chosen))
        levels = [
            sampler.sample(seed, chosen)
            for sampler in (
                UniformTimesteps(100),
                WeightedTimesteps(torch.full((100,), 0.01, dtype=torch.float64)),
                LogNormalSigma(),
            )
        ]
        choices.append([prepared.flip, prepared.conditioning.labels, *levels])
    for whole, part in zip(*choices, strict=True):
        assert whole is not None
        assert part is not None
        assert torch.equal(part, whole[order])


def test_choices_depend_on_the_seed() -> None:
    flips = [TrainingInputs(seed, horizontal_flip=True).prepare(many()).flip for seed in (0, 1)]
    assert flips[0] is not None
    assert flips[1] is not None
    assert not torch.equal(flips[0], flips[1])
    assert not torch.equal(*(UniformTimesteps(100).sample(seed, MANY) for seed in (0, 1)))


def test_timesteps_are_uniform_and_half_of_the_images_are_mirrored_at_each() -> None:
    timesteps = timesteps_of(MANY)
    counts = timesteps.bincount(minlength=100)
    assert len(counts) == 100
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    flip = TrainingInputs(3, horizontal_flip=True).prepare(many()).flip
    assert flip is not None
    n = len(MANY)
    assert abs(int(flip.sum()) - n / 2) < 4 * math.sqrt(n) / 2
    table = torch.stack([timesteps[chosen].bincount(minlength=100) for chosen in (flip, ~flip)])
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_the_rate(rate: float) -> None:
    given = many(labelled=True)
    labels = (
        TrainingInputs(3, TEN_CLASSES, condition_dropout=rate).prepare(given).conditioning.labels
    )
    assert labels is not None
    dropped = labels == 10
    assert torch.equal(labels[~dropped], (MANY % 10)[~dropped])
    n = len(MANY)
    assert abs(int(dropped.sum()) - n * rate) <= 4 * math.sqrt(n * rate * (1 - rate))
    assert given.labels is not None
    assert torch.equal(given.labels, MANY % 10)  # the batch keeps its own


def test_the_network_gets_the_labels_it_was_built_for() -> None:
    labelled, plain = batch(torch.arange(3), labelled=True), batch(torch.arange(3))
    with pytest.raises(ValueError, match="labels"):
        DenoisingObjective(SCHEDULE, "eps", TrainingInputs(3, TEN_CLASSES))(network, plain)
    unconditional = DenoisingObjective(SCHEDULE, "eps", PLAIN)
    assert torch.equal(unconditional(network, labelled), unconditional(network, plain))


def test_keys_of_dropout_follow_from_seed_and_position() -> None:
    positions = torch.arange(1000) + 2**32 - 500
    whole = TrainingInputs(3).prepare(Batch(torch.zeros(1000, 1, 1, 1), None, positions))
    key = whole.conditioning.dropout_key
    assert key is not None
    assert len(key.unique()) == 1000
    low, high = random_words(3, positions, 2, 0, Stream.DROPOUT).unbind(1)
    assert torch.equal(key & 0xFFFFFFFF, low)
    assert torch.equal(key >> 32 & 0xFFFFFFFF, high)


# --- Weights, the bound, shared noise


@pytest.mark.parametrize("prediction", PARAMETERIZATIONS)
def test_loss_is_weighted_by_its_timestep(prediction: str) -> None:
    positions = torch.arange(50)
    table = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weighted = DenoisingObjective(SCHEDULE, prediction, PLAIN, weights=table)
    plain = DenoisingObjective(SCHEDULE, prediction, PLAIN)
    weights = table[timesteps_of(positions)].float()
    expected = weights * plain(network, batch(positions))
    torch.testing.assert_close(weighted(network, batch(positions)), expected)


def test_hybrid_loss_adds_a_thousandth_of_the_bound() -> None:
    """In nats per dimension: L_simple + T / 1000 · L_t, recomputed from its parts."""
    given = DenoisingObjective(SCHEDULE, "eps", PLAIN, learned_variance=True)
    positions = torch.arange(40) + 100
    t = timesteps_of(positions)
    x_0, eps, a, s = truth_of(positions)

    def hybrid(x: Tensor, *_: object) -> Tensor:
        return torch.cat([(x * 0.7).sin(), (3 * x).cos()], 1)

    loss = given(hybrid, batch(positions))
    x_t = add_noise(SCHEDULE, x_0, t, eps)
    output, r = hybrid(x_t).chunk(2, 1)
    mean, _ = posterior(SCHEDULE, (x_t - s * output) / a, x_t, t)
    low = SCHEDULE.posterior_log_variance_clipped[t][:, None, None, None]
    high = SCHEDULE.betas.log()[t][:, None, None, None]
    log_variance = (r + 1) / 2 * high + (1 - r) / 2 * low
    first = t == 0
    assert int(first.sum()) == 1
    bound = denoising_term(SCHEDULE, x_0, x_t, t, mean, log_variance)
    bound[first] = decoder_term(x_0, mean, log_variance)[first]
    expected = (output - eps).square().mean((1, 2, 3)) + 100 / 1000 * bound.mean((1, 2, 3))
    torch.testing.assert_close(loss[~first].double(), expected[~first], rtol=1e-4, atol=0)
    # The kernel's normal distribution function is approximate.
    torch.testing.assert_close(loss[first].double(), expected[first], rtol=5e-3, atol=0)


@pytest.mark.parametrize("prediction", PARAMETERIZATIONS)
def test_offset_noise_is_noise_that_a_channel_shares(prediction: str) -> None:
    given = DenoisingObjective(SCHEDULE, prediction, PLAIN, offset_noise=0.5)
    positions = torch.arange(400)
    x_0, eps, a, s = truth_of(positions)
    row = parameterization(prediction, SCHEDULE)
    u, w = row.target(a, s)
    shared: list[Tensor] = []

    def oracle(z: Tensor, *_: object) -> Tensor:
        noise = (z / row.state_scale(a, s) - a * x_0) / s
        shared.append((noise - eps)[:, :, 0, 0])
        one = shared[0][:, :, None, None].expand_as(eps)
        torch.testing.assert_close(noise - eps, one, rtol=0, atol=1e-4)
        return (u * x_0 + w * noise).float()

    assert given(oracle, batch(positions)).max() < 1e-8
    assert stats.kstest((shared[0].flatten() / 0.5).numpy(), "norm").pvalue > 1e-3
    off_by_half = given(lambda *inputs: oracle(*inputs) + 0.5, batch(positions))
    torch.testing.assert_close(off_by_half, torch.full((400,), 0.25), rtol=1e-3, atol=0)


# --- How often each timestep is trained


def test_logit_normal_timesteps() -> None:
    probabilities = logit_normal_probabilities(100, -0.5, 0.8)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    u = 1 / (1 + np.exp(-(-0.5 + 0.8 * np.random.default_rng(0).standard_normal(200_000))))
    counts = np.bincount((u * 100).astype(int), minlength=100)
    enough = probabilities.numpy() * 200_000 > 5
    expected = probabilities.numpy()[enough]
    chosen = WeightedTimesteps(probabilities).sample(3, torch.arange(200_000))
    for found in (counts, chosen.bincount(minlength=100).numpy()):
        found = found[enough]
        assert stats.chisquare(found, expected / expected.sum() * found.sum()).pvalue > 1e-3


def filled(sizes: Tensor) -> ImportanceTimesteps:
    """Whose timesteps have had ten losses of these sizes."""
    levels = ImportanceTimesteps(len(sizes))
    for _ in range(10):
        levels.update(torch.arange(len(sizes)), sizes)
    return levels


def test_importance_begins_uniformly_and_needs_ten_losses_of_each_timestep() -> None:
    levels = ImportanceTimesteps(5)
    everywhere = torch.arange(5)
    for _ in range(9):
        levels.update(everywhere, everywhere + 1.0)
    levels.update(everywhere[1:], everywhere[1:] + 1.0)
    assert not levels.warm
    uniform = UniformTimesteps(5).sample(0, torch.arange(100))
    assert torch.equal(levels.sample(0, torch.arange(100)), uniform)
    assert torch.equal(levels.correction(everywhere), torch.ones(5, dtype=torch.float64))
    levels.update(everywhere[:1], torch.ones(1))
    assert levels.warm
    size = everywhere.double() + 1
    torch.testing.assert_close(levels.probabilities, 0.999 * size / 15 + 0.001 / 5)
    assert not torch.equal(levels.sample(0, torch.arange(100)), uniform)


def test_importance_looks_at_the_last_ten_losses() -> None:
    levels = ImportanceTimesteps(4)
    reference: list[deque[float]] = [deque(maxlen=10) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        # Now and then more than ten losses of one timestep in a step.
        timesteps = torch.randint(0, 1 + step % 4, (16,), generator=generator)
        losses = torch.rand(16, generator=generator)
        levels.update(timesteps, losses)
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            reference[t].append(loss)
    size = torch.tensor([np.mean(np.square(history)) ** 0.5 for history in reference])
    expected = 0.999 * size / size.sum() + 0.001 / 4
    torch.testing.assert_close(levels.probabilities, expected)


def test_importance_is_unbiased_and_has_less_variance() -> None:
    """The corrected loss has the mean of uniform timesteps, exactly so under p."""
    sizes = torch.logspace(-2, 2, 50, dtype=torch.float64)
    levels = filled(sizes)
    corrected = levels.correction(torch.arange(50)) * sizes
    mean = (levels.probabilities * corrected).sum()
    torch.testing.assert_close(mean, sizes.mean(), rtol=1e-12, atol=0)
    variance = (levels.probabilities * corrected.square()).sum() - mean**2
    assert variance < 0.01 * sizes.var(correction=0)

    chosen = levels.sample(7, MANY)
    expected = levels.probabilities.numpy() * len(MANY)
    assert stats.chisquare(chosen.bincount(minlength=50).numpy(), expected).pvalue > 1e-3
    estimate = corrected[chosen]
    error = estimate.std().item() / math.sqrt(len(MANY))
    assert abs(estimate.mean() - sizes.mean()) < 4 * error + 1e-12


def importance() -> DenoisingObjective:
    return DenoisingObjective(SCHEDULE, "eps", PLAIN, levels=ImportanceTimesteps(100))


def test_importance_forgets_a_step_that_was_skipped() -> None:
    given = importance()
    given(network, batch(torch.arange(8)))
    given.end_step(None)
    given.end_step(Ranks())
    assert int(given.state()["counts"].sum()) == 0


def test_importance_weighs_the_loss() -> None:
    levels = filled(torch.linspace(1, 5, 100, dtype=torch.float64))
    given = DenoisingObjective(SCHEDULE, "eps", PLAIN, levels=levels)
    positions = torch.arange(30)
    loss = given(network, batch(positions))
    t = levels.sample(3, positions)
    x_0, eps, _, _ = truth_of(positions, t)
    error = (network(add_noise(SCHEDULE, x_0, t, eps), t) - eps).square().mean((1, 2, 3))
    expected = error / (100 * levels.probabilities[t])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


# --- The configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": ObjectiveConfig(min_snr_gamma=0)}, "`objective.min_snr_gamma` is 0"),
        ({"objective": ObjectiveConfig(p2_k=-1)}, "`objective.p2_k` is -1"),
        ({"objective": ObjectiveConfig(p2_gamma=-1)}, "`objective.p2_gamma` is -1"),
        ({"objective": ObjectiveConfig(logit_std=0)}, "`objective.logit_std` is 0"),
        ({"objective": ObjectiveConfig(offset_noise=-0.1)}, "`objective.offset_noise` is -0.1"),
        ({"objective": ObjectiveConfig(learned_variance=True)}, "it must be 6"),
        ({"model": UNetConfig(out_channels=6)}, "no `objective.learned_variance` it must be 3"),
        (
            {"objective": ObjectiveConfig(learned_variance=True, weighting="vlb"),
             "model": UNetConfig(out_channels=6)},
            "vlb is the bound of a fixed variance",
        ),
        (
            {"objective": ObjectiveConfig(offset_noise=0.1, weighting="vlb")},
            "the bound that `objective.weighting` vlb asks for",
        ),
        (
            {"objective": ObjectiveConfig(weighting="p2"),
             "diffusion": DiffusionConfig(prediction="v", zero_terminal_snr=True)},
            "`objective.weighting` is p2, which gives no weight",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_reported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        validate(RunConfig(**options))
