from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import MakeShards
from tests.tiny import TINY_GREY

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig


@pytest.fixture(scope="session")
def shards(make_shards: MakeShards) -> Path:
    """A hundred digits of 16×16 in three shards."""
    return make_shards(100, size=16)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> RunConfig:
    """A run with flips, dropped labels and dropout that 1, 2, 3 and 4 processes can share."""
    return RunConfig(
        out=tmp_path / "run",
        data=DataConfig(path=shards, workers=0, horizontal_flip=True),
        model=replace(
            TINY_GREY,
            sample_size=16,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            dropout=0.2,
            num_class_embeds=11,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5, clip_norm=0.5),
        training=TrainingConfig(
            steps=50, batch_size=24, ema_decay=0.9, ema_sigma_rel=(0.1,), condition_dropout=0.3
        ),
        log=LogConfig(
            every=1, checkpoint_every=1000, snapshot_every=1000, sample_every=0, tracker="none"
        ),
    )
