"""Flow matching: its schedule, training, and sampling, against closed forms."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from tests.sampling import sample
from torch import Tensor

from ddpm_engine.config import RunConfig, from_dict, to_dict
from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.flow_schedule import FlowSchedule
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.parameterization import (
    PARAMETERIZATIONS,
    Flow,
    parameterization,
)
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.objectives.level_sampling import LevelSampler, LogNormalSigma, UniformShare
from ddpm_engine.presets import PRESETS
from ddpm_engine.rules import problems
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.registry import SAMPLERS, build_table
from ddpm_engine.training.build_objective import build_objective
from ddpm_kernels import Stream, gaussian_noise

SCHEDULE = FlowSchedule.build()
SHAPE = (2, 4, 6)
IDS = torch.tensor([5, 0, 2**40])


def share(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """τ at timesteps that are visited."""
    a, s = noise_levels(schedule, timesteps)
    return (s / (a + s))[:-1]


# --- The schedule


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("timesteps", [1, 7, 1000])
def test_the_share_of_noise_is_even_but_for_the_shift(timesteps: int, shift: float) -> None:
    schedule = FlowSchedule.build(timesteps, shift)
    u = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    expected = shift * u / (1 + (shift - 1) * u)
    whole = torch.arange(timesteps)
    torch.testing.assert_close(share(schedule, whole), expected, rtol=1e-9, atol=0)
    assert schedule.alpha_bar[-1] == 0
    # Between timesteps, too.
    torch.testing.assert_close(share(schedule, whole.double()), expected, rtol=1e-10, atol=0)
    halves = whole[:-1].double() + 0.5
    u = (halves + 1) / timesteps
    expected = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(share(schedule, halves), expected, rtol=1e-10, atol=0)
    there = schedule.timesteps_at(schedule.log_sigma_at(halves))
    torch.testing.assert_close(there, halves, rtol=1e-9, atol=1e-9)


def test_invalid_schedules_are_refused() -> None:
    for shift in (0.0, -1.0, math.inf):
        with pytest.raises(UserError, match=f"`shift` is {shift}; it must be positive"):
            FlowSchedule.build(10, shift)
    with pytest.raises(UserError, match="`timesteps` is 0"):
        FlowSchedule.build(0)
    with pytest.raises(UserError, match="ends in pure noise as it is"):
        SCHEDULE.rescaled_to_zero_terminal_snr()


# --- Training


def batch(positions: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(positions), *SHAPE), generator=generator)
    return Batch(images.to(torch.uint8), None, positions)


@pytest.mark.parametrize("levels", [UniformShare(3.0), LogNormalSigma(0.4, 0.7)])
def test_the_network_sees_the_line_and_predicts_its_direction(levels: LevelSampler) -> None:
    positions = torch.arange(16) + 2**35
    given = batch(positions)
    sigma = levels.sample(3, positions)
    tau = (sigma / (1 + sigma))[:, None, None, None]
    x_0 = given.images.double() / 127.5 - 1
    noise = gaussian_noise(3, positions, SHAPE, 0, Stream.TRAINING_NOISE).double()

    def oracle(z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        torch.testing.assert_close(level.double(), 1000 * tau.flatten(), rtol=1e-5, atol=0)
        torch.testing.assert_close(z.double(), (1 - tau) * x_0 + tau * noise, rtol=0, atol=1e-5)
        return (noise - x_0).float()

    objective = DenoisingObjective(SCHEDULE, "flow", TrainingInputs(3), levels=levels)
    assert objective(oracle, given).max() < 1e-10
    off = objective(lambda *inputs: oracle(*inputs) + 0.5, given)
    torch.testing.assert_close(off, torch.full((16,), 0.25), rtol=1e-4, atol=0)


def test_the_levels_of_a_sample_depend_on_its_position_alone() -> None:
    positions = torch.arange(20_000) + 2**40
    uniform, shifted = (UniformShare(shift).sample(7, positions) for shift in (1.0, 3.0))
    assert stats.kstest((uniform / (1 + uniform)).numpy(), "uniform").pvalue > 1e-3
    torch.testing.assert_close(shifted, 3 * uniform)
    assert torch.equal(UniformShare(3.0).sample(7, positions[40:50]), shifted[40:50])
    config = PRESETS["digits-flow"]()
    config = replace(
        config,
        diffusion=replace(config.diffusion, shift=2.0),
        objective=ObjectiveConfig(timestep_sampling="logit-normal", logit_mean=0.3, logit_std=0.8),
    )
    built = build_objective(config, config.diffusion.build_schedule())
    assert isinstance(built, DenoisingObjective)
    sigma = built.levels.sample(7, positions)
    tau = sigma / (1 + sigma)
    unshifted = tau / (2 - tau)  # S(u) = 2 u / (1 + u)
    assert stats.kstest(unshifted.logit().numpy(), "norm", (0.3, 0.8)).pvalue > 1e-3


CHAIN = NoiseSchedule.linear(100, 1e-3, 0.1)


def network_of(prediction: str, schedule: NoiseSchedule) -> Any:
    """Estimates x_0 as 0.4 tanh(x_t / s), whatever it is to predict."""
    row = parameterization(prediction, schedule)

    def network(z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        level = level.double()
        if prediction == "flow":
            sigma = (level / schedule.timesteps).logit().exp()
        elif prediction == "edm":
            sigma = (4 * level).exp()
        else:
            sigma = schedule.log_sigma_at(level).exp()
        a = (1 + sigma.square()).rsqrt()
        s = torch.where(sigma.isinf(), 1, sigma * a)
        a, s = a[:, None, None, None], s[:, None, None, None]
        x = z.double() / row.state_scale(a, s)
        return row.from_x0(0.4 * (x / s).tanh(), z.double(), a, s).to(z)

    return network


@pytest.mark.parametrize(
    ("prediction", "loss"), [*itertools.permutations(PARAMETERIZATIONS, 2), ("v", "v")]
)
def test_the_loss_follows_from_two_names(prediction: str, loss: str) -> None:
    """Of the same estimate, the error in the space of `loss` is that of a network of that kind."""
    given = batch(torch.arange(32))
    inputs = TrainingInputs(3)

    def of(prediction: str, loss: str | None) -> Tensor:
        objective = DenoisingObjective(CHAIN, prediction, inputs, loss=loss, dtype=torch.float64)
        return objective(network_of(prediction, CHAIN), given)

    torch.testing.assert_close(of(prediction, loss), of(loss, None), rtol=1e-5, atol=1e-8)


def test_the_loss_of_a_continuum_follows_from_two_names() -> None:
    given = batch(torch.arange(32))
    schedule = NoiseSchedule.edm()
    found = [
        DenoisingObjective(
            schedule, prediction, TrainingInputs(3), loss=loss, levels=LogNormalSigma(),
            dtype=torch.float64,
        )(network_of(prediction, schedule), given)
        for prediction, loss in [("edm", "flow"), ("flow", None), ("flow", "edm"), ("edm", None)]
    ]  # fmt: skip
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found[2], found[3], rtol=1e-5, atol=1e-8)


def test_the_limit_of_a_loss() -> None:
    """JiT divides by τ, but by 0.05 at least; and min-SNR is the loss of ε with a limit."""
    given, inputs = batch(torch.arange(64)), TrainingInputs(3)
    t = inputs.prepare(given, 1000).integers
    assert t is not None
    tau = (t + 1) / 1000
    plain = DenoisingObjective(SCHEDULE, "x0", inputs)(network_of("x0", SCHEDULE), given)
    jit = DenoisingObjective(SCHEDULE, "x0", inputs, loss="flow", loss_limit=400.0)
    expected = plain / tau.clamp(min=0.05).square()
    torch.testing.assert_close(jit(network_of("x0", SCHEDULE), given), expected.float(), rtol=1e-4,
                               atol=0)  # fmt: skip
    config = RunConfig(diffusion=DiffusionConfig(prediction="v"))
    min_snr, limited = (
        build_objective(replace(config, objective=chosen), config.diffusion.build_schedule())
        for chosen in (
            ObjectiveConfig(weighting="min-snr"), ObjectiveConfig(loss="eps", loss_limit=5.0),
        )
    )  # fmt: skip
    network = network_of("v", config.diffusion.build_schedule())
    torch.testing.assert_close(min_snr(network, given), limited(network, given))


# --- Closed forms

MEANS = torch.tensor([0.5, -0.35], dtype=torch.float64)
DEVIATION = 0.2


def mixture_x0(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """E[x_0 | x_t] of values from an even mixture of N(MEANS, DEVIATION²)."""
    variance = (a * DEVIATION).square() + s.square()
    away = x[..., None] - a[..., None] * MEANS
    shares = (-away.square() / (2 * variance[..., None])).softmax(-1)
    return (shares * (MEANS + a[..., None] * DEVIATION**2 * away / variance[..., None])).sum(-1)


def gaussian_x0(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    mean = MEANS[0]
    gain = a * DEVIATION**2 / ((a * DEVIATION).square() + s.square())
    return mean + gain * (x - a * mean)


class Best(torch.nn.Module):
    """The best network of its kind, at any level; in float64, as it is given."""

    conditioning = ConditioningSpec()
    sample_shape = SHAPE

    def __init__(self, prediction: str, schedule: NoiseSchedule, x0: Any = mixture_x0) -> None:
        super().__init__()
        self.row = parameterization(prediction, schedule)
        self.schedule, self.x0 = schedule, x0

    def forward(self, z: Tensor, level: Tensor, conditioning: object = None) -> Tensor:
        level = level.double()
        if self.row.name == "flow":
            tau = level / self.schedule.timesteps
        elif self.row.name == "edm":
            tau = (4 * level).sigmoid()
        else:
            tau = self.schedule.log_sigma_at(level).sigmoid()
        norm = (tau.square() + (1 - tau).square()).sqrt()
        a, s = ((1 - tau) / norm)[:, None, None, None], (tau / norm)[:, None, None, None]
        z = z.double()
        return self.row.from_x0(self.x0(z / self.row.state_scale(a, s), a, s), z, a, s).float()


def test_the_velocity_of_a_gaussian() -> None:
    """The flow of N(m, d²) is z = (1 − τ) m + sqrt((1 − τ)² d² + τ²) ε, so dz/dτ is known."""
    tau = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    norm = (tau.square() + (1 - tau).square()).sqrt()
    a, s = (1 - tau) / norm, tau / norm
    z = 1.3 * torch.linspace(-1, 1, 50, dtype=torch.float64)
    row = Flow()
    velocity = row.from_x0(gaussian_x0(z / row.state_scale(a, s), a, s), z, a, s)
    spread = ((1 - tau) * DEVIATION).square() + tau.square()
    growth = (tau - (1 - tau) * DEVIATION**2) / spread
    expected = -MEANS[0] + growth * (z - (1 - tau) * MEANS[0])
    torch.testing.assert_close(velocity, expected, rtol=1e-10, atol=1e-12)


ODES = ("euler", "heun", "ddim", "dpm++1", "dpm++2m", "dpm++3m", "unipc", "unipc3")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ODES)
def test_samplers_follow_the_flow_of_a_gaussian(sampler: str, shift: float) -> None:
    schedule = FlowSchedule.build(1000, shift)
    noise = gaussian_noise(3, IDS, SHAPE, 0, Stream.INITIAL_NOISE)
    exact = MEANS[0].item() + DEVIATION * noise
    errors = []
    for steps in (20, 80):
        samples = sample(
            Best("flow", schedule, gaussian_x0), schedule, sample_ids=IDS, prediction="flow",
            sampler=sampler, steps=steps, seed=3, clip=False,
        )  # fmt: skip
        errors.append((samples - exact).abs().max().item())
    assert errors[1] < 0.5 * errors[0] or errors[1] < 1e-4
    assert errors[1] < (0.05 if sampler in ("euler", "ddim", "dpm++1") else 0.01)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m_sde"])
def test_stochastic_samplers_have_the_distribution(sampler: str) -> None:
    variance: dict[str, Any] = {"variance": "fixed_small"} if sampler == "ddpm" else {}
    samples = sample(
        Best("flow", SCHEDULE), SCHEDULE, sample_ids=torch.arange(100), prediction="flow",
        sampler=sampler, steps=100, clip=False, **variance,
    ).flatten().double()  # fmt: skip

    def cdf(x: Any) -> Any:
        return sum(stats.norm.cdf(x, mean.item(), DEVIATION) for mean in MEANS) / 2

    assert stats.kstest(samples.numpy(), cdf).statistic < 0.03


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("schedule", "kinds"),
    [
        (NoiseSchedule.edm(), ("eps", "x0", "v", "edm", "flow")),
        (NoiseSchedule.linear(), ("eps", "x0", "v", "edm", "flow")),
        (SCHEDULE, ("x0", "v", "flow")),
    ],
    ids=["edm", "linear", "flow"],
)
def test_every_parameterization_draws_the_same_samples(
    sampler: str, schedule: NoiseSchedule, kinds: tuple[str, ...]
) -> None:
    samples = [
        sample(
            Best(kind, schedule), schedule, sample_ids=IDS, prediction=kind, sampler=sampler,
            steps=8, clip=False,
        )
        for kind in kinds
    ]  # fmt: skip
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0], rtol=0, atol=2e-4)


# --- What samplers can do besides


@pytest.mark.parametrize(
    "options",
    [
        {"strength": 0.4},
        {"repeats": 3, "sampler": "ddim"},
        {"mask": True},
        {"mask": True, "sampler": "heun"},
        {"threshold": 0.9},
        {"interpolate": (1, 5, 4), "sampler": "heun"},
        {"guidance": 2.0},
        {"guidance": Guidance(2.0, 0.5, (0.2, 3.0))},
    ],
    ids=str,
)
def test_options_of_sampling_agree_with_those_of_x0(options: dict[str, Any]) -> None:
    """Image-to-image, inpainting, guidance: as with a network that predicts x_0 on the schedule."""
    options = dict(options)
    images = 0.5 * gaussian_noise(1, IDS, SHAPE, 0, Stream.INITIAL_NOISE).clamp(-1, 1)
    if options.keys() & {"strength", "mask", "repeats"}:
        options["images"] = images
    if options.keys() & {"mask", "repeats"}:
        mask = torch.zeros(1, 1, *SHAPE[1:], dtype=torch.bool)
        mask[..., :3] = True
        options["mask"] = mask
    ids: Any = range(4) if "interpolate" in options else IDS
    labels = None
    if "guidance" in options:
        labels = torch.tensor([1, 3, 0])

    class Labelled(Best):
        conditioning = ConditioningSpec(classes=4) if labels is not None else ConditioningSpec()

        def forward(self, z: Tensor, level: Tensor, conditioning: Any = None) -> Tensor:
            given = torch.zeros(len(z)) if labels is None else conditioning.labels
            moved = 0.05 * given.double()[:, None, None, None]
            self.x0 = lambda x, a, s: mixture_x0(x, a, s) + moved
            return super().forward(z, level)

    chosen = {"sampler": "dpm++2m", "steps": 8, **options}
    ours, theirs = (
        sample(
            Labelled(kind, SCHEDULE), SCHEDULE, sample_ids=ids, prediction=kind, clip=False,
            labels=labels, **chosen,
        )
        for kind in ("flow", "x0")
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    if "mask" in options:
        torch.testing.assert_close(ours[..., :3], images[..., :3], rtol=0, atol=1e-5)


def test_the_first_step_is_taken_from_pure_noise() -> None:
    for sampler in SAMPLERS:
        table = build_table(SCHEDULE, sampler, 5, prediction="flow")
        assert table.noise_input[0] == 1000
        assert bool(table.rows.isfinite().all())


# --- Configuration


@pytest.mark.parametrize("name", ["digits-flow", "cifar10-flow"])
def test_presets(name: str) -> None:
    config = PRESETS[name]()
    assert problems(config) == []
    assert from_dict(to_dict(config), "here") == config
    assert not config.clips_x0
    objective = build_objective(config, config.diffusion.build_schedule())
    assert isinstance(objective, DenoisingObjective)
    assert objective.levels.continuous
    assert objective.parameterization == Flow(1000)


FLOW = RunConfig(
    diffusion=DiffusionConfig(schedule="flow", prediction="flow"),
    sampling=SamplingConfig(sampler="heun", steps=18),
)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"diffusion": replace(FLOW.diffusion, shift=0.0)}, ["diffusion.shift"]),
        ({"diffusion": replace(FLOW.diffusion, shift=-2.0)}, ["diffusion.shift"]),
        (
            {"diffusion": replace(FLOW.diffusion, shift=-1.0, zero_terminal_snr=True),
             "objective": ObjectiveConfig(weighting="p2", learned_variance=True, loss="eps"),
             "sampling": SamplingConfig(variance="learned_range")},
            ["diffusion.shift", "diffusion.zero_terminal_snr", "objective.weighting",
             "objective.learned_variance", "objective.loss", "sampling.variance"],
        ),
        ({"diffusion": DiffusionConfig(prediction="flow")}, ["diffusion.schedule"]),
        ({"diffusion": DiffusionConfig(shift=2.0)}, ["diffusion.shift"]),
        ({"diffusion": replace(FLOW.diffusion, prediction="eps")}, ["diffusion.prediction"]),
        (
            {"diffusion": replace(FLOW.diffusion, prediction="v", zero_terminal_snr=True)},
            ["diffusion.zero_terminal_snr"],
        ),
        ({"objective": ObjectiveConfig(weighting="min-snr")}, ["objective.weighting"]),
        ({"objective": ObjectiveConfig(weighting="vlb")}, ["objective.weighting"]),
        (
            {"diffusion": replace(FLOW.diffusion, prediction="x0"),
             "objective": ObjectiveConfig(weighting="min-snr")},
            ["objective.weighting"],
        ),
        (
            {"objective": ObjectiveConfig(timestep_sampling="importance")},
            ["objective.timestep_sampling"],
        ),
        ({"objective": ObjectiveConfig(p_mean=0.0)}, ["objective.p_mean"]),
        ({"objective": ObjectiveConfig(loss="edm")}, ["objective.loss"]),
        ({"objective": ObjectiveConfig(loss_limit=0.0)}, ["objective.loss_limit"]),
        (
            {"diffusion": DiffusionConfig(),
             "objective": ObjectiveConfig(weighting="min-snr", loss="v", loss_limit=3.0)},
            ["objective.loss", "objective.loss_limit"],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_means_nothing_is_named_all_at_once(
    changes: dict[str, Any], fields: list[str]
) -> None:
    named = {problem.field for problem in problems(replace(FLOW, **changes))}
    assert set(fields) <= named


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": ObjectiveConfig(timestep_sampling="logit-normal", logit_mean=-1.0)},
        {"objective": ObjectiveConfig(loss="x0", loss_limit=10.0, offset_noise=0.1)},
        {"diffusion": replace(FLOW.diffusion, prediction="x0"),
         "objective": ObjectiveConfig(loss="flow", loss_limit=400.0)},
        {"diffusion": replace(FLOW.diffusion, prediction="v", shift=3.0)},
        {"diffusion": DiffusionConfig(prediction="v"), "objective": ObjectiveConfig(loss="edm")},
        {"sampling": SamplingConfig(sampler="ddpm", steps=20)},
    ],
    ids=str,
)  # fmt: skip
def test_what_means_something_is_accepted(changes: dict[str, Any]) -> None:
    assert problems(replace(FLOW, **changes)) == []
