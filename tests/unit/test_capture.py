"""What decides whether steps are captured, and what steps report to the host."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import TINY

from ddpm_engine.config import RunConfig, TrainingConfig
from ddpm_engine.errors import UserError
from ddpm_engine.graphs import Capture, captured
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.rules import problems
from ddpm_engine.training.build_objective import build_objective
from ddpm_engine.training.capture import choose_capture
from ddpm_engine.training.reports import Column, Reports


def chosen(device: str = "cuda", capturable: bool = True, **training: Any) -> Capture | None:
    """What is chosen for a run on a device that need not be there."""
    config = RunConfig(model=replace(TINY, dropout=0.1), training=TrainingConfig(**training))
    objective = build_objective(config, config.diffusion.build_schedule())
    strategy: Any = SimpleNamespace(capturable=capturable, name="FSDP2")
    return choose_capture(config, objective, strategy, torch.device(device))


def test_steps_are_captured_where_they_can_be(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen() is captured
        assert chosen(capture="on", recompute="blocks") is captured
        assert chosen(capture="off") is None
        assert chosen("cpu") is None
        assert "not captured" not in caplog.text
        assert chosen(capturable=False) is None
        assert "not captured as a CUDA graph: FSDP2" in caplog.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cpu"}, "runs on cpu"),
        ({"capturable": False}, "FSDP2 does more"),
    ],
)
def test_what_cannot_be_captured_is_refused(options: dict[str, Any], reason: str) -> None:
    assert chosen(**options) is None
    with pytest.raises(UserError, match=f"`training.capture` is on, but .*{reason}") as refused:
        chosen(**options, capture="on")
    assert refused.value.field == "training.capture"


def test_objectives_that_learn_from_every_step_are_refused() -> None:
    config = RunConfig(
        objective=ObjectiveConfig(timestep_sampling="importance"),
        training=TrainingConfig(capture="on"),
    )
    (problem,) = problems(config)
    assert "`training.capture` is on, but `objective.timestep_sampling` is importance" in str(
        problem
    )


def test_reports_are_read_in_the_order_of_their_steps() -> None:
    reports = Reports(torch.device("cpu"))
    for step in (1, 2):
        reports.row.copy_(torch.tensor([step / 2, 0.0, 3.0, math.inf if step == 2 else 1.0]))
        reports.send(step)
    assert len(reports) == 2
    with pytest.raises(RuntimeError, match="overwritten"):
        reports.send(3)
    first, second = reports.read(), reports.read()
    assert (first.step, first.loss_sum, first.stops, first.replaced) == (1, 0.5, 0, 3)
    assert (first.finite, second.finite) == (True, False)
    assert second.step == 2
    assert len(reports.row) == len(Column)
