"""Two ranks that replay a recorded step are the same to the bit as two that run it anew."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.faults.test_kills import assert_same_weights
from tests.faults.test_ranks import rows

from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig

Launch = Callable[..., Any]
RECORDED = [(0, "recorded"), (1, "recorded")]
# Of the 4 samples of a step rank 1 has the last two: position 4·4 + 3 is its, in step 5.
BAD = (1, "not_a_number", 19, float("nan"))


@pytest.mark.slow
def test_a_skipped_step_a_signal_a_kill_and_a_resumption(
    config: RunConfig, launch: Launch, tmp_path: Path
) -> None:
    config = replace(config, training=replace(config.training, accumulation=2))
    eager = replace(config, out=tmp_path / "eager")
    ended = launch(eager, BAD, (0, "eager"), (1, "eager"))
    assert ended.status == [0, 0], ended.output

    ended = launch(config, BAD, *RECORDED, (1, "signal_at_step", signal.SIGTERM, 1))
    assert ended.status == [0, 0], ended.output
    # Step 2 meets the signal on one rank, and step 3 is on its way when all know.
    assert CheckpointStore(config.out / "checkpoints").steps() == [3]
    ended = launch(config, BAD, *RECORDED, (1, "signal_at_step", signal.SIGKILL, 7))
    assert ended.status[1] == -signal.SIGKILL, ended.output
    ended = launch(config, BAD, *RECORDED)
    assert ended.status == [0, 0], ended.output
    assert re.search("from step [36]", ended.output[0])

    assert_same_weights(config.out, eager.out)
    ours, theirs = ([row["loss"] for row in rows(out)] for out in (config.out, eager.out))
    assert ours == theirs
    assert [step for step, loss in enumerate(theirs, start=1) if loss is None] == [5]
