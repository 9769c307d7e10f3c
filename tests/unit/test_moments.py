"""Moment matching: its timesteps, the student's gradient, and what the critic learns."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.unit.test_distillation import DEVIATION, MEAN, guided_network
from torch import Tensor, nn

from ddpm_engine.config import RunConfig, TrainingConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.flow_schedule import FlowSchedule
from ddpm_engine.diffusion.parameterization import PARAMETERIZATIONS, Prediction
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.distributed import Ranks
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.objectives.distillation.moment_matching import MomentMatching
from ddpm_engine.objectives.distillation.teacher import Teacher
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.rules import validate
from ddpm_engine.samplers.ddpm import ddpm_table
from ddpm_engine.training.teacher import student_config
from ddpm_kernels import Column, Stream, gaussian_noise

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 0.02)


class Optimal(nn.Module):
    """The best denoiser of images of independent values from N(mean, DEVIATION²), in float64."""

    def __init__(self, prediction: Prediction, mean: float = MEAN) -> None:
        super().__init__()
        self.prediction = prediction
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        a = SCHEDULE.sqrt_alpha_bar[timesteps][:, None, None, None]
        s = SCHEDULE.sqrt_one_minus_alpha_bar[timesteps][:, None, None, None]
        share = a * DEVIATION**2 / ((a * DEVIATION).square() + s.square())
        return PARAMETERIZATIONS[self.prediction]().from_x0(
            self.mean + share * (x - a * self.mean), x, a, s
        )


class Constant(nn.Module):
    """Predict the same grey image for any input."""

    def __init__(self, grey: float) -> None:
        super().__init__()
        self.grey = nn.Parameter(torch.tensor(grey, dtype=torch.float64))

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        return self.grey.expand_as(x)


def matching(
    teacher: nn.Module, critic: nn.Module, kind: str = "eps", rate: float = 0.02
) -> MomentMatching:
    plan = DistillationConfig(Path("t"), "moments", steps=4, start_steps=4, student=Path("s"))
    return MomentMatching(
        SCHEDULE, "x0", TrainingInputs(3),
        Teacher(cast(UNet, teacher), kind, critic=cast(UNet, critic)),
        plan, lambda _: rate, (0.0, 0.99), 1.0, dtype=torch.float64,
    )  # fmt: skip


def batch(count: int = 8, first: int = 0) -> Batch:
    images = torch.full((count, 1, 4, 4), 150, dtype=torch.uint8)
    return Batch(images, None, torch.arange(first, first + count))


def test_a_step_is_as_long_as_one_of_the_sampler_at_most() -> None:
    ours = matching(Optimal("eps"), Optimal("eps"))
    t, s = ours.sample_timesteps(torch.arange(5000))
    assert 0 <= int(s.min()) < 5
    assert int(t.max()) == 999
    length = t - s
    assert (int(length.min()), int(length.max())) == (1, 250)
    again = ours.sample_timesteps(torch.arange(5000).flip(0))
    assert torch.equal(again[0].flip(0), t)


@pytest.mark.parametrize("pair", [(999, 749), (249, 0)])
def test_the_posterior_is_that_of_ancestral_sampling(pair: tuple[int, int]) -> None:
    ours = matching(Optimal("eps"), Optimal("eps"))
    table = ddpm_table(SCHEDULE, torch.tensor(pair), "x0", "fixed_small").rows[0]
    torch.manual_seed(0)
    x, x0 = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    t, s = (torch.tensor([timestep, timestep]) for timestep in pair)
    positions = torch.tensor([5, 2**40])
    noise = gaussian_noise(3, positions, (1, 4, 4), 1, Stream.TRAINING_NOISE)
    expected = table[Column.X] * x + table[Column.X0] * x0 + table[Column.NOISE] * noise
    torch.testing.assert_close(ours.sample_posterior(x, x0, t, s, positions), expected)


def test_steps_of_flow_matching_begin_in_pure_noise() -> None:
    """Where nothing of x_t is in x_s: z = (1 − τ) x̃ + τ ε there."""

    class Flat(nn.Module):
        """Estimates the same image from anything; its velocity is (z − x_0) / τ."""

        def __init__(self, grey: float) -> None:
            super().__init__()
            self.grey = nn.Parameter(torch.tensor(grey, dtype=torch.float64))

        def forward(self, z: Tensor, level: Tensor, conditioning: object = None) -> Tensor:
            return (z - self.grey) / (level / 1000)[:, None, None, None]

    plan = DistillationConfig(Path("t"), "moments", steps=1, start_steps=1, student=Path("s"))
    ours = MomentMatching(
        FlowSchedule.build(), "flow", TrainingInputs(3),
        Teacher(cast(UNet, Flat(0.2)), "flow", critic=cast(UNet, Flat(0.5))),
        plan, lambda _: 0.02, (0.0, 0.99), 1.0, dtype=torch.float64,
    )  # fmt: skip
    t, _ = ours.sample_timesteps(torch.arange(8))
    assert 999 in t.tolist()
    loss = ours(Flat(0.4), batch())
    # The gradient in x̃ is 2 (0.5 − 0.2), over the error 0.2.
    torch.testing.assert_close(loss, torch.full_like(loss, (0.6 / 0.2) ** 2 / 2))


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_student_gradient_is_the_difference_of_critic_and_teacher(kind: Prediction) -> None:
    """By twice the difference, over the mean error; and not at all where they agree."""
    for theirs, moved in [(0.5, True), (MEAN, False)]:
        ours = matching(Optimal(kind), Optimal(kind, theirs), kind)
        student, here = Constant(0.4), batch()
        loss = ours(student, here)
        assert loss.shape == (8,)
        before, after = ours.sample_timesteps(here.positions)
        x0 = torch.full((8, 1, 4, 4), 0.4, dtype=torch.float64)
        images = 150 / 127.5 - 1
        a = SCHEDULE.sqrt_alpha_bar[before][:, None, None, None]
        s = SCHEDULE.sqrt_one_minus_alpha_bar[before][:, None, None, None]
        noise = gaussian_noise(3, here.positions, (1, 4, 4), 0, Stream.TRAINING_NOISE)
        x = ours.sample_posterior(a * images + s * noise, x0, before, after, here.positions)
        a = SCHEDULE.sqrt_alpha_bar[after][:, None, None, None]
        s = SCHEDULE.sqrt_one_minus_alpha_bar[after][:, None, None, None]
        share = a * DEVIATION**2 / ((a * DEVIATION).square() + s.square())
        teacher_x0, critic_x0 = (
            (mean + share * (x - a * mean)).clamp(-1, 1) for mean in (MEAN, theirs)
        )
        error = (x0 - teacher_x0).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.02)
        gradient = 2 * (critic_x0 - teacher_x0) / error
        torch.testing.assert_close(loss, gradient.square().mean((1, 2, 3)) / 2)
        (found,) = torch.autograd.grad(loss.sum(), [student.grey])
        torch.testing.assert_close(found, gradient.mean((1, 2, 3)).sum())
        assert (float(loss.detach().max()) > 1e-3) == moved


def trained(ours: MomentMatching, student: nn.Module, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(student.parameters(), lr=rate, betas=(0.0, 0.99))
    for step in range(steps):
        ours.begin_step(step, dict)
        optimizer.zero_grad()
        ours(student, batch(first=8 * step)).mean().backward()
        optimizer.step()
        ours.end_step(Ranks())


def test_a_student_learns_what_the_teacher_expects() -> None:
    student = Constant(0.9)
    trained(matching(Optimal("eps"), Optimal("eps")), student, 300, rate=0.01)
    assert student.grey.item() == pytest.approx(MEAN, abs=0.1)


def test_what_lies_beyond_the_range_is_pulled_back() -> None:
    student = Constant(1.7)
    loss = matching(Optimal("eps"), Optimal("eps"))(student, batch())
    (found,) = torch.autograd.grad(loss.mean(), [student.grey])
    assert float(found) == pytest.approx(2 * 0.7)


class Equal(Ranks):
    """Any number of ranks with the same tensors, which must not be gathered."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        pytest.fail(f"{tensor.numel()} values of every rank on one rank")


def test_micro_batches_equal_the_whole_batch() -> None:
    critics = []
    for pieces in (1, 2):
        critic = Optimal("v", 0.7)
        ours = matching(Optimal("v"), critic, "v")
        ours.begin_step(0, dict)
        for piece in range(pieces):
            ours(Constant(0.4), batch(8 // pieces, piece * 8 // pieces))
        ours.end_step(Equal())
        critics.append(critic.mean.item())
    assert critics[0] != 0.7
    assert critics[1] == pytest.approx(critics[0], abs=1e-12)


def test_a_skipped_step_changes_nothing() -> None:
    critic = Optimal("v", 0.7)
    ours = matching(Optimal("v"), critic, "v")
    before = {name: tensor.clone() for name, tensor in ours.state().items()}
    ours(Constant(0.4), batch())
    ours.end_step(None)
    assert critic.mean.grad is None
    for name, tensor in ours.state().items():
        assert torch.equal(tensor, before[name])


def test_the_critic_follows_from_the_state() -> None:
    ours, student = matching(Optimal("v"), Optimal("v"), "v"), Constant(0.4)
    trained(ours, student, 5, rate=0.01)
    other = matching(Optimal("v"), Optimal("v"), "v")
    other.load({name: tensor.clone() for name, tensor in ours.state().items()})
    twin = deepcopy(student)
    trained(ours, student, 5, rate=0.01)
    trained(other, twin, 5, rate=0.01)
    assert torch.equal(student.grey, twin.grey)
    assert ours.state().keys() == other.state().keys()
    for name, tensor in ours.state().items():
        assert torch.equal(tensor, other.state()[name])


def test_the_teacher_is_guided_and_its_critic_is_not() -> None:
    """With a scale of 1 guidance changes nothing; with another it moves the student."""
    inputs = TrainingInputs(0, ConditioningSpec(classes=10))
    losses = []
    for scale in (None, 1.0, 3.0):
        network = guided_network().eval().requires_grad_(False)
        ours = MomentMatching(
            SCHEDULE, "v", inputs,
            Teacher(network, "eps", critic=deepcopy(network).requires_grad_(True)),
            DistillationConfig(Path("t"), "moments", 4, 4, scale, Path("s")),
            lambda _: 1e-3, (0.0, 0.99), 1.0,
        )  # fmt: skip
        images = torch.full((4, 1, 8, 8), 100, dtype=torch.uint8)
        labels = torch.arange(4)
        losses.append(ours(guided_network(), Batch(images, labels, torch.arange(4))).detach())
    # Teacher and critic agree; what is left comes from samples beyond the range.
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=0)
    assert float((losses[2] - losses[0]).min()) > 1e-4


MOMENTS = DistillationConfig(Path("teacher"), "moments", 4, 4, student=Path("student"))


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        ({"student": None}, {}, "goes on from a student"),
        ({"start_steps": 64}, {}, "moments takes no more of its teacher"),
        ({"steps": 0, "start_steps": 0}, {}, "`distillation.steps` is 0"),
        ({}, {"training": TrainingConfig(precision="fp16")}, "critic's gradients would vanish"),
        ({}, {"diffusion": DiffusionConfig(schedule="edm", prediction="edm")}, "predicts edm"),
        ({"method": "progressive", "start_steps": 8}, {}, "begin as their teacher; leave it out"),
    ],
)
def test_contradictions_are_reported(
    plan: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    run = student_config(RunConfig(), MOMENTS, Path("out"))
    validate(run)
    assert (run.sampling.sampler, run.sampling.variance) == ("ddpm", "fixed_small")
    assert run.optimizer.learning_rate < RunConfig().optimizer.learning_rate
    changed = replace(run, distillation=replace(MOMENTS, **plan), **changes)
    with pytest.raises(UserError, match=message):
        validate(changed)
