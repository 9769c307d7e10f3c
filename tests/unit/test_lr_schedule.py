"""The learning rate as a function of the step."""

import math
from itertools import pairwise
from typing import Any

import pytest

from ddpm_engine.config import OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.errors import UserError
from ddpm_engine.rules import validate
from ddpm_engine.training.lr_schedule import learning_rate


def rates(steps: int = 100, **optimizer: Any) -> list[float]:
    """The learning rates of all steps of a run."""
    config = RunConfig(
        optimizer=OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 10, **optimizer}),
        training=TrainingConfig(steps=steps),
    )
    validate(config)
    return [learning_rate(config, step) for step in range(steps)]


def test_it_rises_and_stays() -> None:
    found = rates()
    assert found[:10] == [(step + 1) / 10 for step in range(10)]
    assert set(found[9:]) == {1.0}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_it_falls_to_zero_after_the_last_step(decay: str) -> None:
    found = rates(decay=decay, decay_from=20)
    assert set(found[9:21]) == {1.0}
    assert all(later < earlier for earlier, later in pairwise(found[20:]))
    assert found[60] == pytest.approx(0.5)  # half-way
    assert 0 < found[-1] < 0.02


def test_the_shapes_of_the_fall() -> None:
    linear, cosine = rates(decay="linear", decay_from=20), rates(decay="cosine", decay_from=20)
    assert linear[40] == pytest.approx(0.75)
    assert cosine[40] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_inverse_square_root_needs_no_last_step() -> None:
    found = rates(decay="inverse-sqrt", decay_from=25)
    assert set(found[9:26]) == {1.0}
    assert found[50] == pytest.approx(math.sqrt(0.5))
    assert rates(steps=60, decay="inverse-sqrt", decay_from=25) == found[:60]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"decay": "inverse-sqrt"}, "`optimizer.decay_from` is 0; with `optimizer.decay` inverse"),
        ({"decay_from": 5}, "`optimizer.decay_from` is 5, but `optimizer.decay` is none"),
        ({"decay": "cosine", "decay_from": 100}, "`training.steps` 100, before the learning rate"),
    ],
)
def test_a_fall_that_never_begins_is_refused(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rates(**optimizer)
