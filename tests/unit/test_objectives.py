"""The training objective: what a sample meets is decided by its position alone."""

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
from ddpm_engine.diffusion.parameterization import Prediction
from ddpm_engine.diffusion.process import forward, posterior
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.diffusion.variational_bound import decoder_term, denoising_term
from ddpm_engine.distributed import Ranks
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.inputs import Conditions
from ddpm_engine.objectives.level_sampling import (
    ImportanceTimesteps,
    UniformTimesteps,
    WeightedTimesteps,
    logit_normal_probabilities,
)
from ddpm_engine.rules import validate
from ddpm_engine.samplers.config import SamplingConfig
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
    off_by_half = loss_of(lambda x, t, c=None: oracle(x, t) + 0.5, given)
    torch.testing.assert_close(off_by_half, torch.full((8,), 0.25), rtol=1e-5, atol=0)


def test_loss_trains_the_network() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    loss = objective()(lambda x, t, c=None: weight * x, batch(torch.arange(4)))
    loss.mean().backward()
    assert weight.grad is not None
    nudged = [
        objective()(lambda x, t, c=None, w=w: w * x, batch(torch.arange(4))).mean().item()
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

    def watch(x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.labels is not None
        seen.append(conditioning.labels)
        return x

    given(watch, batch(positions, labelled=True))
    assert expected is not None
    assert torch.equal(seen[0], expected)
    assert 0 < int((expected == 10).sum()) < 32


# --- Weights, the bound, shared noise


def truth_of(given: DenoisingObjective, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, noise and timesteps of these positions, float64."""
    x_0 = (2 * batch(positions).images.double() - 255) / 255
    eps = gaussian_noise(3, positions, SHAPE, 0, Stream.TRAINING_NOISE).double()
    return x_0, eps, given.draw(positions, None).timesteps


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_loss_is_weighted_by_its_timestep(prediction: Prediction) -> None:
    positions = torch.arange(50)
    table = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    conditions = Conditions(3)
    weighted = DenoisingObjective(SCHEDULE, prediction, conditions, weights=table)
    plain = DenoisingObjective(SCHEDULE, prediction, conditions)
    weights = table[plain.draw(positions, None).timesteps].float()
    expected = weights * plain(model, batch(positions))
    torch.testing.assert_close(weighted(model, batch(positions)), expected)


def test_hybrid_loss_adds_a_thousandth_of_the_bound() -> None:
    """In nats a dimension: L_simple + T / 1000 · L_t, whose parts are computed anew here."""
    given = DenoisingObjective(SCHEDULE, "eps", Conditions(3), learned_variance=True)
    positions = torch.arange(40) + 100
    x_0, eps, t = truth_of(given, positions)

    def hybrid(x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        return torch.cat([(x * 0.7).sin(), (3 * x).cos()], 1)

    loss = given(hybrid, batch(positions))
    x_t = forward(SCHEDULE, x_0, t, eps)
    a = SCHEDULE.sqrt_alpha_bar[t][:, None, None, None]
    s = SCHEDULE.sqrt_one_minus_alpha_bar[t][:, None, None, None]
    output, r = hybrid(x_t, t).chunk(2, 1)
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


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_offset_noise_is_noise_that_a_channel_shares(prediction: Prediction) -> None:
    given = DenoisingObjective(SCHEDULE, prediction, Conditions(3), offset_noise=0.5)
    positions = torch.arange(400)
    x_0, eps, t = truth_of(given, positions)
    a = SCHEDULE.sqrt_alpha_bar[t][:, None, None, None]
    s = SCHEDULE.sqrt_one_minus_alpha_bar[t][:, None, None, None]
    shared: list[Tensor] = []

    def oracle(x_t: Tensor, timesteps: Tensor) -> Tensor:
        noise = (x_t - a * x_0) / s
        shared.append((noise - eps)[:, :, 0, 0])
        one = shared[0][:, :, None, None].expand_as(eps)
        torch.testing.assert_close(noise - eps, one, rtol=0, atol=1e-4)
        return {"eps": noise, "x0": x_0, "v": a * noise - s * x_0}[prediction].float()

    assert given(oracle, batch(positions)).max() < 1e-8
    drawn = shared[0].flatten() / 0.5
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    off_by_half = given(lambda x, t, c=None: oracle(x, t) + 0.5, batch(positions))
    torch.testing.assert_close(off_by_half, torch.full((400,), 0.25), rtol=1e-4, atol=0)


# --- How often each timestep is trained


def test_logit_normal_timesteps() -> None:
    probabilities = logit_normal_probabilities(100, -0.5, 0.8)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    u = 1 / (1 + np.exp(-(-0.5 + 0.8 * np.random.default_rng(0).standard_normal(200_000))))
    counts = np.bincount((u * 100).astype(int), minlength=100)
    enough = probabilities.numpy() * 200_000 > 5
    expected = probabilities.numpy()[enough]
    drawn = WeightedTimesteps(probabilities).draw(3, torch.arange(200_000))
    for seen in (counts, drawn.bincount(minlength=100).numpy()):
        seen = seen[enough]
        assert stats.chisquare(seen, expected / expected.sum() * seen.sum()).pvalue > 1e-3


def filled(sizes: Tensor) -> ImportanceTimesteps:
    """Whose timesteps have had ten losses of these sizes."""
    sampling = ImportanceTimesteps(len(sizes))
    for _ in range(10):
        sampling.learn(torch.arange(len(sizes)), sizes)
    return sampling


def test_importance_begins_uniformly_and_needs_ten_losses_of_each_timestep() -> None:
    sampling = ImportanceTimesteps(5)
    everywhere = torch.arange(5)
    for _ in range(9):
        sampling.learn(everywhere, everywhere + 1.0)
    sampling.learn(everywhere[1:], everywhere[1:] + 1.0)
    assert not sampling.warm
    uniform = UniformTimesteps(5).draw(0, torch.arange(100))
    assert torch.equal(sampling.draw(0, torch.arange(100)), uniform)
    assert torch.equal(sampling.correction(everywhere), torch.ones(5, dtype=torch.float64))
    sampling.learn(everywhere[:1], torch.ones(1))
    assert sampling.warm
    size = everywhere.double() + 1
    expected = 0.999 * size / 15 + 0.001 / 5
    torch.testing.assert_close(sampling.probabilities, expected)
    assert not torch.equal(sampling.draw(0, torch.arange(100)), uniform)


def test_importance_looks_at_the_last_ten_losses() -> None:
    sampling, reference = ImportanceTimesteps(4), [deque(maxlen=10) for _ in range(4)]  # type: ignore[var-annotated]
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        # Now and then more than ten losses of one timestep in a step.
        timesteps = torch.randint(0, 1 + step % 4, (16,), generator=generator)
        losses = torch.rand(16, generator=generator)
        sampling.learn(timesteps, losses)
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            reference[t].append(loss)
    size = torch.tensor([np.mean(np.square(history)) ** 0.5 for history in reference])
    expected = 0.999 * size / size.sum() + 0.001 / 4
    torch.testing.assert_close(sampling.probabilities, expected)


def test_importance_is_unbiased_and_has_less_variance() -> None:
    """The corrected loss has the mean of uniform timesteps, exactly so under p."""
    sizes = torch.logspace(-2, 2, 50, dtype=torch.float64)
    sampling = filled(sizes)
    timesteps = torch.arange(50)
    correction = sampling.correction(timesteps)
    corrected = correction * sizes
    mean = (sampling.probabilities * corrected).sum()
    torch.testing.assert_close(mean, sizes.mean(), rtol=1e-12, atol=0)
    variance = (sampling.probabilities * corrected.square()).sum() - mean**2
    assert variance < 0.01 * sizes.var(correction=0)

    drawn = sampling.draw(7, MANY)
    assert stats.chisquare(
        drawn.bincount(minlength=50).numpy(), sampling.probabilities.numpy() * len(MANY)
    ).pvalue > 1e-3  # fmt: skip
    estimate = corrected[drawn]
    error = estimate.std().item() / math.sqrt(len(MANY))
    assert abs(estimate.mean() - sizes.mean()) < 4 * error + 1e-12


class Gathered(Ranks):
    """What all ranks together gave, one answer after the other."""

    def __init__(self, answers: list[Tensor]) -> None:
        self.answers = iter(answers)

    def gather(self, tensor: Tensor) -> Tensor:
        return next(self.answers)


def test_importance_learns_the_same_from_any_division_of_a_step() -> None:
    """One rank, or two with two pieces each, whose losses are gathered."""
    states = []
    for pieces, ranks in ((1, 1), (2, 2)):
        objectives = [
            DenoisingObjective(SCHEDULE, "eps", Conditions(3), sampling=ImportanceTimesteps(100))
            for _ in range(ranks)
        ]
        for step in range(3):
            positions = torch.arange(64) + 64 * step
            shares = positions.chunk(ranks)
            for given, share in zip(objectives, shares, strict=True):
                for piece in share.chunk(pieces):
                    given(model, batch(piece))
            columns = [[torch.cat(c) for c in zip(*o._seen, strict=True)] for o in objectives]
            for given in objectives:
                given.end_step(Gathered([torch.cat(parts) for parts in zip(*columns, strict=True)]))
        states += [given.state() for given in objectives]
    for state in states[1:]:
        torch.testing.assert_close(state["losses"], states[0]["losses"], rtol=1e-6, atol=0)
        assert torch.equal(state["counts"], states[0]["counts"])
    assert int(states[0]["counts"].sum()) == 3 * 64


def test_importance_forgets_a_step_that_was_skipped() -> None:
    given = DenoisingObjective(SCHEDULE, "eps", Conditions(3), sampling=ImportanceTimesteps(100))
    given(model, batch(torch.arange(8)))
    given.end_step(None)
    given.end_step(Ranks())
    assert int(given.state()["counts"].sum()) == 0


def test_importance_weighs_the_loss() -> None:
    sampling = filled(torch.linspace(1, 5, 100, dtype=torch.float64))
    given = DenoisingObjective(SCHEDULE, "eps", Conditions(3), sampling=sampling)
    positions = torch.arange(30)
    timesteps = given.draw(positions, None).timesteps
    loss = given(model, batch(positions))
    x_0, eps, t = truth_of(given, positions)
    assert torch.equal(t, timesteps)
    x_t = forward(SCHEDULE, x_0, t, eps)
    error = (model(x_t, t) - eps).square().mean((1, 2, 3))
    expected = error / (100 * sampling.probabilities[t])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_state_is_loaded() -> None:
    learnt = filled(torch.linspace(1, 5, 100, dtype=torch.float64))
    fresh = DenoisingObjective(SCHEDULE, "eps", Conditions(3), sampling=ImportanceTimesteps(100))
    fresh.load({name: value.clone() for name, value in learnt.state().items()})
    assert isinstance(fresh.sampling, ImportanceTimesteps)
    assert torch.equal(fresh.sampling.probabilities, learnt.probabilities)
    assert objective().state() == {}


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
            {
                "objective": ObjectiveConfig(learned_variance=True, weighting="vlb"),
                "model": UNetConfig(out_channels=6),
            },
            "vlb is the bound of a fixed variance",
        ),
        (
            {"objective": ObjectiveConfig(offset_noise=0.1, weighting="vlb")},
            "the bound that `objective.weighting` vlb asks for",
        ),
        (
            {
                "objective": ObjectiveConfig(weighting="p2"),
                "diffusion": DiffusionConfig(prediction="v", zero_terminal_snr=True),
            },
            "`objective.weighting` is p2, which gives no weight",
        ),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        validate(RunConfig(**options))


def test_a_learned_variance_is_allowed() -> None:
    validate(
        RunConfig(
            model=UNetConfig(out_channels=6),
            objective=ObjectiveConfig(learned_variance=True),
            sampling=SamplingConfig(variance="learned_range"),
        )
    )
