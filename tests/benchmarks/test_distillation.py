"""The table of few evaluations: what is trained for it, and what is reported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import distillation
from benchmarks.distillation import (
    CLASSES,
    CONSISTENCY,
    EVALUATIONS,
    GUIDED,
    MOMENTS,
    PROGRESSIVE,
    SAMPLERS,
    TEACHER,
    Training,
    goals,
    students_by_evaluations,
    tables,
)

from ddpm_engine.cli import distill
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.presets import PRESETS
from ddpm_engine.rules import validate


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What launch/distill.py makes of a command, with presets as teachers."""
    launch = Path(__file__).parents[2] / "launch" / "distill.py"

    def parsed(training: Training) -> RunConfig:
        command = training.command(Path("runs"))
        assert command[:2] == [sys.executable, str(launch)]
        monkeypatch.setattr(distill, "config_of", lambda path: PRESETS[path.name]())
        run: RunConfig = distill.parse(command[2:])
        validate(run)
        return run

    return parsed


def test_each_checkpoint_samples_in_the_steps_that_it_stands_for(parse: Any) -> None:
    students = students_by_evaluations(Path("runs"))
    progressive = parse(PROGRESSIVE)
    plan = progressive.distillation
    for steps, checkpoint in zip(EVALUATIONS, students[:4], strict=True):
        assert checkpoint.parts[:2] == ("runs", PROGRESSIVE.run)
        done = int(checkpoint.name.removeprefix("step-"))
        # A checkpoint at the end of a stage is that stage's.
        assert plan.student_steps(plan.stage(done - 1, PROGRESSIVE.steps)) == steps
        assert done % progressive.log.keep_every == 0
        assert done % progressive.log.checkpoint_every == 0
    for steps, checkpoint in zip(EVALUATIONS, students[4:8], strict=True):
        run = parse(CONSISTENCY[steps])
        assert (run.distillation.method, run.sampling.steps) == ("consistency", steps)
        assert checkpoint == run.out / "checkpoints" / f"step-{run.training.steps:08d}"
    run = parse(MOMENTS)
    assert (run.sampling.sampler, run.sampling.steps) == ("ddpm", 4)
    assert run.distillation.student == students[EVALUATIONS.index(4)]
    assert students[8:] == [run.out / "checkpoints" / f"step-{run.training.steps:08d}"]
    fast = parse(GUIDED)
    assert (fast.distillation.guidance_scale, fast.sampling.steps) == (2.0, 4)


@pytest.mark.parametrize("training", [TEACHER, CLASSES])
def test_teachers_are_what_the_presets_train(training: Training) -> None:
    preset = PRESETS[training.arguments[1]]()
    assert preset.training.steps == training.steps
    assert preset.out == Path("runs") / training.run


def test_what_is_there_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(distillation.subprocess, "run", lambda command, **_: calls.append(command))
    with pytest.raises(UserError, match="did not reach step 3000"):
        distillation.train(TEACHER, tmp_path)
    assert calls == [TEACHER.command(tmp_path)]
    TEACHER.checkpoint(tmp_path).mkdir(parents=True)
    distillation.train(TEACHER, tmp_path)
    assert len(calls) == 1


def found(four: float, one: float, accuracy: float) -> dict[str, Any]:
    """As it would be: ddpm has 0.5, ddim in eight steps 0.9, the guided teacher 99%."""

    def point(name: str, steps: int, distance: float) -> dict[str, Any]:
        return {
            "name": name,
            "evaluations": steps,
            "distance": {"mean": distance, "each": [distance, distance + 0.1]},
            "of_as_many_as_the_reference": {"mean": distance, "each": [distance, distance + 0.2]},
            "times_the_reference": distance / 0.5,
        }

    points = [point(name, n, 7.2 / n) for name in SAMPLERS for n in EVALUATIONS]
    for name in ("distilled, progressive", "distilled, consistency"):
        points += [point(name, n, {1: one, 4: four}.get(n, 0.6)) for n in EVALUATIONS]
    points.append(point("distilled, moments", 4, 0.8))
    row = {"sampler": "ddim", "steps": 4, "distance": 1.0}
    return {
        "machine": {
            "command": "python x", "date": "2020-01-01T00", "device": "a chip", "torch": "2",
            "commit": "0" * 40,
        },
        "settings": {
            "samples": 5000, "seeds": 2, "reference_samples": 2000, "guided_samples": 2000
        },
        "few": {
            "reference": {"evaluations": 1000, "distance": {"mean": 0.5, "each": [0.5]}},
            "path": {"evaluations": 50, "distance": {"mean": 0.6, "each": [0.6]}},
            "points": points,
        },
        "classes": {
            "scale": 2.0,
            "rows": {
                "teacher, guided": {**row, "accuracy": 0.99},
                "distilled, guidance built in": {**row, "accuracy": accuracy},
            },
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "met"),
    [
        ((0.55, 0.85, 0.98), [True, True, True]),
        ((0.56, 0.85, 0.98), [False, True, True]),
        ((0.55, 0.95, 0.98), [True, False, True]),
        ((0.55, 0.85, 0.96), [True, True, False]),
    ],
)
def test_goals_and_tables(
    values: tuple[float, float, float], met: list[bool], tmp_path: Path
) -> None:
    measured = found(*values)
    measured["goals"] = goals(measured)
    assert list(measured["goals"].values()) == met
    text = "\n".join(tables(measured))
    assert text.count("**no**") == met.count(False)
    assert "| `ddim` | 7.20 (7.20 – 7.30) | 3.60" in text
    assert "| distilled, moments | – | – | 0.80 (0.80 – 0.90) | – |" in text
    of_as_many = f"{values[0]:.2f} ({values[0]:.2f} – {values[0] + 0.2:.2f})"
    assert f"{of_as_many}, × {values[0] / 0.5:.2f}" in text
    distillation.plot(measured, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<!-- begin: benchmarks/distillation.py -->" in distillation.DOCUMENT.read_text()
