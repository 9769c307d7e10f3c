"""When one rank fails, dies or hangs, all end with a reason that names it, and the run goes on."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm_engine.config import RunConfig

Launch = Callable[..., Any]


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(
    config: RunConfig, launch: Launch
) -> None:
    ended = launch(config, (1, "signal_at_step", signal.SIGKILL, 7))
    assert ended.status == [2, -signal.SIGKILL], ended.output
    assert ended.ended_by_launcher == []
    assert "error: rank 1 no longer answers" in ended.output[0]
    assert "Traceback" not in ended.output[0]
    again = launch(config)
    assert again.status == [0, 0], again.output
    # The checkpoint of step 6 may have been in flight.
    assert re.search("resuming .* from step [36]", again.output[0])
    assert [row["step"] for row in rows(config.out)] == list(range(1, 13))


@pytest.mark.slow
def test_the_rank_that_keeps_the_store_is_killed(config: RunConfig, launch: Launch) -> None:
    ended = launch(config, (0, "signal_at_step", signal.SIGKILL, 7))
    assert ended.status[0] == -signal.SIGKILL
    assert ended.status[1] > 0
    assert ended.ended_by_launcher == []
    assert "rank 0, or the launcher that keeps the group's store, no longer" in ended.output[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hung", "words"),
    [(1, "rank 1 does not answer; rank 0 is computing step 8"), (0, "rank 0, or")],
)
def test_a_hung_rank_is_named(hung: int, words: str, config: RunConfig, launch: Launch) -> None:
    hasty = replace(config, training=replace(config.training, timeout_seconds=4))
    ended = launch(hasty, (hung, "signal_at_step", signal.SIGSTOP, 7))
    assert ended.status[1 - hung] == 1, ended.output
    assert ended.ended_by_launcher == [hung]  # stopped, it cannot end by itself
    assert "no progress for 4 s (`training.timeout_seconds`): " + words in ended.output[1 - hung]
    assert launch(config).status == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "kind"), [(1, "UserError"), (0, "RuntimeError")])
def test_an_error_on_one_rank_ends_all(
    rank: int, kind: str, config: RunConfig, launch: Launch
) -> None:
    ended = launch(config, (rank, "fail_at_step", kind, 5))
    assert all(status > 0 for status in ended.status), ended.output
    assert ended.ended_by_launcher == []
    said = "the dog ate the data" if kind == "UserError" else "a defect"
    assert said in ended.output[0]
    # Rank 0 may be gone, and what it wrote into the store with it, before rank 1 has read it.
    assert re.search(f"rank {rank} failed: {said}|rank 0, or the launcher", ended.output[1])
    assert ("Traceback" in ended.output[0]) == (kind != "UserError")


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_skipped_by_all(
    value: float, config: RunConfig, launch: Launch
) -> None:
    # Of the 4 samples of a step rank 1 has the last two: position 4·4 + 3 is its, in step 5.
    ended = launch(config, (1, "not_a_number", 19, value))
    assert ended.status == [0, 0], ended.output
    for output in ended.output:
        assert output.count("is skipped: loss") == 1
        assert re.search(r"step 5 is skipped: .* positions 16 to 19", output)
    assert [row["skipped_steps"] for row in rows(config.out)] == [0] * 4 + [1] + [0] * 7
    losses = [row["loss"] for row in rows(config.out)]
    assert losses[4] is None
    assert all(loss < 10 for loss in losses[:4] + losses[5:])


@pytest.mark.slow
def test_losses_that_stay_no_number_end_all(config: RunConfig, launch: Launch) -> None:
    config = replace(config, training=replace(config.training, max_bad_steps=1))
    ended = launch(config, (1, "not_a_number", 19, float("nan")))
    assert ended.status == [2, 2], ended.output
    assert "error: the gradient was not finite for 1 steps in a row" in ended.output[0]
    assert "Traceback" not in ended.output[0] + ended.output[1]
