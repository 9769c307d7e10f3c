"""Runs of two ranks that are short, cheap to start, and go wrong on demand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import MakeShards
from tests.tiny import TINY_GREY

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig, dump_config
from ddpm_engine.data.config import DataConfig

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a run of several ranks ended."""

    status: list[int]
    """Exit status of each rank, or minus the signal that ended it."""
    ended_by_launcher: list[int]
    """Ranks that did not end by themselves although another had failed."""
    output: list[str]
    """What each rank said."""


Launch = Callable[..., Ended]


@pytest.fixture(scope="session")
def shards(make_shards: MakeShards) -> Path:
    """A hundred digits of 8×8 in five shards."""
    return make_shards(100, per_shard=20)


@pytest.fixture(scope="session")
def tiny(shards: Path) -> RunConfig:
    """Twelve steps, a checkpoint every third; `out` is to be replaced."""
    return RunConfig(
        data=DataConfig(path=shards, workers=0, horizontal_flip=True),
        model=replace(
            TINY_GREY,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            dropout=0.1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        training=TrainingConfig(steps=12, batch_size=4, ema_decay=0.9, timeout_seconds=60),
        log=LogConfig(every=1, checkpoint_every=3, sample_every=0, tracker="none"),
    )


@pytest.fixture
def config(tiny: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(tiny, out=tmp_path / "run")


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Train: `launch(config, (rank, fault, arguments...), ..., world=2)`; see rank_host.py."""
    host = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_host.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "engine", ROOT / "kernels", ROOT))),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        },
    )
    folder, numbers = tmp_path_factory.mktemp("logs"), count()

    def start(config: RunConfig, *faults: tuple[Any, ...], world: int = 2) -> Ended:
        logs = folder / str(next(numbers))
        logs.mkdir()
        (logs / "config.json").write_text(dump_config(config))
        job = {
            "config": str(logs / "config.json"),
            "world": world,
            "logs": str(logs),
            "faults": [[rank, name, arguments] for rank, name, *arguments in faults],
        }
        assert host.stdin is not None
        assert host.stdout is not None
        host.stdin.write(json.dumps(job) + "\n")
        host.stdin.flush()
        answer = json.loads(host.stdout.readline())
        output = [(logs / f"rank-{rank}.txt").read_text() for rank in range(world)]
        return Ended(answer["status"], answer["ended_by_launcher"], output)

    yield start
    assert host.stdin is not None
    host.stdin.close()
    host.wait(timeout=60)
