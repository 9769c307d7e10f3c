"""Trajectory distillation: one step of the student for two, its teacher's or its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.tiny import TINY_GREY
from torch import Tensor, nn

from ddpm_engine.config import RunConfig, TrainingConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.flow_schedule import FlowSchedule
from ddpm_engine.diffusion.parameterization import PARAMETERIZATIONS, Edm, Flow, Prediction
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.objectives.distillation.step_tables import step_tables
from ddpm_engine.objectives.distillation.teacher import Teacher
from ddpm_engine.objectives.distillation.trajectory import (
    DISTILLATIONS,
    ConsistencyDistillation,
    Distillation,
    ProgressiveDistillation,
)
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.rules import validate
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.training.teacher import student_config
from ddpm_kernels import Column

KINDS: list[tuple[Prediction, Prediction]] = [
    ("eps", "eps"), ("x0", "x0"), ("v", "v"), ("edm", "edm"), ("flow", "flow"), ("eps", "v"),
    ("v", "x0"),
]  # fmt: skip
"""What teacher and student predict."""
MEAN, DEVIATION = 0.2, 0.3
CLASSES = TrainingInputs(0, ConditioningSpec(classes=10))


def schedule_of(kind: Prediction) -> NoiseSchedule:
    if kind == "flow":
        return FlowSchedule.build(1000, 2.0)
    return NoiseSchedule.edm(1000) if kind == "edm" else NoiseSchedule.linear(1000, 1e-4, 0.02)


class Optimal(nn.Module):
    """The best denoiser of images of independent values from N(MEAN, DEVIATION²), in float64.

    E[x_0 ∣ x] = m + a d² (x − a m) / (a² d² + s²).
    """

    def __init__(self, schedule: NoiseSchedule, prediction: str) -> None:
        super().__init__()
        self.schedule, self.prediction = schedule, prediction

    def forward(self, x: Tensor, t: Tensor, conditioning: object = None) -> Tensor:
        if self.prediction == "edm":
            sigma = (4 * t).exp()[:, None, None, None]
            row, one = Edm(self.schedule.sigma_data), torch.ones_like(sigma)
            y = x / row.state_scale(one, sigma)
            return row.from_x0(posterior_mean(y, one, sigma), x, one, sigma)
        if self.prediction == "flow":
            tau = (t.double() / self.schedule.timesteps)[:, None, None, None]
            a, s = 1 - tau, tau
            return Flow().from_x0(posterior_mean(x, a, s), x, a, s)
        a = self.schedule.sqrt_alpha_bar[t][:, None, None, None]
        s = self.schedule.sqrt_one_minus_alpha_bar[t][:, None, None, None]
        return PARAMETERIZATIONS[self.prediction]().from_x0(posterior_mean(x, a, s), x, a, s)


def posterior_mean(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    return MEAN + a * DEVIATION**2 * (x - a * MEAN) / ((a * DEVIATION).square() + s.square())


def plan_to(steps: int, start: int, **settings: Any) -> DistillationConfig:
    return DistillationConfig(Path("t"), steps=steps, start_steps=start, **settings)


def progressive(
    teacher: Prediction, student: Prediction, clip: bool = False, steps: int = 8
) -> ProgressiveDistillation:
    """A first stage from 2 · `steps` to `steps`, with the optimal teacher."""
    schedule = schedule_of(student)
    return ProgressiveDistillation(
        schedule, student, TrainingInputs(3),
        Teacher(cast(UNet, Optimal(schedule, teacher)), teacher),
        plan_to(steps // 2, 2 * steps), 10, clip=clip, dtype=torch.float64,
    )  # fmt: skip


def consistency(
    teacher: Prediction, student: Prediction, clip: bool = False, steps: int = 4
) -> ConsistencyDistillation:
    """The last stage of two: 4 · `steps` steps of the optimal teacher."""
    schedule = schedule_of(student)
    ours = ConsistencyDistillation(
        schedule, student, TrainingInputs(3),
        Teacher(cast(UNet, Optimal(schedule, teacher)), teacher),
        plan_to(steps, 4 * steps, method="consistency"), 10, clip=clip, dtype=torch.float64,
    )  # fmt: skip
    ours.begin_step(9, lambda: pytest.fail("the teacher stays"))
    return ours


METHODS = [progressive, consistency]
Make = Callable[..., Distillation]


def optimal_student(ours: Distillation) -> nn.Module:
    return Optimal(ours.schedule, ours.prediction)


def stage_of(ours: Distillation) -> int:
    return int(ours.state()["stage"])


def begins(ours: Distillation) -> list[tuple[int, int]]:
    """Levels where steps of the student begin, and those where they end."""
    levels = sorted(set(ours.sample_levels(torch.arange(1000)).tolist()))
    stage = stage_of(ours)
    stride = ours.config.teacher_steps(stage) // ours.config.student_steps(stage)
    return [(level, (level // stride + 1) * stride) for level in levels]


def test_where_steps_begin() -> None:
    assert begins(progressive("v", "v", steps=4)) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert begins(consistency("v", "v", steps=2)) == [
        *((level, 4) for level in range(4)), *((level, 8) for level in range(4, 8))
    ]  # fmt: skip


def ddim(x: Tensor, x0: Tensor, a: Tensor, s: Tensor, k: int, to: int) -> Tensor:
    """DDIM as in its paper's equation 12, without noise, from level `k` to level `to`."""
    return a[to] * x0 + s[to] * (x - a[k] * x0) / s[k]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("teacher", "student"), KINDS)
def test_one_step_to_the_target_is_two_steps(
    method: Make, teacher: Prediction, student: Prediction
) -> None:
    ours = method(teacher, student)
    schedule = ours.schedule
    visited = build_table(schedule, "ddim", 16, prediction="x0").timesteps
    a, s = noise_levels(schedule, visited)
    # The student's own steps are among the teacher's.
    steps = ours.config.student_steps(stage_of(ours))
    assert torch.equal(
        build_table(schedule, "ddim", steps, prediction="x0").timesteps, visited[:: 16 // steps]
    )
    generator = torch.Generator().manual_seed(0)
    for level, end in begins(ours):
        x_0 = MEAN + DEVIATION * torch.randn(4, 2, 3, 3, generator=generator).double()
        noise = torch.randn(4, 2, 3, 3, generator=generator).double()
        x = a[level] * x_0 + s[level] * noise
        scale = ours.tables.student.state_scale[level]
        target = ours.target(optimal_student(ours), scale * x, torch.full((4,), level))
        after = ddim(x, posterior_mean(x, a[level], s[level]), a, s, level, level + 1)
        if end > level + 1:
            x0 = posterior_mean(after, a[level + 1], s[level + 1])
            after = ddim(after, x0, a, s, level + 1, end)
        torch.testing.assert_close(ddim(x, target, a, s, level, end), after, rtol=1e-9, atol=1e-11)
        # As Salimans & Ho 2022 write it, algorithm 2.
        ratio = s[end] / s[level]
        written = (after - ratio * x) / (a[end] - ratio * a[level])
        torch.testing.assert_close(target, written, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_the_samplers_table_leads_to_the_end_of_the_teachers_steps(kind: Prediction) -> None:
    # The rows that sampling executes, scaled states of EDM and all.
    ours = progressive(kind, kind)
    levels = 2 * torch.arange(8)
    x = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    deviation = (ours.tables.signal.square() + ours.tables.noise.square()).sqrt()
    x = x * deviation[levels][:, None, None, None]
    target = ours.target(optimal_student(ours), x, levels)
    two, one = (
        table.rows.T[:, :, None, None, None]
        for table in (ours.tables.teacher, build_table(ours.schedule, "ddim", 8, prediction=kind))
    )
    state = x
    for half in (0, 1):
        rows = two[:, half::2]
        x0 = ours.second_estimate(no_student, state, levels + half, Conditioning())
        state = rows[Column.X] * state + rows[Column.X0] * x0
    torch.testing.assert_close(one[Column.X] * x + one[Column.X0] * target, state)


@pytest.mark.parametrize("method", METHODS)
def test_clipping_keeps_the_target_in_range(method: Make) -> None:
    ours, free = method("eps", "v", clip=True), method("eps", "v")
    x = 3 * torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    levels, student = torch.full((64,), 14), optimal_student(ours)
    assert free.target(student, x, levels).abs().max() > 1.5
    assert ours.target(student, x, levels).abs().max() <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_the_loss_is_the_error_of_x0_by_truncated_snr(kind: Prediction, method: Make) -> None:
    ours = method(kind, kind)
    images = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(4)).double() * 2 - 1
    positions = torch.arange(100, 116)
    seen: dict[str, Tensor] = {}

    def network(x: Tensor, noise_level: Tensor, conditioning: object = None) -> Tensor:
        seen["x"], seen["noise_level"] = x, noise_level
        seen["output"] = torch.cos(3 * x).requires_grad_()
        return seen["output"]

    loss = ours(network, Batch(images, None, positions))
    steps = ours.sample_levels(positions)
    assert len(set(steps.tolist())) > 4
    a, s = noise_levels(ours.schedule, ours.tables.student.timesteps)
    a, s = (level[steps][:, None, None, None] for level in (a, s))
    if kind == "edm":
        sigma, sigma_data = s / a, ours.schedule.sigma_data
        deviation = (sigma**2 + sigma_data**2).sqrt()
        x0 = sigma_data**2 / deviation * seen["x"] + sigma * sigma_data / deviation * seen["output"]
        assert torch.allclose(seen["noise_level"], sigma.flatten().log() / 4)
    elif kind == "flow":
        tau = s / (a + s)
        x0 = seen["x"] - tau * seen["output"]
        assert torch.allclose(seen["noise_level"], 1000 * tau.flatten())
    else:
        p, q = {"eps": (1 / a, -s / a), "x0": (0 * a, 0 * a + 1), "v": (a, -s)}[kind]
        x0 = p * seen["x"] + q * seen["output"]
        assert torch.equal(seen["noise_level"], ours.tables.student.timesteps[steps])
    weight = torch.maximum((a / s).square(), torch.ones_like(a))
    target = ours.target(lambda x, *_: torch.cos(3 * x), seen["x"].detach(), steps)
    expected = (weight * (x0 - target).square()).mean((1, 2, 3))
    torch.testing.assert_close(loss, expected)
    (ours_gradient,) = torch.autograd.grad(loss.sum(), seen["output"], retain_graph=True)
    (gradient,) = torch.autograd.grad(expected.sum(), seen["output"])
    torch.testing.assert_close(ours_gradient, gradient)


@pytest.mark.parametrize(("method", "steps"), [(progressive, 256), (consistency, 128)])
def test_single_precision_reaches_the_target(method: Make, steps: int) -> None:
    # 512 steps of the teacher: neighbouring levels are nearly equal.
    ours = method("eps", "v", steps=steps)
    levels = torch.tensor([level for level, _ in begins(ours)])
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(len(levels), 1, 2, 2, generator=generator).double()
    exact = ours.target(optimal_student(ours), x, levels)
    ours.dtype = torch.float32
    ours.load({name: tensor.clone() for name, tensor in ours.state().items()})
    found = ours.target(optimal_student(ours), x.float(), levels)
    assert (found - exact).abs().max() < 1e-3


def guided_network() -> UNet:
    torch.manual_seed(0)
    network = UNet(replace(TINY_GREY, num_class_embeds=11)).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # the last layers begin at zero
    return network


def no_student(*_: object) -> Tensor:
    pytest.fail("the target does not depend on the student")


def test_guidance_is_that_of_the_sampler() -> None:
    # Of a teacher's two steps, each as samplers take it (Ho & Salimans 2022, equation 6).
    network, schedule, scale = guided_network(), schedule_of("eps"), 3.0

    def distillation(**settings: Any) -> Distillation:
        plan = plan_to(2, 8, **settings)
        return DISTILLATIONS[plan.method](schedule, "v", CLASSES, Teacher(network, "eps"), plan, 10)

    ours = distillation(guidance_scale=scale)
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 9])
    a, s = noise_levels(schedule, build_table(schedule, "ddim", 8).timesteps)
    a, s = a.float(), s.float()
    states, null = [x], Conditioning(torch.full_like(labels, 10))
    for k, timestep in enumerate(build_table(schedule, "ddim", 8).timesteps[:2]):
        c, u = (network(states[-1], timestep, given) for given in (Conditioning(labels), null))
        eps = u + scale * (c - u)
        x0 = ((states[-1] - s[k] * eps) / a[k]).clamp(-1, 1)
        states.append(ddim(states[-1], x0, a, s, k, k + 1))
    first = torch.zeros(3, dtype=torch.int64)
    target = ours.target(no_student, x, first, Conditioning(labels))
    row = build_table(schedule, "ddim", 4, prediction="v").rows[0].float()
    torch.testing.assert_close(
        row[Column.X] * x + row[Column.X0] * target, states[2], rtol=1e-4, atol=1e-5
    )
    # It counts, and once only: the next teacher has it built in.
    ours.begin_step(0, lambda: pytest.fail("no stage has ended"))
    plain = distillation()
    assert (plain.target(no_student, x, first, Conditioning(labels)) - target).abs().max() > 0.01
    for stage in (plain, ours):
        stage.begin_step(5, network.state_dict)
    assert torch.equal(
        plain.target(no_student, x, first, Conditioning(labels)),
        ours.target(no_student, x, first, Conditioning(labels)),
    )

    # A teacher that stays is guided in every stage, and the student that it leads to is not.
    ours = distillation(method="consistency", guidance_scale=scale)
    ours.begin_step(5, lambda: pytest.fail("the teacher stays"))
    seen: list[Tensor] = []

    def student(x: Tensor, noise_level: Tensor, given: Conditioning) -> Tensor:
        assert given.labels is labels
        seen.append(x)
        return x

    ours.target(student, x, first, Conditioning(labels))
    torch.testing.assert_close(seen[0], states[1], rtol=1e-4, atol=1e-5)


def test_the_teacher_follows_from_the_state() -> None:
    def fresh() -> ProgressiveDistillation:
        return ProgressiveDistillation(
            schedule_of("eps"), "v", CLASSES,
            Teacher(guided_network(), "eps"), plan_to(2, 8), 10,
        )  # fmt: skip

    ours, other = fresh(), fresh()
    weights = {name: 2 * tensor for name, tensor in guided_network().state_dict().items()}
    for step in range(5):
        ours.begin_step(step, lambda: pytest.fail("too early"))
    ours.begin_step(5, lambda: weights)
    assert ours.tables.student.evaluations == 4
    other.load({name: tensor.clone() for name, tensor in ours.state().items()})
    other.begin_step(5, lambda: pytest.fail("the stage has begun already"))
    x, labels, steps = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 2])
    assert torch.equal(
        ours.target(no_student, x, steps, Conditioning(labels)),
        other.target(no_student, x, steps, Conditioning(labels)),
    )


def test_a_learned_variance_is_left_alone() -> None:
    torch.manual_seed(0)
    teacher, student = (UNet(replace(TINY_GREY, out_channels=2)) for _ in range(2))
    plan = plan_to(2, 8)
    ours = ProgressiveDistillation(
        schedule_of("v"), "v", TrainingInputs(0), Teacher(teacher.eval(), "v"), plan, 10
    )
    loss = ours(student, Batch(torch.zeros(4, 1, 8, 8), None, torch.arange(4)))
    loss.mean().backward()
    gradient = student.conv_out.weight.grad
    assert gradient is not None
    assert gradient[0].abs().max() > 0
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


def test_guidance_leads_away_from_no_class_and_not_from_the_low_resolution_image() -> None:
    inputs = TrainingInputs(
        0, ConditioningSpec(classes=10, low_resolution=4), augmentation_levels=9
    )
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = inputs.prepare(Batch(images, torch.tensor([3, 5]), torch.arange(2))).conditioning
    seen: list[tuple[Tensor, Conditioning]] = []

    class Noting(nn.Module):
        def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            seen.append((t, conditioning))
            return x

    plan = plan_to(2, 8, guidance_scale=2.0)
    teacher = Teacher(cast(UNet, Noting()), "v")
    ours = ProgressiveDistillation(schedule_of("v"), "v", inputs, teacher, plan, 10)
    ours.target(no_student, torch.zeros(2, 1, 8, 8), torch.tensor([0, 2]), given)
    assert [timesteps.tolist() for timesteps, _ in seen] == [
        [999, 749, 999, 749], [874, 624, 874, 624]
    ]  # fmt: skip
    for _, both in seen:
        conditional, unconditional = both.split(2)
        assert conditional.labels is not None
        assert unconditional.labels is not None
        assert conditional.labels.tolist() == [3, 5]
        assert unconditional.labels.tolist() == [10, 10]
        for half in (conditional, unconditional):
            for name in ("low_resolution", "augmentation_level"):
                assert torch.equal(getattr(half, name), getattr(given, name))


@pytest.mark.parametrize(
    ("start", "end", "training_steps", "boundaries"),
    [
        (64, 4, 400, [(0, 32), (100, 16), (200, 8), (300, 4)]),
        (12, 3, 7, [(0, 6), (4, 3)]),
        (2, 1, 1, [(0, 1)]),
    ],
)
def test_stages(
    start: int, end: int, training_steps: int, boundaries: list[tuple[int, int]]
) -> None:
    plan = plan_to(end, start)
    assert plan.stages == len(boundaries)
    steps = [plan.student_steps(plan.stage(k, training_steps)) for k in range(training_steps)]
    begins = [0, *(k for k in range(1, training_steps) if steps[k] != steps[k - 1])]
    assert [(k, steps[k]) for k in begins] == boundaries
    rates = [plan.annealing(k, training_steps) for k in range(training_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    for first, last in zip(begins, [*begins[1:], training_steps], strict=True):
        assert rates[first] == pytest.approx(1, abs=plan.stages / training_steps)
        assert rates[first:last] == sorted(rates[first:last], reverse=True)
        assert rates[last - 1] <= 2 * plan.stages / training_steps


def test_stages_of_consistency_double_the_teachers_steps() -> None:
    plan = DistillationConfig(Path("t"), "consistency", steps=2, start_steps=16)
    assert [plan.teacher_steps(stage) for stage in range(plan.stages)] == [4, 8, 16]
    assert [plan.student_steps(stage) for stage in range(plan.stages)] == [2, 2, 2]
    rates = [plan.annealing(step, 10) for step in range(10)]
    assert rates == pytest.approx([1 - k / 10 for k in range(10)])
    assert RunConfig().distillation.annealing(700, 1000) == 1  # of an ordinary run


Change = Callable[[RunConfig], RunConfig]


def plan_of(**changes: Any) -> Change:
    return lambda run: replace(run, distillation=replace(run.distillation, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (plan_of(steps=3), r"start_steps` is 64 .* must be 2, 4, 8, … times"),
        (plan_of(steps=0), r"`distillation.steps` is 0"),
        (plan_of(steps=64), r"must be 2, 4, 8, … times"),
        (plan_of(start_steps=2048), r"there are only `diffusion.timesteps` 1000"),
        (plan_of(guidance_scale=2.0), r"trained without classes, text or vectors; leave"),
        (lambda r: replace(r, training=TrainingConfig(steps=3)), r"4 stages, and each needs one"),
        (lambda r: replace(r, sampling=replace(r.sampling, steps=5)), r"a network for ddim, 4"),
        (lambda r: replace(r, sampling=replace(r.sampling, sampler="ddpm")), r"are ddpm, 4 steps"),
        (
            lambda r: replace(r, objective=replace(r.objective, offset_noise=0.1)),
            r"the objective fields say what ordinary training minimises",
        ),
    ],
)  # fmt: skip
def test_invalid_plans_are_refused(change: Change, message: str) -> None:
    run = student_config(RunConfig(), DistillationConfig(Path("teacher")), Path("out"))
    validate(run)
    with pytest.raises(UserError, match=message):
        validate(change(run))


def test_students_of_eps_predict_v() -> None:
    plan = DistillationConfig(Path("teacher"))
    for kind, expected in [("eps", "v"), ("x0", "x0"), ("v", "v")]:
        teacher = RunConfig(diffusion=DiffusionConfig(prediction=cast(Prediction, kind)))
        assert student_config(teacher, plan, Path("out")).diffusion.prediction == expected
    assert student_config(RunConfig(), plan, Path("o"), "eps").diffusion.prediction == "eps"


def test_eps_cannot_begin_with_noise_alone() -> None:
    schedule = NoiseSchedule.linear(1000).rescaled_to_zero_terminal_snr()
    for steps in (1, 4):
        tables = step_tables(schedule, steps, 8, "v", "x0")
        assert bool(tables.weights.isfinite().all())
        assert bool(((tables.kappa >= 0) & (tables.kappa <= 1)).all())
    with pytest.raises(UserError, match="zero terminal SNR"):
        step_tables(schedule, 4, 8, "eps", "v")
