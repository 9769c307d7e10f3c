"""Numbers at the edges, on the command line of distill.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_engine.cli import distill
from ddpm_engine.config import RunConfig
from ddpm_engine.training.trainer import Trainer


@pytest.fixture(scope="module")
def teachers() -> dict[str, Path]:
    """One that is trained by the first test that asks for it."""
    return {}


@pytest.fixture
def teacher(config: RunConfig, teachers: dict[str, Path]) -> Path:
    if not teachers:
        Trainer(replace(config, training=replace(config.training, steps=1))).fit()
        teachers["run"] = config.out
    return teachers["run"]


@pytest.mark.parametrize("method", ["progressive", "consistency", "moments"])
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--steps 0", "--steps is 0"),
        ("--steps -1", "--steps is -1"),
        (f"--steps {2**63}", str(2**63)),
        ("--steps 4 --start-steps 0", "--start-steps is 0"),
        ("--steps 4 --start-steps -4", "--start-steps is -4"),
        (f"--steps 4 --start-steps {2**56}", str(2**56)),
        ("--steps 4 --guidance-scale nan", "--guidance-scale is nan"),
        ("--steps 4 --guidance-scale inf", "--guidance-scale is inf"),
        ("--steps 1 --training.steps 0", "--training.steps is 0"),
        ("--steps 1 --training.steps -3", "--training.steps is -3"),
    ],
)
def test_numbers_that_cannot_be_are_named(
    words: str,
    named: str,
    method: str,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["--teacher", str(teacher), "--out", str(out), "--method", method]
    if method == "moments":
        arguments += ["--student", str(teacher)]
    monkeypatch.setattr(sys, "argv", ["distill.py", *arguments, *words.split()])
    with pytest.raises(SystemExit) as left:
        distill.main()
    assert left.value.code == 2
    assert named in capsys.readouterr().err
    assert not out.exists()
