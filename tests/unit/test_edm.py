"""EDM: its formulas written out in float64, and everything samplers do with its networks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from tests.sampling import sample, trajectory
from torch import Tensor

from ddpm_engine.config import RunConfig, from_dict, to_dict
from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.parameterization import Edm as EdmRow
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.objectives.level_sampling import LevelSampler, LogNormalSigma
from ddpm_engine.presets import PRESETS
from ddpm_engine.rules import problems
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.registry import SAMPLERS, build_table
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_engine.training.build_objective import build_objective
from ddpm_kernels import Column, Stream, gaussian_noise
from ddpm_kernels.reverse_step.op import reverse_step_reference_

SIGMA_DATA = 0.5
SCHEDULE = NoiseSchedule.edm()
SHAPE = (2, 4, 6)
IDS = torch.tensor([5, 0, 2**40])
LABELS = torch.tensor([1, 3, 0])


# --- Training


def batch(positions: Tensor, labelled: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(positions), *SHAPE), generator=generator)
    return Batch(images.to(torch.uint8), positions % 4 if labelled else None, positions)


def network(x: Tensor, noise: Tensor, conditioning: Conditioning) -> Tensor:
    shift = noise if conditioning.labels is None else noise + conditioning.labels
    return (0.7 * x).sin() + 0.3 * shift[:, None, None, None]


def karras_loss(
    x_0: Tensor, normal: Tensor, n: Tensor, sigma_data: float, p_mean: float, p_std: float
) -> Tensor:
    """`EDMLoss` and `EDMPrecond`, from equations 7 and 8 and table 1 of the paper."""
    sigma = (p_mean + p_std * normal).exp()[:, None, None, None]
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma_data**2 + sigma**2).sqrt()
    c_noise = sigma.log() / 4
    y = x_0 + sigma * n
    denoised = c_skip * y + c_out * network(c_in * y, c_noise.flatten(), Conditioning())
    return (weight * (denoised - x_0) ** 2).mean((1, 2, 3))


def objective_of(
    inputs: TrainingInputs,
    sigma_data: float = SIGMA_DATA,
    levels: LevelSampler | None = None,
    dtype: torch.dtype = torch.float32,
) -> DenoisingObjective:
    schedule = NoiseSchedule.edm(sigma_data=sigma_data)
    return DenoisingObjective(
        schedule, "edm", inputs, levels=levels or LogNormalSigma(), dtype=dtype
    )


@pytest.mark.parametrize(
    ("sigma_data", "p_mean", "p_std"), [(0.5, -1.2, 1.2), (0.75, 0.4, 2.0), (1.0, -4.0, 0.1)]
)
def test_the_loss_is_that_of_the_paper(sigma_data: float, p_mean: float, p_std: float) -> None:
    positions = torch.arange(64) + 2**35
    given, inputs = batch(positions), TrainingInputs(3, horizontal_flip=True)
    levels = LogNormalSigma(p_mean, p_std)
    x_0 = given.images.double() / 127.5 - 1
    mirrored = inputs.prepare(given).flip
    assert mirrored is not None
    x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
    normal = gaussian_noise(3, positions, (1, 1, 1), 0, Stream.TRAINING_SIGMA).double().flatten()
    n = gaussian_noise(3, positions, SHAPE, 0, Stream.TRAINING_NOISE).double()
    expected = karras_loss(x_0, normal, n, sigma_data, p_mean, p_std)
    for dtype, rtol in [(torch.float32, 1e-5), (torch.float64, 1e-10)]:
        loss = objective_of(inputs, sigma_data, levels, dtype)(network, given)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)


def test_the_network_sees_unit_deviation() -> None:
    """Of images with deviation σ_data, the network's input and target have deviation one."""
    positions = torch.arange(512)
    generator = torch.Generator().manual_seed(0)
    images = SIGMA_DATA * torch.randn(512, *SHAPE, generator=generator)

    def unmoved(x: Tensor, *_: object) -> Tensor:
        assert x.std().item() == pytest.approx(1, abs=0.02)
        return torch.zeros_like(x)

    loss = objective_of(TrainingInputs(0))(unmoved, Batch(images, None, positions))
    assert loss.mean().item() == pytest.approx(1, abs=0.04)


def test_noise_levels_are_log_normal() -> None:
    sigma = LogNormalSigma(-0.3, 0.8).sample(7, torch.arange(20_000) + 2**40)
    assert stats.kstest(sigma.log().numpy(), "norm", (-0.3, 0.8)).pvalue > 1e-3


def test_the_loss_of_a_sample_depends_on_its_position_alone() -> None:
    positions = torch.arange(24)
    spec = ConditioningSpec(classes=4)
    objective = objective_of(TrainingInputs(3, spec, horizontal_flip=True, condition_dropout=0.4))
    given = batch(positions, labelled=True)
    whole = objective(network, given)
    for part in positions.split(7):
        piece = Batch(given.images[part], part % 4, part)
        torch.testing.assert_close(objective(network, piece), whole[part], rtol=1e-6, atol=0)


# --- The schedule


@pytest.mark.parametrize(("steps", "low", "high"), [(1000, 0.002, 80.0), (2, 0.1, 3.0)])
def test_the_schedule_is_even_in_log_sigma(steps: int, low: float, high: float) -> None:
    schedule = NoiseSchedule.edm(steps, low, high)
    expected = torch.linspace(math.log(low), math.log(high), steps, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_sigma, expected, rtol=0, atol=1e-9)


def test_the_steps_are_those_of_the_paper() -> None:
    """Equation 5, though few of them are timesteps of the schedule."""
    visited = SCHEDULE.solver_timesteps(18)
    a, s = noise_levels(SCHEDULE, visited)
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close((s / a)[:-1], expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0.1, 1.0), "`timesteps` is 1"),
        ((10, 1.0, 1.0), "`sigma_min` is 1.0 and `sigma_max` 1.0"),
        ((10, 0.0, 1.0), "`sigma_min` is 0.0"),
        ((10, 0.1, math.inf), "`sigma_max` inf"),
        ((10, 0.1, 1.0, 0.0), "`sigma_data` is 0.0"),
    ],
)
def test_invalid_schedules_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        NoiseSchedule.edm(*arguments)


# --- Sampling


def denoiser(y: Tensor, sigma: Tensor) -> Tensor:
    """The ideal D for two Gaussians, N(±0.6, 0.2²), of a value that also looks at its mirror."""
    y = 0.8 * y + 0.2 * y.flip(-1)
    variance = 0.2**2 + sigma**2
    share = (2 * 0.6 * y / variance).sigmoid()
    mean = 0.6 * (2 * share - 1)
    return (0.2**2 * y + sigma**2 * mean) / variance


def estimate(y: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """That D, and another one for each label."""
    labels = conditioning.labels
    shift = 0 if labels is None else 0.1 * labels[:, None, None, None]
    return (1 + shift) * denoiser(y, sigma) + shift


def smooth_network(x: Tensor, noise: Tensor, conditioning: Conditioning) -> Tensor:
    """The F of that D."""
    sigma = (4 * noise.to(x.dtype)).exp()[:, None, None, None]
    one, row = torch.ones_like(sigma), EdmRow(SIGMA_DATA)
    y = x / row.state_scale(one, sigma)
    return row.from_x0(estimate(y, sigma, conditioning), x, one, sigma)


class Vp(torch.nn.Module):
    """The same network as one that predicts x_0 from x_t, as any sampler takes."""

    conditioning = ConditioningSpec(classes=4)
    sample_shape = SHAPE

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        a, s = noise_levels(SCHEDULE, timesteps.double())
        a, s = (level[:-1].to(x)[:, None, None, None] for level in (a, s))
        return estimate(x / a, s / a, conditioning)


class Edm(torch.nn.Module):
    conditioning = ConditioningSpec(classes=4)
    sample_shape = SHAPE

    def forward(self, x: Tensor, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return smooth_network(x, noise, conditioning)


def run(table: CoefficientTable, model: Any, x: Tensor) -> list[Tensor]:
    """The states of the loop after each row, in float64."""
    history = x.new_zeros(max(table.history, 1), *x.shape)
    rows = torch.nn.functional.pad(table.rows, (0, max(1 - table.history, 0)))
    states = []
    for i in range(table.evaluations):
        output = model(x, table.noise_input[i].expand(len(x)), Conditioning())
        reverse_step_reference_(
            x, output, rows, torch.tensor(i), torch.tensor(3), IDS, None, None, None, history, False
        )
        states.append(x.clone())
    return states


def algorithm_1(steps: int, n: Tensor, second_order: bool) -> Tensor:
    """Karras et al. 2022, algorithm 1, from x = σ_max n."""
    i = torch.arange(steps, dtype=torch.float64)
    t = (80 ** (1 / 7) + i / max(steps - 1, 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = torch.cat([t, t.new_zeros(1)])
    x = t[0] * n
    for now, after in itertools.pairwise(t):
        d = (x - denoiser(x, now)) / now
        x_next = x + (after - now) * d
        if after != 0 and second_order:
            d_next = (x_next - denoiser(x_next, after)) / after
            x_next = x + (after - now) * (d / 2 + d_next / 2)
        x = x_next
    return x


@pytest.mark.parametrize("steps", [1, 2, 18, 40])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_algorithm_1(sampler: str, steps: int) -> None:
    table = build_table(SCHEDULE, sampler, steps, prediction="edm")
    assert table.evaluations == (2 * steps - 1 if sampler == "heun" else steps)
    n = gaussian_noise(1, IDS, SHAPE, 0, Stream.INITIAL_NOISE).double()
    _, s = noise_levels(SCHEDULE, table.timesteps[:1])
    state = run(table, smooth_network, table.state_scale[0] * s[0] * n)[-1]
    expected = algorithm_1(steps, n, sampler == "heun")
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_the_steps_that_it_takes_with_x_0(sampler: str) -> None:
    plain = build_table(SCHEDULE, sampler, 12, prediction="x0", eta=0.5)
    table = build_table(SCHEDULE, sampler, 12, prediction="edm", eta=0.5)
    assert torch.equal(table.timesteps, plain.timesteps)
    assert table.state_scale[-1] == 1
    x = gaussian_noise(1, IDS, SHAPE, 0, Stream.INITIAL_NOISE).double()
    expected = run(plain, Vp(), x.clone())
    actual = run(table, smooth_network, table.state_scale[0] * x)
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(ours / table.state_scale[i + 1], theirs, rtol=0, atol=1e-8)


def test_the_network_input_is_scaled_by_c_in() -> None:
    """From x_t = a x_0 + s ε, what the first row's state holds is c_in (x_0 + σ n)."""
    table = build_table(SCHEDULE, "ddim", 10, prediction="edm")
    a, s = noise_levels(SCHEDULE, table.timesteps)
    sigma = (s / a)[:-1]
    torch.testing.assert_close(table.state_scale[:-1] * a[:-1], 1 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(table.noise_input, sigma.log() / 4)
    assert table.state_scale[0].item() == pytest.approx(1, abs=1e-4)  # so noise may begin as it is
    # Of another sigma_data: c_out.
    schedule = NoiseSchedule.edm(sigma_data=0.8)
    a, s = noise_levels(schedule, torch.tensor([300]))
    table = build_table(schedule, "ddim", prediction="edm", timesteps=[300])
    sigma = (s / a)[:1]
    c_out = sigma * 0.8 / (sigma**2 + 0.8**2).sqrt()
    torch.testing.assert_close(table.rows[:, Column.X0_FROM_OUTPUT], c_out)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"clip": True}, {"threshold": 0.9}, {"initial": True}, {"labels": LABELS},
        {"sampler": "ddim", "eta": 1.0, "spacing": "linspace"},
        {"sampler": "unipc3", "timesteps": [999, 900, 700, 400, 200, 100, 0]},
        {"images": True, "strength": 0.5, "sampler": "heun"},
        {"inpainting": 3, "sampler": "ddpm"},
        {"inpainting": 2, "images": True, "sampler": "ddim", "eta": 0.3},
        {"labels": LABELS, "guidance": Guidance(3.0, two_passes=True), "sampler": "dpm++2m"},
        {"labels": LABELS, "guidance": Guidance(2.0, interval=(0.3, 2.0)), "threshold": 0.8},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_of_sampling(options: dict[str, Any]) -> None:
    """The samples with F are those with the same network as one that predicts x_0."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, *SHAPE, generator=generator) * 2 - 1
    given: dict[str, Any] = {
        "sample_ids": IDS, "seed": 3, "sampler": "dpm++2m", "steps": 8, "clip": False, **options,
    }  # fmt: skip
    if "timesteps" in given:
        del given["steps"]
    if given.pop("images", None):
        given["images"] = images
    if repeats := given.pop("inpainting", None):
        mask = torch.zeros(1, 1, *SHAPE[1:], dtype=torch.bool)
        mask[..., :3] = True
        given |= {"images": images, "mask": mask, "repeats": repeats}
    if given.pop("initial", None):
        given |= {"interpolate": (4, 9, 3), "sample_ids": range(3)}
    ours = sample(Edm(), SCHEDULE, prediction="edm", **given)
    theirs = sample(Vp(), SCHEDULE, prediction="x0", **given)
    assert ours.std() > 0.2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if "mask" in given:
        torch.testing.assert_close(ours[..., :3], images[..., :3], rtol=0, atol=1e-6)


def test_guidance_is_rescaled_as_the_networks_output_is() -> None:
    plain, rescaled = (
        sample(
            Edm(), SCHEDULE, prediction="edm", sample_ids=IDS, sampler="euler", steps=6,
            labels=LABELS, guidance=Guidance(4.0, rescale), clip=False,
        )
        for rescale in (0.0, 0.7)
    )  # fmt: skip
    assert bool(rescaled.isfinite().all())
    assert not torch.allclose(plain, rescaled, atol=1e-3)


def test_the_states_of_a_trajectory_are_those_of_the_process() -> None:
    options: dict[str, Any] = {"seed": 3, "sampler": "heun", "steps": 5, "clip": False}
    kinds: Any = [(Edm(), "edm"), (Vp(), "x0")]
    chains = [
        trajectory(model, SCHEDULE, sample_ids=IDS, shape=SHAPE, prediction=kind, **options)
        for model, kind in kinds
    ]
    for ours, theirs in zip(*chains, strict=True):
        assert ours.timestep == theirs.timestep
        torch.testing.assert_close(ours.x, theirs.x, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.x0, theirs.x0, rtol=0, atol=1e-4)


# --- Configuration


EDM = RunConfig(diffusion=DiffusionConfig(schedule="edm", prediction="edm"))


@pytest.mark.parametrize("name", ["digits-edm", "cifar10-edm"])
def test_presets(name: str) -> None:
    config = PRESETS[name]()
    assert problems(config) == []
    assert from_dict(to_dict(config), "here") == config
    schedule = config.diffusion.build_schedule()
    objective = build_objective(config, schedule)
    assert isinstance(objective, DenoisingObjective)
    assert isinstance(objective.levels, LogNormalSigma)
    assert (objective.levels.mean, objective.levels.std) == (-1.2, 1.2)
    assert objective.parameterization == EdmRow(config.diffusion.sigma_data)
    assert config.sampling.sampler == "heun"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion": DiffusionConfig(prediction="edm")}, "`diffusion.schedule` edm"),
        (
            {"diffusion": replace(EDM.diffusion, timesteps=2, betas=(0.1, 0.2))},
            "`diffusion.schedule` edm, without `diffusion.betas`",
        ),
        ({"diffusion": replace(EDM.diffusion, zero_terminal_snr=True)}, "cannot be infinite"),
        ({"diffusion": replace(EDM.diffusion, sigma_min=0.0)}, "`diffusion.sigma_min` is 0.0"),
        ({"diffusion": replace(EDM.diffusion, sigma_data=-1.0)}, "`diffusion.sigma_data` is -1.0"),
        ({"diffusion": replace(EDM.diffusion, timesteps=1)}, "`diffusion.timesteps` is 1"),
        ({"objective": ObjectiveConfig(p_std=0.0)}, "`objective.p_std` is 0.0"),
        ({"objective": ObjectiveConfig(weighting="p2")}, "`objective.weighting` is p2, but"),
        ({"objective": ObjectiveConfig(offset_noise=0.1)}, "`objective.offset_noise` is 0.1"),
        ({"sampling": SamplingConfig(variance="learned_range")}, "predicts no variance"),
        (
            {"diffusion": DiffusionConfig(), "objective": ObjectiveConfig(p_mean=0.0)},
            "`objective.p_mean` does nothing unless `diffusion.prediction` is edm",
        ),
    ],
)
def test_incompatible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    assert any(message in str(problem) for problem in problems(replace(EDM, **changes)))


def test_other_predictions_may_use_the_schedule() -> None:
    diffusion = DiffusionConfig(schedule="edm", prediction="v", timesteps=50)
    found = problems(replace(EDM, diffusion=diffusion, sampling=SamplingConfig(steps=50)))
    assert [str(problem) for problem in found] == [
        "`log.sample_steps` is 100; a schedule of 50 timesteps takes 1 to 50 steps"
    ]
    assert diffusion.build_schedule().timesteps == 50
