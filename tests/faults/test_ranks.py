"""When one rank fails, dies or hangs, all end with a reason that names it, and the run goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from ddpm_engine.config import RunConfig

Launch = Callable[..., Any]


def test_two_ranks_train(config: RunConfig, launch: Launch) -> None:
    ended = launch(config)
    assert ended.status == [0, 0], ended.output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(rank: int, config: RunConfig, launch: Launch) -> None:
    ended = launch(config, (rank, "signal_at_step", signal.SIGKILL, 7))
    print(ended.output)
    assert ended.status[rank] == -signal.SIGKILL
    assert ended.status[1 - rank] > 0
    assert ended.ended_by_launcher == []
    print(ended.output[1 - rank])
    assert f"rank {rank} no longer answers" in ended.output[1 - rank] or rank == 0
    again = launch(config)
    assert again.status == [0, 0], again.output
    assert "from step 6" in again.output[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_rank(rank: int, config: RunConfig, launch: Launch) -> None:
    ended = launch(config, (rank, "signal_at_step", signal.SIGSTOP, 7))
    print(ended.output)
    assert ended.ended_by_launcher == [rank]
    assert ended.status[1 - rank] == 1
    print(ended.output[1 - rank])
