"""Whatever moment a rank is killed at, the run goes on to the same weights, to the bit."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ddpm_engine.checkpoints.store import CheckpointStore, verify
from ddpm_engine.config import RunConfig

Launch = Callable[..., Any]


def assert_same_weights(out: Path, reference: Path) -> None:
    ours, theirs = (run / "checkpoints" / "step-00000012" for run in (out, reference))
    files = sorted(file.relative_to(theirs) for file in theirs.rglob("*.safetensors"))
    assert len(files) == 6  # three parts of two ranks
    for file in files:
        expected, found = load_file(theirs / file), load_file(ours / file)
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def reached(ended: Any) -> int:
    """How many steps were done."""
    return max(map(int, re.findall(r"step (\d+)/12", ended.output[0])), default=0)


@pytest.fixture(scope="module")
def straight(
    tiny: RunConfig, launch: Launch, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """A run without a stop, and how many events each rank had in it (rank_host.py)."""
    folder = tmp_path_factory.mktemp("straight")
    counts = [folder / f"events-{rank}" for rank in (0, 1)]
    faults = [(rank, "count_events", str(path)) for rank, path in enumerate(counts)]
    ended = launch(replace(tiny, out=folder / "run"), *faults)
    assert ended.status == [0, 0], ended.output
    return folder / "run", [int(path.read_text()) for path in counts]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_event(
    seed: int, config: RunConfig, launch: Launch, straight: tuple[Path, list[int]]
) -> None:
    reference, events = straight
    chance = random.Random(seed)
    rank = seed % 2
    event = chance.randint(1, events[rank])
    killed = launch(config, (rank, "signal_at_event", signal.SIGKILL, event))
    assert killed.status[rank] == -signal.SIGKILL, killed.output
    assert killed.ended_by_launcher == []

    store = CheckpointStore(config.out / "checkpoints")
    steps = store.steps()
    # Whatever goes by the name of a checkpoint is one.
    assert [verify(store.path(step))[1] for step in steps] == [[]] * len(steps)
    # Training waits for a save when the next is due: no more than two intervals are lost.
    newest = max(steps, default=0)
    assert reached(killed) - newest <= 2 * 3

    again = launch(config)
    assert again.status == [0, 0], again.output
    resumed = re.search(r"from step (\d+)", again.output[0])
    assert (int(resumed[1]) if resumed else 0) == newest or newest == 12
    assert_same_weights(config.out, reference)
    assert store.leftovers() == [] or newest == 12


def test_killed_while_training_was_ahead_of_a_save(config: RunConfig, launch: Launch) -> None:
    killed = launch(config, (1, "die_while_saving", 6))
    assert killed.status[1] == -signal.SIGKILL, killed.output
    # At step 9 the next save is due, and waits.
    assert re.findall(r"started step (\d+)", killed.output[1])[-1] == "8"
    assert CheckpointStore(config.out / "checkpoints").steps() == [3]
    again = launch(config)
    assert again.status == [0, 0], again.output
    assert "from step 3\n" in again.output[0]
