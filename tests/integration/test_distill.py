"""Distilling a run from the command line: stages, resuming, sampling, and what is refused."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.images.grid import to_uint8
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run as TrainingRun
from ddpm_engine.training.teacher import student_config
from ddpm_engine.training.trainer import Trainer

LAUNCH = Path(__file__).parents[2] / "launch"
Script = Callable[..., None]
Run = Callable[..., Any]

STEPS = 12
"""Of the distillation, in two stages."""

KILLED = """
import os, signal, sys, threading
from pathlib import Path
from ddpm_engine.config import load_config
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.trainer import Trainer

class Killed(Callback):
    def on_step_begin(self, run):
        if run.step == int(sys.argv[2]):
            for thread in threading.enumerate():
                if thread.name.startswith("checkpoint"):
                    thread.join()
            os.kill(os.getpid(), signal.SIGKILL)

Trainer(load_config(Path(sys.argv[1])), [Killed()]).fit()
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Run a script of launch/ in this process."""

    def start(name: str, *arguments: object) -> None:
        path = LAUNCH / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(word) for word in (path, *arguments)])
        runpy.run_path(str(path), run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=True)

    return start


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first test that asks for a teacher, and for its student."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def teacher(config: RunConfig, made: Path) -> Path:
    """Class-conditional, so that guidance has something to do."""
    out = made / "teacher"
    if not out.exists():
        model = replace(config.model, num_class_embeds=11)
        training = replace(config.training, steps=20)
        Trainer(replace(config, out=out, model=model, training=training)).fit()
        AcceleratorState._reset_state(reset_partial_state=True)
    return out


def command(teacher: Path, out: Path) -> tuple[object, ...]:
    return (
        "--teacher", teacher, "--out", out, "--steps", 2, "--start-steps", 8, "--guidance-scale", 2,
        "--training.steps", STEPS, "--log.every", 1, "--log.checkpoint-every", 2,
        "--log.sample-every", STEPS, "--log.sample-count", 4,
    )  # fmt: skip


@pytest.fixture
def student(teacher: Path, made: Path, script: Script) -> Path:
    """Distilled without a stop."""
    out = made / "student"
    if not out.exists():
        script("distill", *command(teacher, out))
    return out


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of one checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted((run / "checkpoints" / f"step-{step:08d}").rglob("*.safetensors")):
        found |= {f"{file.parent.name}.{name}": t for name, t in load_file(file).items()}
    return found


def log(run: Path) -> list[tuple[float, ...]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows]


def assert_same(run: Path, reference: Path) -> None:
    ours, theirs = tensors(run, STEPS), tensors(reference, STEPS)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert log(run) == log(reference)


def test_a_teacher_is_distilled(student: Path, teacher: Path) -> None:
    rates = [row[3] for row in log(student)]
    assert rates[6] > 5 * rates[5]  # annealed, and begun again
    state = tensors(student, STEPS)
    assert int(state["objective.stage"]) == 1
    # The second stage's teacher is the first stage's student, not the run that was distilled.
    original = load_model(teacher).network.state_dict()
    taught = [name for name in original if name.startswith(("conv_out", "mid_block"))]
    assert not all(torch.equal(state[f"objective.teacher.{n}"], original[n]) for n in taught)
    preview = np.asarray(Image.open(student / "samples" / f"step-{STEPS:08d}.png"))
    assert preview.std() > 10  # not of one colour


def test_the_student_begins_with_its_teachers_weights(teacher: Path, tmp_path: Path) -> None:
    known = load_model(teacher)
    plan = replace(known.config.distillation, teacher=teacher, steps=2, start_steps=8)
    trainer = Trainer(student_config(known.config, plan, tmp_path / "run"))
    with trainer.run.strategy.averaged() as average:
        ours = average.state_dict()
    for name, tensor in known.network.state_dict().items():
        assert torch.equal(ours[name], tensor)


def test_killed_and_resumed_to_the_bit(
    student: Path, teacher: Path, tmp_path: Path, script: Script, run: Run
) -> None:
    out = tmp_path / "student"
    arguments = json.loads((student / "config.json").read_text()) | {"out": str(out)}
    (tmp_path / "run.json").write_text(json.dumps(arguments))
    killed = run(tmp_path / "run.json", "9", code=KILLED)  # in the middle of the second stage
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert max(os.listdir(out / "checkpoints")) == "step-00000008"
    script("distill", *command(teacher, out))
    assert_same(out, student)


def test_consistency_killed_and_resumed_to_the_bit(
    teacher: Path, tmp_path: Path, script: Script, run: Run
) -> None:
    consistency = ("--method", "consistency")
    script("distill", *command(teacher, tmp_path / "whole"), *consistency)
    rates = [row[3] for row in log(tmp_path / "whole")]
    assert rates[-1] < 0.2 * max(rates)  # annealed once: the teacher stays
    state = tensors(tmp_path / "whole", STEPS)
    assert int(state["objective.stage"]) == 1
    assert [name for name in state if name.startswith("objective.")] == ["objective.stage"]
    assert load_model(tmp_path / "whole").config.sampling.steps == 2

    out = tmp_path / "killed"
    arguments = json.loads((tmp_path / "whole" / "config.json").read_text()) | {"out": str(out)}
    (tmp_path / "run.json").write_text(json.dumps(arguments))
    killed = run(tmp_path / "run.json", "9", code=KILLED)  # in the middle of the second stage
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    script("distill", *command(teacher, out), *consistency)
    assert_same(out, tmp_path / "whole")


def test_moments_killed_and_resumed_to_the_bit(
    student: Path, teacher: Path, tmp_path: Path, script: Script, run: Run
) -> None:
    def words(out: Path) -> tuple[object, ...]:
        return (
            "--teacher", teacher, "--out", out, "--method", "moments", "--student", student,
            "--steps", 2, "--guidance-scale", 2, "--training.steps", STEPS, "--log.every", 1,
            "--log.checkpoint-every", 2, "--log.sample-every", STEPS, "--log.sample-count", 4,
        )  # fmt: skip

    script("distill", *words(tmp_path / "whole"))
    state, original = tensors(tmp_path / "whole", STEPS), load_model(teacher).network
    learnt = [
        name for name, weight in original.named_parameters()
        if not torch.equal(state[f"objective.critic.{name}"], weight)
    ]  # fmt: skip
    assert len(learnt) > 10
    assert float(state[f"objective.step.{learnt[0]}"]) == STEPS
    made = load_model(tmp_path / "whole").config.sampling
    assert (made.sampler, made.steps, made.variance) == ("ddpm", 2, "fixed_small")

    out = tmp_path / "killed"
    arguments = json.loads((tmp_path / "whole" / "config.json").read_text()) | {"out": str(out)}
    (tmp_path / "run.json").write_text(json.dumps(arguments))
    killed = run(tmp_path / "run.json", "9", code=KILLED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    script("distill", *words(out))
    assert_same(out, tmp_path / "whole")
    sample_and_compare(out, script, tmp_path / "samples")


@pytest.mark.parametrize("at", [4, 6], ids=["in the first stage", "between stages"])
def test_resumed_to_the_bit(
    at: int, student: Path, teacher: Path, tmp_path: Path, script: Script
) -> None:
    out = tmp_path / "student"
    config = replace(load_model(student).config, out=out)

    class Failing(Callback):
        def on_step_begin(self, run: TrainingRun) -> None:
            if run.step == at:
                raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        Trainer(config, [Failing()]).fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert max(os.listdir(out / "checkpoints")) == f"step-{at:08d}"
    script("distill", *command(teacher, out))
    assert_same(out, student)


def sample_and_compare(student: Path, script: Script, out: Path) -> None:
    """What sample.py makes without options is what the library samples in two steps."""
    pretrained = load_model(student)
    sampler = pretrained.config.sampling.sampler
    script("sample", "--checkpoint", student, "--out", out, "--count", 3)
    manifest = json.loads((out / "manifest.json").read_text())
    assert [manifest[k] for k in ("sampler", "steps", "spacing")] == [sampler, 2, "trailing"]
    for k, image in enumerate(to_uint8(pretrained.sample(3).tensor)):
        file = np.asarray(Image.open(out / f"{k:08d}.png"))
        assert np.abs(file.astype(int) - image[..., 0].astype(int)).max() <= 1


def test_samples_are_those_of_the_library(student: Path, script: Script, tmp_path: Path) -> None:
    assert load_model(student).config.sampling.sampler == "ddim"
    sample_and_compare(student, script, tmp_path / "samples")


def test_a_checkpoint_samples_in_the_steps_that_it_has_learnt(
    teacher: Path, tmp_path: Path, script: Script
) -> None:
    script("distill", *command(teacher, tmp_path / "s"), "--log.keep-every", 2)
    folder = tmp_path / "s" / "checkpoints"
    steps = [load_model(folder / name).config.sampling.steps for name in sorted(
        name for name in os.listdir(folder) if name.startswith("step-")
    )]  # fmt: skip
    assert steps == [4, 4, 4, 2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 4), "--steps is 4, but this network was distilled: it has learned the 2"),
        (("--sampler", "unipc"), "--sampler is unipc, but this network was distilled"),
        (("--spacing", "leading"), "--spacing is leading, but"),
        (("--eta", 0.5), "--eta is 0.5, but"),
        (("--timesteps", "999,499"), "--timesteps is (999, 499), but"),
        (("--cache-interval", 2), "--cache-interval is 2, but"),
        (("--guidance-scale", 3), "--guidance-scale is 3, but this network was distilled with a "
         "scale of 2 built in"),
    ],
)  # fmt: skip
def test_other_ways_to_sample_are_refused(
    options: tuple[object, ...],
    message: str,
    student: Path,
    script: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        script("sample", "--checkpoint", student, "--out", tmp_path / "samples", *options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def test_teacher_and_student_side_by_side(
    student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "both.png"
    script = LAUNCH.parent / "benchmarks" / "side_by_side.py"
    arguments = (
        "--checkpoint", teacher, "--distilled", student, "--out", out, "--steps", 4,
        "--count", 20, "--rounds", 1,
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in (script, *arguments)])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert "ddpm, 4 steps, guided: " in said
    assert "distilled to 2 steps: " in said
    assert said.count("s for 20, ") == 2
    shown = np.asarray(Image.open(out).convert("L"))
    assert shown[:, : shown.shape[1] // 2].std() > 10
    assert shown[:, shown.shape[1] // 2 :].std() > 10


def test_an_export_makes_the_same_samples(
    student: Path, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By this engine, which also refuses what it refuses of the run."""
    script("export", "--checkpoint", student, "--out", tmp_path / "export")
    two = ("--count", 2)
    script("sample", "--checkpoint", student, "--out", tmp_path / "ours", *two)
    script("sample", "--checkpoint", tmp_path / "export", "--out", tmp_path / "theirs", *two)
    first, second = (
        np.asarray(Image.open(tmp_path / name / "00000001.png")) for name in ("ours", "theirs")
    )
    assert np.array_equal(first, second)
    for wrong in (("--steps", 4), ("--guidance-scale", 3)):
        with pytest.raises(SystemExit):
            script("sample", "--checkpoint", tmp_path / "export", "--out", tmp_path / "no", *wrong)
        assert "this network was distilled" in capsys.readouterr().err


def test_errors_name_the_flags_that_there_are(
    teacher: Path, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, message in [
        (("--start-steps", 12), "error: --start-steps is 12 and --steps 2; the first must be 2,"),
        (("--prediction", "edm"), "error: --prediction is edm"),
    ]:
        with pytest.raises(SystemExit):
            script("distill", *command(teacher, tmp_path / "run"), *wrong)
        assert message in capsys.readouterr().err
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_bound_is_refused(
    student: Path, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script(
            "evaluate", "--checkpoint", student, "--metrics", "nll", "--out", tmp_path / "e",
            "--count", 4,
        )  # fmt: skip
    assert "nll, which looks at all timesteps" in capsys.readouterr().err


def test_teachers_that_cannot_be(student: Path, teacher: Path, tmp_path: Path) -> None:
    known = load_model(teacher).config
    plan = replace(known.distillation, teacher=teacher, steps=2, start_steps=8)
    run = student_config(known, plan, tmp_path / "run")
    wider = replace(run.model, block_out_channels=(16, 16))
    shorter = replace(run.diffusion, timesteps=500)
    other = replace(run.diffusion, schedule="edm", prediction="edm")
    for wrong, message in [
        (replace(run, model=wider), "is another network than the model fields"),
        (replace(run, diffusion=shorter), "trained on another noise schedule"),
        (replace(run, diffusion=other), "trained on another noise schedule"),
        (replace(run, distillation=replace(plan, teacher=student)), "distilled already, to 2 ste"),
        (replace(run, distillation=replace(plan, teacher=tmp_path / "x")), "no usable checkpoint"),
    ]:
        with pytest.raises(UserError, match=message):
            Trainer(wrong)
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_distillation_does_not_change_its_stages(student: Path) -> None:
    config = load_model(student).config
    for changed, message in [
        (replace(config, training=replace(config.training, steps=20)), "`training.steps` was 12"),
        (
            replace(config, distillation=replace(config.distillation, guidance_scale=3.0)),
            "`distillation.guidance_scale` was 2.0 and is now 3.0",
        ),
        (
            replace(config, distillation=replace(config.distillation, method="consistency")),
            "`distillation.method` was progressive and is now consistency",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            Trainer(changed)
        AcceleratorState._reset_state(reset_partial_state=True)
