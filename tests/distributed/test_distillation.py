"""A distillation is the same on any number of processes: the teacher is whole on each of them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.distributed.launching import FSDP, Job, difference, launch, losses, zero

from ddpm_engine.config import RunConfig
from ddpm_engine.objectives.config import DistillationConfig, DistillationMethod
from ddpm_engine.training.teacher import student_config

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; pip install 'ddpm-engine[deepspeed]'",
)

WAYS = {"ddp": {}, "fsdp2": FSDP, "zero1": zero("zero1"), "zero3": zero("zero3")}


def learnt(run: Path) -> dict[str, torch.Tensor]:
    """What the objective has saved: the stage, the weights of a teacher that was a student, or
    the critic and its optimizer."""
    files = (run / "checkpoints" / "step-00000008" / "objective").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


slow = [pytest.mark.slow, needs_deepspeed]


@pytest.mark.parametrize(
    ("method", "ways"),
    [
        ("progressive", ("ddp",)),
        pytest.param("progressive", ("fsdp2",), marks=slow),
        # The student is asked for its own estimates, too.
        pytest.param("consistency", ("ddp", "fsdp2"), marks=slow),
        # A third network learns on its own.
        pytest.param("moments", ("ddp", "fsdp2"), marks=slow),
        pytest.param("progressive", ("zero1",), marks=slow),
        pytest.param("consistency", ("zero3",), marks=slow),
        pytest.param("moments", ("zero1",), marks=slow),
    ],
)
def test_two_processes_distil_as_one(
    method: DistillationMethod, ways: tuple[str, ...], config: RunConfig
) -> None:
    teacher = replace(config, training=replace(config.training, steps=4))
    plan = DistillationConfig(teacher.out, "progressive", 2, 8, guidance_scale=2.0)
    first = [Job(teacher)]

    def at(name: str) -> RunConfig:
        run = student_config(teacher, plan, config.out.with_name(name))
        training = replace(run.training, steps=8, ema_decay=0.5)
        return replace(run, training=training, log=replace(run.log, checkpoint_every=3))

    if method == "moments":
        first.append(Job(at("student")))
        plan = replace(plan, method=method, start_steps=2, student=at("student").out)
    else:
        plan = replace(plan, method=method)
    launch([*first, Job(at("one"))], 1)
    # The second time nothing is left to do, but the state is loaded.
    for _ in range(2):
        launch([Job(at(way), WAYS[way]) for way in ways], 2)
    expected = learnt(at("one").out)
    assert "stage" not in expected or int(expected["stage"]) == 1
    assert expected
    for way in ways:
        run = at(way).out
        assert difference(losses(run), losses(at("one").out)) <= 1e-4
        torch.testing.assert_close(learnt(run), expected, rtol=1e-4, atol=1e-4)
