"""The scripts of launch/slurm, as they are shipped, on a SLURM of our own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import MakeShards
from tests.slurm.cluster import Cluster, why_not

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.presets import digits

ROOT = Path(__file__).parents[2]
# What these machines lack, by options and variables that the scripts leave to whoever submits.
OPTIONS = ("--gpus-per-node=1", "--cpus-per-task=1")
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": f"{ROOT / 'engine'}:{ROOT / 'kernels'}",
}


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """One whose nodes wait for work."""
    shared_cluster.restore()
    return shared_cluster


@pytest.fixture(scope="session")
def shards(make_shards: MakeShards) -> Path:
    """Scikit-learn's digits at 16×16."""
    return make_shards(1797, size=16, per_shard=10_000)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> RunConfig:
    """A tiny network; no dropout, so that it is the same run on any number of ranks."""
    return RunConfig(
        out=tmp_path / "run",
        data=DataConfig(path=shards, workers=0),
        model=replace(digits().model, block_out_channels=(8, 8, 8), norm_num_groups=4),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        training=TrainingConfig(steps=20, batch_size=8, ema_decay=0.9),
        log=LogConfig(
            every=1, checkpoint_every=20, keep_checkpoints=1000, sample_every=0, tracker="none"
        ),
    )
