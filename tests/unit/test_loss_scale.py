from __future__ import annotations

import math

import pytest
import torch

from ddpm_engine.training.strategies import loss_scale
from ddpm_engine.training.strategies.loss_scale import LossScale

CPU = torch.device("cpu")
GO, SKIP = torch.zeros(()), torch.ones(())


def test_it_follows_the_rule_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    ours, theirs = LossScale(CPU), torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    assert theirs.scale(torch.ones(())) == ours.value  # which also makes it begin
    for finite in map(bool, [1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]):
        weight.grad = torch.tensor([1.0, 1.0 if finite else math.inf])
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(finite), GO)
        assert ours.value == theirs.get_scale()


def test_it_goes_on_from_its_state_and_stops_at_one() -> None:
    scale, other = LossScale(CPU), LossScale(CPU)
    for step in range(5000):
        scale.update(torch.tensor(step != 2500), GO)
    other.load(scale.state())
    for step in range(3000):
        scale.update(torch.tensor(step != 20), GO)
        other.update(torch.tensor(step != 20), GO)
        assert scale.value == other.value
    for _ in range(40):
        scale.update(torch.tensor(False), GO)
    assert scale.value == 1.0


def test_a_skipped_step_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    scale = LossScale(CPU)
    scale.update(torch.tensor(True), GO)
    before = scale.state()
    for finite in (True, False):
        scale.update(torch.tensor(finite), SKIP)
        assert scale.state() == before == {"value": loss_scale.FIRST_SCALE, "steps": 1}
