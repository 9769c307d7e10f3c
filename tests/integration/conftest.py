"""A data set and a network small enough to train in a second."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image
from tests.conftest import MakeShards
from tests.forked import PATHS, run_script
from tests.tiny import TINY_GREY

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig, dump_config
from ddpm_engine.data.config import DataConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.generation.generate import generate
from ddpm_engine.training.trainer import Trainer

Run = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(scope="session")
def shards(make_shards: MakeShards) -> Path:
    """A hundred digits of 8×8 in three shards."""
    return make_shards(100)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        out=tmp_path / "run",
        data=DataConfig(path=shards, workers=0, horizontal_flip=True),
        model=replace(TINY_GREY, dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        training=TrainingConfig(steps=40, batch_size=8, ema_decay=0.9),
        log=LogConfig(every=3, checkpoint_every=10, sample_every=0, tracker="none"),
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a script of the repository in a fork of this process, or code in a new one."""

    def start(*arguments: str | Path, code: str | None = None) -> CompletedProcess[str]:
        if code is None:
            return run_script(*arguments, cwd=tmp_path)
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": PATHS},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return start


@pytest.fixture
def config_file(config: RunConfig, tmp_path: Path) -> Path:
    """The tiny run as a file for `--config`."""
    path = tmp_path / "tiny.json"
    path.write_text(dump_config(config))
    return path


@pytest.fixture(scope="session")
def inputs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, its shards, samples, images, and a configuration, each as small as can be."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "shards").symlink_to(shards)
    run = RunConfig(
        out=folder / "run",
        data=DataConfig(path=shards, workers=0),
        diffusion=DiffusionConfig(timesteps=16),
        model=replace(TINY_GREY, num_class_embeds=11),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        training=TrainingConfig(steps=4, batch_size=8, ema_decay=0.5),
        log=LogConfig(every=2, checkpoint_every=2, sample_every=0, sample_steps=2, tracker="none"),
    )
    Trainer(run).fit()
    once = replace(run, out=Path("out"), training=replace(run.training, steps=1))
    (folder / "config.json").write_text(dump_config(once))
    model = load_model(run.out)
    generate(model, model.request(steps=2), range(12), folder / "samples")
    (folder / "images").mkdir()
    for k in range(4):
        Image.open(folder / "samples" / f"{k:08d}.png").save(folder / "images" / f"{k}.png")
    return folder
